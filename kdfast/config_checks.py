"""Which settings of a run go together."""

import re
from importlib.util import find_spec
from typing import Any

from kdfast.common.errors import UserError
from kdfast.common.settings import check_values
from kdfast.config import GROUPS, SETTINGS, TrainConfig

# Of --stage both, what stage layers has in place of the flag whose name follows.
LAYERS_FLAGS = {
    "layers_teacher": "teacher",
    "layers_train_file": "train_file",
    "layers_num_train_epochs": "num_train_epochs",
    "layers_learning_rate": "learning_rate",
}
METRICS = ("squad", "mlqa", "cmrc", "korquad")
EVALUATION_FLAGS = (
    "eval_steps",
    "load_best_model_at_end",
    "early_stopping_patience",
    "metric",
    "report",
)
# What stage layers has no use for.
OF_ANSWERS = {name for name, group in SETTINGS.items() if group in ("loss", "evaluation")} | {
    "teacher_weights",
    "embeds_dropout_prob",
    "validation_file",
    "report",
    "push_to_hub",
}
# What goes with --train_file, and not with --layers_train_file.
OF_TRAIN_FILES = {"unlabelled_file", "train_weights", "train_languages"}


def check(config: TrainConfig) -> None:
    """Raise UserError for a setting out of range or settings that contradict one another."""
    for name in GROUPS:
        check_values(getattr(config, name))
    _check_presence(config)
    _check_stage(config)
    _check_contradictions(config)
    check_files(config)
    check_teachers(config)
    config.model.kept_layers()
    config.allowed_changes()


def of_stage(settings: dict[str, Any], stage: str) -> dict[str, Any]:
    """Of settings by name, such as a recipe's, those that `stage` uses, under the names it uses."""
    settings = {**settings, "stage": stage}
    if stage == "both":
        return settings
    own = {LAYERS_FLAGS[name]: settings.pop(name) for name in LAYERS_FLAGS if name in settings}
    if stage == "layers":
        unused = OF_ANSWERS | (OF_TRAIN_FILES if "train_file" in own else set())
        kept = {name: value for name, value in settings.items() if name not in unused}
        return kept | own
    settings.pop("attention_loss", None)
    return settings


def _check_presence(config: TrainConfig) -> None:
    """What no run can do without."""
    for name in ("train_file", "output_dir"):
        if not config.flat()[name]:
            raise UserError(
                f"--{name} is missing: give it, or start without any argument for the demo."
            )
    model = config.model
    if "" in model.teacher:
        raise UserError("--teacher is given an empty name: name a folder or hub id.")
    if not model.teacher and config.learns_answers:
        raise UserError(
            "--teacher is missing: name one, or give --distillation_loss_weight 0 "
            "to train on gold spans alone."
        )
    if config.output.report_to == "tensorboard" and find_spec("tensorboard") is None:
        raise UserError("--report_to tensorboard needs a package: pip install tensorboard.")
    if not model.student and not (model.teacher and model.student_layers):
        needed = {"--teacher": model.teacher, "--student_layers": model.student_layers}
        lacking = " and ".join(name for name, given in needed.items() if not given)
        raise UserError(
            f"--student is missing: name one, or give {lacking} to keep some of the teacher's "
            "layers."
        )
    optimization = config.optimization
    if optimization.max_steps <= 0 and not optimization.num_train_epochs > 0:
        raise UserError(
            f"--num_train_epochs is {optimization.num_train_epochs}: give a number above 0, "
            f"{10**6} at most."
        )


def _check_contradictions(config: TrainConfig) -> None:
    """Flags that exclude, or need, one another."""
    given = config.flat()
    for one, other in (
        ("overwrite", "resume_from_checkpoint"),
        ("gradient_accumulation_steps", "max_tokens_per_micro_batch"),
        ("validation_file", "validation_split"),
    ):
        if given[one] and given[other]:
            raise UserError(f"--{one} and --{other} exclude each other: give one of them.")
    if given["packing"] == "on" and given["torch_compile"]:
        raise UserError(
            "--packing on and --torch_compile exclude each other: compiled models read padded "
            "windows. Give one of them."
        )
    for name in EVALUATION_FLAGS:
        held_out = name != "report" and given["validation_split"]
        if given[name] and not given["validation_file"] and not held_out:
            raise UserError(f"--{name} needs --validation_file: give one, or leave it out.")
    for name, needed in (
        ("early_stopping_patience", "eval_steps"),
        ("early_stopping_threshold", "early_stopping_patience"),
    ):
        if given[name] and not given[needed]:
            raise UserError(f"--{name} needs --{needed}: give that too, or leave it out.")
    if given["unlabelled_file"] and config.model.stage != "layers" and not config.learns_answers:
        raise UserError(
            "--unlabelled_file teaches by the teacher's answers alone, and there are none with "
            "--distillation_loss_weight 0: give a higher one, or leave the file out."
        )


