"""Every setting of a training run, in groups. Each field is a flag of `kdfast.train`.

Names follow Hugging Face and Haystack; the defaults are the published recipe's. An empty text or
list is a setting that was not given.
"""

from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from kdfast.common.errors import UserError
from kdfast.common.settings import flag


@dataclass(frozen=True)
class ModelSettings:
    """Who teaches whom, and what."""

    _argument_group_name: ClassVar[str] = "what is learnt"
    recipe: str = flag(
        "",
        "Settings of a published model; flags override them. `list` names all recipes.",
        resume="free",
    )
    teacher: list[str] = flag(
        [],
        "Folder or hub id of the teacher, a model fine-tuned for question answering. Of several "
        "the softened distributions are averaged. In stage predictions any may have a tokenizer "
        "of its own.",
        resume="free",
    )
    teacher_weights: list[float] = flag(
        [], "Weight of each teacher in the average; their sum is 1. Default: all the same."
    )
    stage: Literal["predictions", "layers", "both"] = flag(
        "predictions",
        "What is learnt: the teacher's answers; its hidden states (and --attention_loss), before "
        "the answers; or one after the other, in layers/ and predictions/ of --output_dir.",
    )
    attention_loss: Literal["none", "probabilities", "relations"] = flag(
        "none",
        "Stage layers: learn attention too, as probabilities of every layer, which needs equal "
        "numbers of heads, or as relations within the last one.",
    )
    layers_teacher: str = flag(
        "", "Stage both: the teacher of stage layers. Default: the first --teacher."
    )
    layers_train_file: str = flag(
        "", "Stage both: the data of stage layers. Default: --train_file."
    )
    layers_num_train_epochs: float | None = flag(
        None,
        "Stage both: the epochs of stage layers. Default: --num_train_epochs.",
        above=0,
        most=10**6,
    )
    layers_learning_rate: float | None = flag(
        None, "Stage both: the peak rate of stage layers. Default: --learning_rate.", above=0
    )
    student: str = flag(
        "",
        "Folder or hub id of the student. Default: made from the first --teacher by "
        "--student_layers.",
        resume="free",
    )
    student_layers: str = flag("", "Layers that the student keeps, counted from 0, such as 1,3,5.")

    def __post_init__(self) -> None:
        if isinstance(self.teacher, str):  # one name, as a recipe may have it
            object.__setattr__(self, "teacher", [self.teacher] if self.teacher else [])

    @property
    def student_source(self) -> str:
        """The model that the student is made of: --student, else the first teacher."""
        return self.student or self.teacher[0]

    def kept_layers(self) -> list[int] | None:
        """The layers of --student_layers, or None. Raises UserError where they are no list."""
        if not self.student_layers:
            return None
        try:
            layers = [int(part) for part in self.student_layers.split(",")]
        except ValueError:
            layers = []
        if not layers or layers != sorted(set(layers)) or layers[0] < 0:
            raise UserError(
                f"--student_layers is {self.student_layers!r}: "
                "give rising layer numbers counted from 0, such as 1,3,5."
            )
        return layers


@dataclass(frozen=True)
class DataSettings:
    """What is read, and where prepared data is kept."""

    _argument_group_name: ClassVar[str] = "data"
    train_file: str = flag(
        "",
        "File in SQuAD's or another format (docs/data.md), or a hub dataset "
        "id[@revision][:config[:split]].",
        resume="free",
    )
    validation_file: str = flag(
        "", "The same for evaluation. Default: no evaluation.", resume="free"
    )
    cache_dir: str = flag(
        "~/.cache/kdfast", "Folder for prepared features and teacher logits.", resume="free"
    )

    @property
    def cache_path(self) -> Path:
        return Path(self.cache_dir).expanduser()


@dataclass(frozen=True)
class WindowSettings:
    """How a question and its context become windows, all in tokens.

    In the Reader, as in transformers' pipeline, doc_stride is the overlap of two windows.
    """

    _argument_group_name: ClassVar[str] = "windows"
    max_seq_length: int = flag(384, "Tokens in a window, special tokens included.", above=0)
    max_query_length: int = flag(64, "Tokens of the question that are kept.", above=0)
    doc_stride: int = flag(
        128, "Context tokens from the start of a window to that of the next.", above=0
    )


@dataclass(frozen=True)
class LossSettings:
    """Arguments of `kdfast.fused_kd_loss`."""

    _argument_group_name: ClassVar[str] = "loss"
    temperature: float = flag(
        1.5,
        "Softens teacher and student; the soft loss is multiplied by its square.",
        above=0,
        most=10**6,
    )
    distillation_loss_weight: float = flag(
        0.75,
        "Weight of the soft loss; the gold spans get the rest. 0 trains on gold spans alone.",
        least=0,
        most=1,
    )
    distillation_loss: Literal["kl_div", "mse"] = flag("kl_div", "The soft loss.")
    convention: Literal["haystack", "hf"] = flag(
        "haystack", "kl_div summed over start and end (haystack) or averaged (hf)."
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
        "Dropout between the encoder and the span head.",
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
class EvaluationSettings:
    """How --validation_file is evaluated."""

    _argument_group_name: ClassVar[str] = "evaluation"
    eval_steps: int | None = flag(
        None, "Evaluate every so many steps. Default: at the end only.", above=0, resume="free"
    )
    load_best_model_at_end: bool = flag(
        False,
        "Put the model with the best f1 into --output_dir, and the last one into last/.",
        resume="free",
    )
    metric: Literal["squad", "mlqa", "cmrc", "korquad"] | None = flag(
        None,
        "Benchmark whose rule scores --validation_file; best/ goes by its F1. mlqa takes "
        "--language. Default: that of the hub dataset, else squad. korquad is F1 over characters.",
        resume="free",
    )
    max_answer_length: int = flag(
        30, "Tokens in the longest answer that evaluation considers.", above=0, resume="free"
    )
    n_best_size: int = flag(
        20, "Answers per question that evaluation keeps.", above=0, most=1000, resume="free"
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
        "For the card, and --metric mlqa: code of the data's language; de,es for the card.",
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

    def allowed_changes(self) -> set[str]:
        """The flags of --allow_changes. Raises UserError for one that may not change."""
        names = {name.strip().lstrip("-") for name in self.allow_changes.split(",")} - {""}
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


GROUPS: dict[str, type] = {
    "model": ModelSettings,
    "data": DataSettings,
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

    def flat(self) -> dict[str, Any]:
        """Setting -> value, as run.json and YAML have them; None for what was not given."""
        values = {name: getattr(getattr(self, group), name) for name, group in SETTINGS.items()}
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
