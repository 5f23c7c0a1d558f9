"""Which settings of a run go together."""

from importlib.util import find_spec
from typing import TYPE_CHECKING

from kdfast.common.errors import UserError
from kdfast.common.flag_values import LARGEST, MOST

if TYPE_CHECKING:
    from kdfast.config import TrainConfig

# Of --stage both, what stage layers has in place of the flag whose name follows.
LAYERS_FLAGS = {
    "layers_teacher": "teacher",
    "layers_train_file": "train_file",
    "layers_num_train_epochs": "num_train_epochs",
    "layers_learning_rate": "learning_rate",
}


def check(config: "TrainConfig") -> None:
    """Raise UserError for a flag out of range or flags that contradict one another."""
    check_presence(config)
    check_stage(config)
    check_contradictions(config)
    check_teachers(config)
    check_ranges(config)


def check_presence(config: "TrainConfig") -> None:
    """What no run can do without."""
    for name in ("train_file", "output_dir"):
        if not getattr(config, name) and not (name == "output_dir" and config.check_invariance):
            raise UserError(
                f"--{name} is missing: give it, or start without any argument for the demo."
            )
    if not config.teacher and config.learns_answers:
        raise UserError(
            "--teacher is missing: name one, or give --distillation_loss_weight 0 "
            "to train on gold spans alone."
        )
    if config.report_to == "tensorboard" and find_spec("tensorboard") is None:
        raise UserError("--report_to tensorboard needs a package: pip install tensorboard.")
    if config.student is None and (not config.teacher or config.student_layers is None):
        needed = {"--teacher": config.teacher, "--student_layers": config.student_layers}
        lacking = " and ".join(name for name, given in needed.items() if not given)
        raise UserError(
            f"--student is missing: name one, or give {lacking} to keep some of the teacher's "
            "layers."
        )


def check_contradictions(config: "TrainConfig") -> None:
    """Flags that exclude, or need, one another."""
    for one, other in (
        ("overwrite", "resume_from_checkpoint"),
        ("gradient_accumulation_steps", "max_tokens_per_micro_batch"),
    ):
        if getattr(config, one) and getattr(config, other):
            raise UserError(f"--{one} and --{other} exclude each other: give one of them.")
    for needy in ("eval_steps", "load_best_model_at_end", "metric", "report"):
        if getattr(config, needy) and not config.validation_file:
            raise UserError(f"--{needy} needs --validation_file: give one, or leave it out.")


def check_stage(config: "TrainConfig") -> None:
    """Flags that a stage has no use for, or cannot do without."""
    stage = f"--stage {config.stage}"
    if config.stage != "both":
        for name in LAYERS_FLAGS:
            if getattr(config, name) is not None:
                raise UserError(f"--{name} needs --stage both: give that, or leave it out.")
    if config.stage == "predictions":
        if config.attention_loss != "none":
            raise UserError(
                f"--attention_loss {config.attention_loss} needs --stage layers or both: give "
                "one of them, or leave it out."
            )
        return
    for name in ("torch_compile", "gradient_checkpointing"):
        if getattr(config, name):
            raise UserError(f"--{name} and {stage} exclude each other: give one of them.")
    if config.stage == "both":
        if config.check_invariance:
            raise UserError("--check_invariance looks at one stage: give --stage layers.")
        if config.resume_from_checkpoint not in (None, "last"):
            raise UserError(
                f"--resume_from_checkpoint {config.resume_from_checkpoint}: --stage both goes on "
                "from the `last` checkpoint, in whichever stage: give that."
            )
        if not (config.teacher or config.layers_teacher):
            raise UserError(f"{stage} needs a teacher: give --teacher or --layers_teacher.")
        return
    if len(config.teacher or ()) != 1:
        raise UserError(f"{stage} learns from one teacher: give one --teacher.")
    evaluation = ("validation_file", "eval_steps", "load_best_model_at_end", "metric", "report")
    for name in (*evaluation, "push_to_hub"):
        if getattr(config, name):
            raise UserError(
                f"--{name} is of no use in {stage}, which trains no span head: leave it out, "
                "or give --stage both."
            )


def check_teachers(config: "TrainConfig") -> None:
    """Raise UserError where weights or the loss do not suit the teachers."""
    count, weights = len(config.teacher or ()), config.teacher_weights
    if weights is not None:
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
    if config.distillation_loss == "mse" and count > 1:
        raise UserError(
            "--distillation_loss mse compares logits, and an average of several --teacher has "
            "probabilities only: give one teacher, or kl_div."
        )


def check_ranges(config: "TrainConfig") -> None:
    """Numbers that are too small or too large."""
    positive = [
        "max_seq_length",
        "max_query_length",
        "doc_stride",
        "temperature",
        "train_batch_size",
        "learning_rate",
        "max_grad_norm",
        "max_answer_length",
        "n_best_size",
        "save_total_limit",
    ]
    positive += [] if config.max_steps > 0 else ["num_train_epochs"]
    optional = (
        "max_tokens_per_micro_batch",
        "gradient_accumulation_steps",
        "eval_steps",
        "save_steps",
        "layers_num_train_epochs",
        "layers_learning_rate",
    )
    positive += [name for name in optional if getattr(config, name) is not None]
    for name in positive:
        value = getattr(config, name)
        top = MOST.get(name, LARGEST)
        if not 0 < value <= top:
            raise UserError(f"--{name} is {value}: give a number above 0, {top} at most.")
    if config.max_steps > LARGEST:
        raise UserError(f"--max_steps is {config.max_steps}: give {LARGEST} at most.")
    for name, top in (
        ("distillation_loss_weight", 1),
        ("warmup_ratio", 1),
        ("weight_decay", LARGEST),
        ("embeds_dropout_prob", 0.99),
        ("seed", 2**32 - 1),
    ):
        value = getattr(config, name)
        if not 0 <= value <= top:
            raise UserError(f"--{name} is {value}: give a number from 0 to {top}.")
    if not config.grace_seconds >= 0:
        raise UserError(f"--grace_seconds is {config.grace_seconds}: give 0 or more.")