def _check_stage(config: TrainConfig) -> None:
    """Flags that a stage has no use for, or cannot do without."""
    model, given = config.model, config.flat()
    stage = f"--stage {model.stage}"
    if model.stage != "both":
        for name in LAYERS_FLAGS:
            if given[name] is not None:
                raise UserError(f"--{name} needs --stage both: give that, or leave it out.")
    if model.stage == "predictions":
        if model.attention_loss != "none":
            raise UserError(
                f"--attention_loss {model.attention_loss} needs --stage layers or both: give "
                "one of them, or leave it out."
            )
        return
    for name in ("torch_compile", "gradient_checkpointing"):
        if given[name]:
            raise UserError(f"--{name} and {stage} exclude each other: give one of them.")
    if given["packing"] == "on":
        raise UserError(
            f"--packing on and {stage} exclude each other, as layers are compared over padded "
            "windows: give --packing auto."
        )
    if model.stage == "both":
        if config.output.resume_from_checkpoint not in ("", "last"):
            raise UserError(
                f"--resume_from_checkpoint {config.output.resume_from_checkpoint}: --stage both "
                "goes on from the `last` checkpoint, in whichever stage: give that."
            )
        if not (model.teacher or model.layers_teacher):
            raise UserError(f"{stage} needs a teacher: give --teacher or --layers_teacher.")
        return
    if len(model.teacher) != 1:
        raise UserError(f"{stage} learns from one teacher: give one --teacher.")
    for name in ("validation_file", *EVALUATION_FLAGS, "push_to_hub"):
        if given[name]:
            raise UserError(
                f"--{name} is of no use in {stage}, which trains no span head: leave it out, "
                "or give --stage both."
            )


def check_files(config: TrainConfig) -> None:
    """Raise UserError for an empty name, and for weights or languages that are not one a file."""
    data, mixture = config.data, config.mixture
    for name, files in (
        ("train_file", data.train_file),
        ("unlabelled_file", data.unlabelled_file),
        ("validation_file", data.validation_file),
        ("layers_train_file", config.model.layers_train_file),
    ):
        if "" in files:
            raise UserError(f"--{name} is given an empty name: name a file or hub id.")
    count, unlabelled = len(data.train_file), len(data.unlabelled_file)
    both = f"{count} --train_file" + (f" and {unlabelled} --unlabelled_file" if unlabelled else "")
    for name, given in (
        ("train_weights", mixture.train_weights),
        ("train_languages", mixture.train_languages),
    ):
        if given and len(given) != count + unlabelled:
            text = " ".join(map(str, given))
            raise UserError(f"--{name} {text} are {len(given)} for {both}: give one for each.")
    metrics, evaluated = config.evaluation.metric, len(data.validation_file) or count
    for metric in metrics:
        if metric not in METRICS:
            raise UserError(f"--metric is {metric!r}: give one of {', '.join(METRICS)}.")
    if len(metrics) > 1 and len(metrics) != evaluated:
        raise UserError(
            f"--metric {' '.join(metrics)} are {len(metrics)} for {evaluated} files: give one for "
            "each, or one for all."
        )
    if not all(0 < weight <= 1000 for weight in mixture.train_weights):
        raise UserError(
            f"--train_weights {' '.join(map(str, mixture.train_weights))}: give numbers above 0, "
            "1000 at most."
        )
    for code in mixture.train_languages:
        if not re.fullmatch("[a-z]{2,3}", code):
            raise UserError(f"--train_languages {code}: give codes such as en ja, one a file.")


def check_teachers(config: TrainConfig) -> None:
    """Raise UserError where weights or the loss do not suit the teachers."""
    count, weights = len(config.model.teacher), config.model.teacher_weights
    if weights:
        given = " ".join(map(str, weights))
        if len(weights) != count:
            raise UserError(
                f"--teacher_weights {given} are {len(weights)} for {count} --teacher: "
                "give one for each."
            )
        if not all(weight > 0 for weight in weights) or not abs(sum(weights) - 1) <= 1e-6:
            raise UserError(
                f"--teacher_weights {given}: give numbers above 0 whose sum is 1 "
                f"(it is {sum(weights):g})."
            )
    if config.loss.distillation_loss == "mse" and count > 1:
        raise UserError(
            "--distillation_loss mse compares logits, and an average of several --teacher has "
            "probabilities only: give one teacher, or kl_div."
        )
