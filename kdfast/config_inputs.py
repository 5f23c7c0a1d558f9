"""What a run learns from and is evaluated on: settings in groups. config.py has the others.

Each field is a flag of `kdfast.train`. Names follow Hugging Face and Haystack; the defaults are the
published recipe's. An empty text or list is a setting that was not given.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from kdfast.common.errors import UserError
from kdfast.common.settings import flag


def hold_lists(settings: Any, *names: str) -> None:
    """Put a list in the place of one name, as a recipe or a call may have it, or of none."""
    for name in names:
        value = getattr(settings, name)
        if isinstance(value, str):
            object.__setattr__(settings, name, [value] if value else [])


@dataclass(frozen=True)
class ModelSettings:
    """Who teaches whom, and what."""

    _argument_group_name: ClassVar[str] = "what is learnt"
    recipe: str = flag(
        "",
        "Settings for a teacher and a student, some of a published model; flags override them. "
        "`list` shows all recipes.",
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
    layers_train_file: list[str] = flag(
        [],
        "Stage both: the data of stage layers, each window once in an epoch. Default: those of the "
        "other stage.",
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
        hold_lists(self, "teacher", "layers_train_file")

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
    train_file: list[str] = flag(
        [],
        "File in SQuAD's or another format (docs/data.md), or a hub dataset "
        "id[@revision][:config[:split]]; or several of them, all of which are trained on.",
        resume="free",
    )
    unlabelled_file: list[str] = flag(
        [],
        "Files that are trained on by the teacher's answers alone, next to --train_file. Their own "
        "answers are ignored.",
        resume="free",
    )
    validation_file: list[str] = flag(
        [],
        "The same for evaluation; of several files there are figures for each, and their mean. "
        "Default: no evaluation.",
        resume="free",
    )
    cache_dir: str = flag(
        "~/.cache/kdfast", "Folder for prepared features and teacher logits.", resume="free"
    )

    def __post_init__(self) -> None:
        hold_lists(self, "train_file", "unlabelled_file", "validation_file")

    @property
    def cache_path(self) -> Path:
        return Path(self.cache_dir).expanduser()


@dataclass(frozen=True)
class MixtureSettings:
    """How the files of --train_file and --unlabelled_file are mixed.

    What is one for each file is in the order of --train_file, then --unlabelled_file.
    """

    _argument_group_name: ClassVar[str] = "several files"
    train_weights: list[float] = flag(
        [],
        "How often each --train_file, then each --unlabelled_file, is drawn: 1, each of its "
        "windows once in an epoch; 2, twice; 0.5, half of them, the other half in the next epoch. "
        "The loss of a window stays as it is. Default: 1 for all.",
        resume="same",
    )
    train_languages: list[str] = flag(
        [],
        "Code of the language of each of these files, such as en ja: counts and card name it.",
        resume="free",
    )
    validation_split: float | None = flag(
        None,
        "Evaluate on this share of each --train_file, in whole articles, which are not trained on. "
        "In place of --validation_file.",
        above=0,
        most=0.9,
    )


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
class EvaluationSettings:
    """How --validation_file is evaluated."""

    _argument_group_name: ClassVar[str] = "evaluation"
    eval_steps: int | None = flag(
        None, "Evaluate every so many steps. Default: at the end only.", above=0, resume="free"
    )
    load_best_model_at_end: bool = flag(
        False,
        "Put the model of best/ into --output_dir, and the last one into last/.",
        resume="free",
    )
    metric_for_best_model: Literal["f1", "exact_match"] = flag(
        "f1", "Figure by which an evaluation is the best: its model is in best/.", resume="free"
    )
    early_stopping_patience: int | None = flag(
        None,
        "Stop after so many evaluations in a row without a gain. The learning rate decays as if "
        "the run went on. Default: no stop.",
        above=0,
        resume="free",
    )
    early_stopping_threshold: float = flag(
        0.0,
        "Points of --metric_for_best_model above the best so far that count as a gain.",
        least=0,
        most=100,
        resume="free",
    )
    metric: list[str] = flag(
        [],
        "Benchmark whose rule scores --validation_file: squad, mlqa, cmrc or korquad; one for all "
        "files, or one for each. mlqa takes --language. Default: that of the hub dataset, else "
        "squad. korquad is F1 over characters.",
        resume="free",
    )
    max_answer_length: int = flag(
        30, "Tokens in the longest answer that evaluation considers.", above=0, resume="free"
    )
    n_best_size: int = flag(
        20, "Answers per question that evaluation keeps.", above=0, most=1000, resume="free"
    )

    def __post_init__(self) -> None:
        hold_lists(self, "metric")
