"""The command line of kdfast.train."""

from kdfast import recipes
from kdfast.common import program
from kdfast.config import GROUPS, ModelSettings, TrainConfig
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
