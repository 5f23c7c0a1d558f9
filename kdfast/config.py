"""The settings of a run: one frozen dataclass, whose fields are the flags of `kdfast.train`."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from kdfast import config_checks
from kdfast.common.errors import UserError
from kdfast.common.flag_values import check_values


def flag(default: Any, text: str) -> Any:
    """A dataclass field with its default and the help that the command line shows."""
    return field(default=default, metadata={"help": text})


# The first flag of each section that --help shows.
SECTIONS = {
    "recipe": "what is learnt",
    "train_file": "data and folders",
    "max_seq_length": "windows",
    "temperature": "loss",
    "num_train_epochs": "optimization",
    "mixed_precision": "numbers and speed",
    "eval_steps": "evaluation, checkpoints, reports",
}


@dataclass(frozen=True)
class TrainConfig:
    """Names follow Hugging Face and Haystack; the defaults are the published recipe's."""

    recipe: str | None = flag(
        None, "Settings of a published model; flags override them. `list` names all recipes."
    )
    teacher: list[str] | None = flag(
        None,
        "Folder or hub id of the teacher, a model fine-tuned for question answering. Of several "
        "the softened distributions are averaged. In stage predictions any may have a tokenizer "
        "of its own.",
    )
    teacher_weights: list[float] | None = flag(
        None, "What each teacher counts in the average, 1 in sum. Default: all the same."
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
    layers_teacher: str | None = flag(
        None, "Stage both: the teacher of stage layers. Default: the first --teacher."
    )
    layers_train_file: str | None = flag(
        None, "Stage both: the data of stage layers. Default: --train_file."
    )
    layers_num_train_epochs: float | None = flag(
        None, "Stage both: the epochs of stage layers. Default: --num_train_epochs."
    )
    layers_learning_rate: float | None = flag(
        None, "Stage both: the peak rate of stage layers. Default: --learning_rate."
    )
    student: str | None = flag(
        None,
        "Folder or hub id of the student. Default: made from the first --teacher by "
        "--student_layers.",
    )
    student_layers: str | None = flag(
        None, "Layers that the student keeps, counted from 0, such as 1,3,5."
    )
    train_file: str | None = flag(
        None,
        "File of SQuAD's or another form (docs/data.md), or a hub dataset "
        "id[@revision][:config[:split]].",
    )
    validation_file: str | None = flag(None, "The same for evaluation. Default: no evaluation.")
    output_dir: str | None = flag(None, "Folder for the student, its checkpoints and run.json.")
    overwrite: bool = flag(False, "Replace an earlier run in --output_dir.")
    resume_from_checkpoint: str | None = flag(
        None, "Continue from a checkpoint folder, or from the `last` whole one in --output_dir."
    )
    allow_changes: str | None = flag(
        None, "Flags, such as learning_rate,max_steps, that a resumed run may bring new values of."
    )
    cache_dir: str = flag("~/.cache/kdfast", "Folder for prepared features and teacher logits.")

    max_seq_length: int = flag(384, "Tokens in a window, special tokens included.")
    max_query_length: int = flag(64, "Tokens of the question that are kept.")
    doc_stride: int = flag(128, "Context tokens from the start of a window to that of the next.")

    temperature: float = flag(
        1.5, "Softens teacher and student; the soft loss is multiplied by its square."
    )
    distillation_loss_weight: float = flag(
        0.75, "Weight of the soft loss; the gold spans get the rest. 0 trains on gold spans alone."
    )
    distillation_loss: Literal["kl_div", "mse"] = flag("kl_div", "The soft loss.")
    convention: Literal["haystack", "hf"] = flag(
        "haystack", "kl_div summed over start and end (haystack) or averaged (hf)."
    )

    num_train_epochs: float = flag(4.0, "Passes over the training windows.")
    max_steps: int = flag(
        -1, "Stop after so many optimizer steps, in each stage; overrides the epochs if > 0."
    )
    train_batch_size: int = flag(80, "Windows in one optimizer step, whatever the hardware.")
    max_tokens_per_micro_batch: int | None = flag(
        None, "Padded tokens in a micro-batch. Default: 768 on a CPU, what fits on a GPU."
    )
    gradient_accumulation_steps: int | None = flag(
        None, "Cut each step into so many equal micro-batches instead of by tokens."
    )
    learning_rate: float = flag(3e-5, "Peak learning rate.")
    warmup_ratio: float = flag(0.2, "Share of the steps with linear warm-up; then linear decay.")
    weight_decay: float = flag(0.01, "AdamW's decay, on every parameter.")
    max_grad_norm: float = flag(1.0, "Gradients are clipped to this norm.")
    embeds_dropout_prob: float = flag(0.1, "Dropout between the encoder and the span head.")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = flag(
        None, "Type of the matrix products. Default: fp16 on a GPU, no (fp32) on a CPU."
    )
    torch_compile: bool = flag(False, "Compile the student; widths are then multiples of 8.")
    gradient_checkpointing: bool = flag(
        False, "Keep no activations inside a layer: less memory, a third more work."
    )
    on_nonfinite: Literal["halt", "skip"] = flag(
        "halt", "End the run at a step whose numbers are not finite, or count it and go on."
    )
    seed: int = flag(42, "Keys the order of the data, dropout and a new head.")
    deterministic: bool = flag(
        False, "Kernels that give the same bits every time, slower ones on a GPU."
    )

    eval_steps: int | None = flag(None, "Evaluate every so many steps. Default: at the end only.")
    save_steps: int | None = flag(None, "Write a checkpoint every so many steps. Default: none.")
    save_total_limit: int = flag(2, "Checkpoints that are kept.")
    grace_seconds: float = flag(
        30.0,
        "From SIGTERM or SIGINT to the kill: a step that would take over half of it is dropped.",
    )
    load_best_model_at_end: bool = flag(
        False, "Put the model with the best f1 into --output_dir, and the last one into last/."
    )
    metric: Literal["squad", "mlqa", "cmrc", "korquad"] | None = flag(
        None,
        "Whose rule scores --validation_file; best/ goes by its F1. mlqa takes --language. "
        "Default: that of the hub dataset, else squad. korquad is F1 over characters.",
    )
    max_answer_length: int = flag(30, "Tokens in the longest answer that evaluation considers.")
    n_best_size: int = flag(20, "Answers per question that evaluation keeps.")
    check_invariance: bool = flag(
        False, "Train nothing: compare one step's gradient over many ways to split it, and report."
    )
    report_to: Literal["none", "tensorboard"] = flag("none", "Write TensorBoard files.")
    report: bool = flag(
        False, "Let student and teacher answer --validation_file, and write report.html."
    )
    language: str | None = flag(
        None, "For the card, and --metric mlqa: code of the data's language; de,es for the card."
    )
    license: str | None = flag(None, "For the card: the model's license, such as cc-by-4.0.")
    push_to_hub: str | None = flag(
        None, "Upload the finished model to this hub repository, made private if it is new."
    )

    def __post_init__(self) -> None:
        if isinstance(self.teacher, str):  # one name, as a recipe may have it
            object.__setattr__(self, "teacher", [self.teacher])

    def check(self) -> None:
        """Raise UserError for a flag out of range or flags that contradict one another."""
        check_values(self)
        config_checks.check(self)
        self.kept_layers()
        self.allowed_changes()

    def kept_layers(self) -> list[int] | None:
        """The layers of --student_layers, or None. Raises UserError where they are no list."""
        if self.student_layers is None:
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

    def allowed_changes(self) -> set[str]:
        """The flags of --allow_changes. Raises UserError for one that may not change."""
        names = {name.strip().lstrip("-") for name in (self.allow_changes or "").split(",")} - {""}
        free = {each.name for each in fields(TrainConfig)} - set(OBJECTIVE)
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

    @property
    def learns_answers(self) -> bool:
        """Whether the teachers' logits are learnt from."""
        return self.stage != "layers" and self.distillation_loss_weight != 0

    @property
    def cache_path(self) -> Path:
        return Path(self.cache_dir).expanduser()


# What a resumed run must share with the run that it continues. Data and models are compared by
# content (training.resume).
OBJECTIVE = tuple(
    each.name
    for each in fields(TrainConfig)
    if each.name
    not in {
        "recipe",
        "output_dir",
        "overwrite",
        "resume_from_checkpoint",
        "allow_changes",
        "cache_dir",
        "teacher",
        "student",
        "train_file",
        "validation_file",
        "eval_steps",
        "save_steps",
        "save_total_limit",
        "grace_seconds",
        "load_best_model_at_end",
        "metric",
        "max_answer_length",
        "n_best_size",
        "report_to",
        "report",
        "language",
        "license",
        "push_to_hub",
        "check_invariance",
        "on_nonfinite",
    }
)
# How a step is cut: the same objective, other rounding.
CUTS = {"max_tokens_per_micro_batch", "gradient_accumulation_steps"}
# Of OBJECTIVE, what --allow_changes may name: neither what is learned nor the order of the data.
CHANGEABLE = CUTS | {
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "warmup_ratio",
    "weight_decay",
    "max_grad_norm",
    "embeds_dropout_prob",
    "mixed_precision",
    "torch_compile",
    "gradient_checkpointing",
    "deterministic",
}
