"""The flags of kdfast.train: a command line over a recipe over the defaults."""

from typing import Any

from kdfast import recipes
from kdfast.common import program
from kdfast.config import SECTIONS, TrainConfig
from kdfast.config_checks import LAYERS_FLAGS

ABOUT = """`python -m kdfast.train`: distil a small reader from a large one.

Without any argument it runs the embedded demo.
"""

# What stage layers has no use for.
OF_ANSWERS = {
    "teacher_weights",
    "temperature",
    "distillation_loss_weight",
    "distillation_loss",
    "convention",
    "embeds_dropout_prob",
    "validation_file",
    "eval_steps",
    "load_best_model_at_end",
    "metric",
    "max_answer_length",
    "n_best_size",
    "report",
    "push_to_hub",
}


def of_stage(settings: dict[str, Any], stage: str) -> dict[str, Any]:
    """Of settings by flag, a recipe's say, those that `stage` uses, under the flags it uses."""
    settings = {**settings, "stage": stage}
    if stage == "both":
        return settings
    own = {LAYERS_FLAGS[name]: settings.pop(name) for name in LAYERS_FLAGS if name in settings}
    if stage == "layers":
        kept = {name: value for name, value in settings.items() if name not in OF_ANSWERS}
        return kept | own
    settings.pop("attention_loss", None)
    return settings


def parse(argv: list[str]) -> TrainConfig | None:
    """Flags to settings, over those of a recipe, over the defaults; None without any argument.

    `--recipe list` prints the recipes and ends the program. Raises UserError for unknown flags and
    values.
    """
    if not argv:
        return None
    parser = program.parser_of(TrainConfig, "train", ABOUT, SECTIONS)
    recipe = parser.parse_known_args(argv)[0].recipe
    if recipe == "list":
        print(recipes.listing())
        parser.exit()
    if recipe is not None:
        settings = recipes.load(recipe).settings
        parser.set_defaults(stage=settings.get("stage", TrainConfig.stage))
        stage = parser.parse_known_args(argv)[0].stage
        parser.set_defaults(**of_stage(settings, stage))
    return program.parse(parser, argv)
