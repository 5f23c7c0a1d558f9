"""Every setting of a training run, in groups, and all of them together.

config_inputs.py has the groups that say what a run learns from, and is evaluated on.
"""

from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from kdfast.common.errors import UserError
from kdfast.common.settings import flag
from kdfast.config_inputs import (
    DataSettings,
    EvaluationSettings,
    LossSettings,
    MixtureSettings,
    ModelSettings,
    WindowSettings,
)


@dataclass(frozen=True)
class OptimizationSettings:
    """Steps, rates, regularization."""

    _argument_group_name: ClassVar[str] = "optimization"
    num_train_epochs: float = flag(
        4.0, "Passes over the training windows.", most=10**6, resume="allowed"
    )
    max_steps: int = flag(
        -1,
        "Stop after so many optimizer steps, in each stage; overrides the epochs if > 0.",
        resume="allowed",
    )
    train_batch_size: int = flag(
        80, "Windows in one optimizer step, whatever the hardware.", above=0
    )
    learning_rate: float = flag(3e-5, "Peak learning rate.", above=0, resume="allowed")
    warmup_ratio: float = flag(
        0.2,
        "Share of the steps with linear warm-up; then linear decay.",
        least=0,
        most=1,
        resume="allowed",
    )
    weight_decay: float = flag(
        0.01, "AdamW's decay, on every parameter.", least=0, resume="allowed"
    )
    max_grad_norm: float = flag(
        1.0, "Gradients are clipped to this norm.", above=0, resume="allowed"
    )
    embeds_dropout_prob: float = flag(
        0.1,
        "Dropout before the span head, in place of the one that a type may have there.",
        least=0,
        most=0.99,
        resume="allowed",
    )
    on_nonfinite: Literal["halt", "skip"] = flag(
        "halt",
        "halt ends the run at a step whose loss or gradient is not finite; skip counts it and goes "
        "on.",
        resume="free",
    )
    seed: int = flag(
        42, "Seed of the order of the data, of dropout and of a new head.", least=0, most=2**32 - 1
    )


@dataclass(frozen=True)
class SpeedSettings:
    """Number types, and how a step is computed: other rounding, the same objective."""

    _argument_group_name: ClassVar[str] = "numbers and speed"
    mixed_precision: Literal["no", "fp16", "bf16"] | None = flag(
        None,
        "Type of the matrix products, the teacher's too. Default: no (fp32) on a CPU; on a GPU "
        "fp16, or bf16 or no where the model cannot.",
        resume="allowed",
    )
    # Both at most 2**24: exact in fp32, in which the ranks tell each other how they cut.
    max_tokens_per_micro_batch: int | None = flag(
        None,
        "Tokens in a micro-batch, with padding. Default: 768 on a CPU, on a GPU as many as its "
        "memory holds.",
        above=0,
        most=2**24,
        resume="allowed",
    )
    gradient_accumulation_steps: int | None = flag(
        None,
        "Cut each step into so many equal micro-batches instead of by tokens.",
        above=0,
        most=2**24,
        resume="allowed",
    )
    packing: Literal["auto", "on", "off"] = flag(
        "auto",
        "Put windows one behind the other, without padding, in training and in a teacher's pass. "
        "auto: on a GPU, for models that can; a student with attention dropout cannot.",
        resume="allowed",
    )
    torch_compile: bool = flag(
        False, "Compile the student; windows are then padded, to multiples of 8.", resume="allowed"
    )
    gradient_checkpointing: bool = flag(
        False,
        "Keep no activations inside a layer: less memory, a third more work.",
        resume="allowed",
    )
    deterministic: bool = flag(
        False,
        "Kernels that give the same bits every time, slower ones on a GPU.",
        resume="allowed",
    )


@dataclass(frozen=True)
class OutputSettings:
    """What a run writes."""

    _argument_group_name: ClassVar[str] = "output"
    output_dir: str = flag(
        "", "Folder for the student, its checkpoints and run.json.", resume="free"
    )
    overwrite: bool = flag(False, "Replace an earlier run in --output_dir.", resume="free")
    resume_from_checkpoint: str = flag(
        "",
        "Continue from a checkpoint folder, or from the `last` whole one in --output_dir.",
        resume="free",
    )
    allow_changes: str = flag(
        "",
        "Flags, such as learning_rate,max_steps, that may differ from those of the resumed run.",
        resume="free",
    )
    save_steps: int | None = flag(
        None, "Write a checkpoint every so many steps. Default: none.", above=0, resume="free"
    )
    save_total_limit: int = flag(2, "Checkpoints that are kept.", above=0, resume="free")
    grace_seconds: float = flag(
        30.0,
        "Seconds from SIGTERM, SIGINT or SIGHUP until the process may be killed. A step that would "
        "take more than half of them is dropped.",
        least=0,
        most=float("inf"),
        resume="free",
    )
    report_to: Literal["none", "tensorboard"] = flag(
        "none", "Write TensorBoard files.", resume="free"
    )
    report: bool = flag(
        False,
        "Let student and teacher answer --validation_file, and write report.html.",
        resume="free",
    )
    language: str = flag(
        "",
        "Code of the data's language, for the card and --metric mlqa; of several, with commas, one "
        "for each --validation_file: en,zh.",
        resume="free",
    )
    license: str = flag("", "For the card: the model's license, such as cc-by-4.0.", resume="free")
    push_to_hub: str = flag(
        "",
        "Upload the finished model to this hub repository, made private if it is new.",
        resume="free",
    )

    @property
    def folder(self) -> Path:
        return Path(self.output_dir).expanduser()


