"""The command lines of kdfast.train and kdfast.prepare."""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from kdfast import recipes
from kdfast.common import program
from kdfast.common.settings import flag
from kdfast.config import GROUPS, DataSettings, ModelSettings, TrainConfig, WindowSettings
from kdfast.config_checks import of_stage

ABOUT = """`python -m kdfast.train`: distil a small reader from a large one.

Without any argument it runs the embedded demo.
"""


def parse(argv: list[str]) -> TrainConfig | None:
    """Flags to settings, over those of a recipe, over the defaults; None without any argument.

    `--recipe list` prints the recipes and ends the program. Raises UserError for unknown flags and
    values.
    """
    if not argv:
        return None
    parser = program.parser_of(list(GROUPS.values()), "train", ABOUT)
    recipe = parser.parse_known_args(argv)[0].recipe
    if recipe == "list":
        print(recipes.listing())
        parser.exit()
    if recipe:
        settings = recipes.load(recipe).settings
        parser.set_defaults(stage=settings.get("stage", ModelSettings.stage))
        stage = parser.parse_known_args(argv)[0].stage
        parser.set_defaults(**of_stage(settings, stage))
    groups = program.parse(parser, argv)
    return TrainConfig(**{name: value for group in groups for name, value in vars(group).items()})


PREPARE = """`python -m kdfast.prepare`: make what kdfast.train reads from its cache.

Without --teacher: the features of all files that are named. With it: those, and the teacher's pass
over each --train_file and --unlabelled_file. --shard makes a part of one of the two, so that many
machines can share it; the last part to be made joins all of them. docs/clusters.md shows how.
"""


@dataclass(frozen=True)
class PrepareSettings:
    """What is prepared, and which part of it."""

    _argument_group_name: ClassVar[str] = "what is prepared"
    student: str = flag(
        "",
        "Folder or hub id of the student, whose tokenizer makes the features. Default: the first "
        "--teacher.",
    )
    teacher: list[str] = flag(
        [], "Folder or hub id of the teacher, or of several; each makes its pass over --train_file."
    )
    shard: str = flag(
        "",
        "Make part i of n alone, such as 0/8. Parts count from 0, so that a Slurm array 0-7 gives "
        "$SLURM_ARRAY_TASK_ID/8. Without --teacher parts of the features, with it parts of the "
        "pass, for which the features must be there.",
    )
    join: bool = flag(False, "Make nothing: join the parts, or say which of them are missing.")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = flag(
        None, "As in kdfast.train: the teacher's pass depends on it."
    )


class PrepareConfig(NamedTuple):
    """All settings of kdfast.prepare."""

    own: PrepareSettings
    data: DataSettings
    windows: WindowSettings

    def for_training(self) -> TrainConfig:
        """Those of them that a run of training has."""
        groups = vars(self.data) | vars(self.windows)
        names = ("student", "teacher", "mixed_precision")
        return TrainConfig(**groups, **{name: getattr(self.own, name) for name in names})


def parse_prepare(argv: list[str]) -> PrepareConfig:
    """Raises UserError for unknown flags and values."""
    groups = [PrepareSettings, DataSettings, WindowSettings]
    return PrepareConfig(*program.parse(program.parser_of(groups, "prepare", PREPARE), argv))