GROUPS: dict[str, type] = {
    "model": ModelSettings,
    "data": DataSettings,
    "mixture": MixtureSettings,
    "windows": WindowSettings,
    "loss": LossSettings,
    "optimization": OptimizationSettings,
    "speed": SpeedSettings,
    "evaluation": EvaluationSettings,
    "output": OutputSettings,
}
# Every setting by name, with its group's.
SETTINGS = {each.name: name for name, group in GROUPS.items() for each in fields(group)}
# Those whose default is an empty text or list: not given.
_EMPTY = {
    each.name
    for group in GROUPS.values()
    for each in fields(group)
    if each.default == "" or each.default_factory is not MISSING
}
# Lists that files of earlier versions, which knew one name, have as a text.
_FILES = {"train_file", "layers_train_file", "unlabelled_file", "validation_file", "metric"}
_RESUME = {
    each.name: each.metadata["help"].resume for kind in GROUPS.values() for each in fields(kind)
}
# What a resumed run must share with the run that it continues, and of that what --allow_changes may
# name. Data and models are compared by content (training/resume.py).
FIXED_ON_RESUME = tuple(name for name, kind in _RESUME.items() if kind != "free")
CHANGEABLE = {name for name, kind in _RESUME.items() if kind == "allowed"}
# How a step is cut: the same objective, other rounding.
CUTS = {"max_tokens_per_micro_batch", "gradient_accumulation_steps", "packing"}


@dataclass(frozen=True, init=False)
class TrainConfig:
    """All settings of a run. They are given flat, and read by group.

    `TrainConfig(temperature=2.0, learning_rate=1e-5).loss.temperature` is 2.0. None stands for a
    setting's default.

    Raises:
        TypeError: For a name that is no setting.
    """

    model: ModelSettings
    data: DataSettings
    mixture: MixtureSettings
    windows: WindowSettings
    loss: LossSettings
    optimization: OptimizationSettings
    speed: SpeedSettings
    evaluation: EvaluationSettings
    output: OutputSettings

    def __init__(self, **settings: Any):
        if unknown := settings.keys() - SETTINGS.keys():
            raise TypeError(f"TrainConfig has no setting {', '.join(sorted(unknown))}")
        for name, group in GROUPS.items():
            own = {
                each.name: settings[each.name]
                for each in fields(group)
                if settings.get(each.name) is not None
            }
            object.__setattr__(self, name, group(**own))

    def allowed_changes(self) -> set[str]:
        """The flags of --allow_changes. Raises UserError for one that may not change."""
        names = {name.strip().lstrip("-") for name in self.output.allow_changes.split(",")} - {""}
        free = set(SETTINGS) - set(FIXED_ON_RESUME)
        if given := sorted(names & free):
            raise UserError(
                f"--allow_changes names {', '.join(given)}, which may change without it: leave "
                "that out."
            )
        if wrong := sorted(names - CHANGEABLE):
            raise UserError(
                f"--allow_changes names {', '.join(wrong)}, which may not change within a run: "
                f"those that may are {', '.join(sorted(CHANGEABLE))}."
            )
        return names

    def flat(self) -> dict[str, Any]:
        """Setting -> value, as run.json and YAML have them; None for what was not given.

        A list of one file is that file's name.
        """
        values = {name: getattr(getattr(self, group), name) for name, group in SETTINGS.items()}
        for name in _FILES & values.keys():
            if len(values[name]) == 1:
                (values[name],) = values[name]
        return {
            name: value if value or name not in _EMPTY else None for name, value in values.items()
        }

    def given(self) -> dict[str, Any]:
        """`flat` without what was not given."""
        return {name: value for name, value in self.flat().items() if value is not None}

    def replace(self, **changes: Any) -> "TrainConfig":
        """The same settings but for these. None restores a default."""
        return TrainConfig(**{**self.flat(), **changes})

    @property
    def learns_answers(self) -> bool:
        """Whether the teachers' logits are learnt from."""
        return self.model.stage != "layers" and self.loss.distillation_loss_weight != 0
