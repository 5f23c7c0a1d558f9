"""The files that a run trains on: their windows, what teachers say of them, and how often each is
drawn. Features and logits are cached for each file, and serve it in any company.

Rank 0 prints what the user should know.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from kdfast.common.errors import UserError
from kdfast.common.ranks import Ranks
from kdfast.common.run import Run
from kdfast.config import TrainConfig
from kdfast.data import tally
from kdfast.data.batches import Share
from kdfast.data.cache import UNLABELLED
from kdfast.data.examples import Example
from kdfast.data.held_out import article_of, choose_articles
from kdfast.data.joined import joined, joined_arrays
from kdfast.data.prepare import windows_of
from kdfast.data.read import read_examples
from kdfast.data.windows import Windows
from kdfast.evaluation import metrics, scoring
from kdfast.models.load import Loaded
from kdfast.teachers import cache
from kdfast.training import inputs
from kdfast.training.inputs import TeacherTargets


@dataclass(frozen=True)
class TrainFile:
    """A file that is trained on.

    weight: how often an epoch draws each window, see `Share`. flag: train_file or unlabelled_file.
    held_out: bool (questions,), those that are kept for evaluation, or None.
    """

    source: str
    windows: Windows
    weight: float = 1.0
    language: str | None = None
    flag: str = "train_file"
    held_out: np.ndarray | None = None

    @property
    def key(self) -> str:
        """Names the content, and whether its answers are ignored."""
        ignored = "" if self.flag == "train_file" else "unlabelled "
        return f"{ignored}{self.windows.key}"

    def chosen(self, config: TrainConfig, ranks: Ranks) -> np.ndarray:
        """The windows that teach something: unlabelled ones only where there is a teacher."""
        windows = self.windows
        keep = np.array(windows.trainable)
        if self.held_out is not None:
            keep &= ~self.held_out[windows.question]
        unlabelled = keep & (windows.start_positions == UNLABELLED)
        is_useless = (
            config.model.stage == "predictions" and not config.learns_answers and unlabelled.any()
        )
        if is_useless:
            count = unlabelled.sum()
            ranks.log(f"{count} unlabelled windows are left out, as no teacher is learnt from.")
            keep &= ~unlabelled
        if not keep.any():
            remedy = "all are left out, as said above: mend the file or the flags"
            if is_useless:
                needed = (
                    "--distillation_loss_weight above 0" if config.model.teacher else "--teacher"
                )
                remedy = f"give labelled questions, or a {needed} for unlabelled ones"
            raise UserError(f"--{self.flag} {self.source} has no question to train on: {remedy}.")
        return np.flatnonzero(keep)

    def counts(self, chosen: np.ndarray) -> dict[str, Any]:
        """Its questions: read, trained, left_out by reason. chosen: the windows that train."""
        windows = self.windows
        read, trained = windows.tally.read(), len(np.unique(windows.question[chosen]))
        reasons = [*tally.UNREAD, *(tally.UNTRAINED if self.flag == "train_file" else ())]
        left_out = {reason: windows.counts[reason] for reason in reasons if windows.counts[reason]}
        if self.held_out is not None:  # those that would have been trained on
            held = windows.trainable & self.held_out[windows.question]
            left_out["held_out"] = len(np.unique(windows.question[held]))
        if rest := read - trained - sum(left_out.values()):
            left_out["unlabelled"] = rest  # of which no teacher is asked
        return {"read": read, "trained": trained, "left_out": left_out}

    def entry(self, chosen: np.ndarray) -> dict[str, Any]:
        """What run.json holds of it, where there are several. unlabelled: of the trained ones."""
        windows = self.windows
        unlabelled = chosen[windows.start_positions[chosen] == UNLABELLED]
        return {
            "file": self.source,
            "language": self.language,
            "weight": self.weight,
            **self.counts(chosen),
            "unlabelled": len(np.unique(windows.question[unlabelled])),
            "windows": len(chosen),
        }


@dataclass(frozen=True)
class TrainFiles:
    """The files of a run, in the order of the flags. Window numbers run on from file to file.

    questions: of each file, by its name, under --validation_split; else empty.
    """

    files: list[TrainFile]
    questions: dict[str, list[Example]] = field(default_factory=dict)

    @classmethod
    def prepare(
        cls, config: TrainConfig, tokenizer: PreTrainedTokenizerFast, ranks: Ranks
    ) -> "TrainFiles":
        """The files of a run, from the cache where they are there. Raises UserError."""
        data, mixture = config.data, config.mixture
        sources = [(each, "train_file") for each in data.train_file]
        sources += [(each, "unlabelled_file") for each in data.unlabelled_file]
        weights = mixture.train_weights or [1.0] * len(sources)
        languages: Sequence[str | None] = mixture.train_languages or [None] * len(sources)
        questions = read_all([source for source, _ in sources]) if mixture.validation_split else {}
        articles = articles_held_out(config, questions)
        found = []
        for (source, flag), weight, language in zip(sources, weights, languages, strict=True):
            windows = inputs.prepare(
                config, tokenizer, source, "train", ranks, labelled=flag == "train_file"
            )
            held_out = None
            if mixture.validation_split:
                held_out = np.array([article_of(each) in articles for each in questions[source]])
            found.append(TrainFile(source, windows, weight, language, flag, held_out))
        return cls(found, questions)

    def load_validation(
        self, config: TrainConfig, student: Loaded, ranks: Ranks
    ) -> scoring.ValidationSets | None:
        """The sets of --validation_file, or what --validation_split holds out; None without."""
        if not self.questions or config.model.stage == "layers":
            return inputs.load_validation(config, student, ranks)
        found = []
        for own, each in zip(inputs.validation_sets(config), self.files, strict=False):
            assert each.held_out is not None
            held = [
                example
                for example, is_held in zip(self.questions[each.source], each.held_out, strict=True)
                if is_held and example.answers is not None
            ]
            articles = len(set(map(article_of, held)))
            unit = "articles" if all(example.title for example in held) else "titles or contexts"
            ranks.log(
                f"{each.source}: {len(held)} questions of {articles} {unit} are held out for "
                "evaluation."
            )
            metrics.gold_answers(held)
            windows = windows_of(held, student.tokenizer, config.windows)
            share, seed = config.mixture.validation_split, config.optimization.seed
            windows.key = f"{each.windows.key} held out {share} by {seed}"
            inputs.check_student_reads(config, student, windows)
            found.append(inputs.validation_of(config, own, held, windows, ranks))
        return scoring.ValidationSets(found)

    @classmethod
    def prepare_for(cls, config: TrainConfig, student: Loaded, ranks: Ranks) -> "TrainFiles":
        """As `prepare`; raises UserError for windows that the student cannot read."""
        found = cls.prepare(config, student.tokenizer, ranks)
        for each in found.files:
            inputs.check_student_reads(config, student, each.windows)
        return found

    @cached_property
    def windows(self) -> Windows:
        """All windows."""
        return joined([each.windows for each in self.files])

    @property
    def key(self) -> Any:
        """Names the content: the key of one file, or the list of all."""
        return alone_or_all([each.key for each in self.files])

    def find_targets(
        self, config: TrainConfig, tokenizer: PreTrainedTokenizerFast, run: Run
    ) -> "Targets | None":
        """What the student, whose tokenizer it is, learns from; None if the soft loss is off."""
        if not config.learns_answers:
            if config.model.teacher and config.model.stage == "predictions":
                run.ranks.log(
                    "--distillation_loss_weight is 0: the teacher's logits are not computed."
                )
            return None
        return Targets(
            [
                inputs.find_targets(config, each.source, each.windows, tokenizer, run)
                for each in self.files
            ]
        )

    def teacher_logits(self, config: TrainConfig, targets: "Targets | None", run: Run) -> Any:
        """What teachers say of all windows, fp16 (tokens, 2), from caches; None without targets."""
        if targets is None:
            return None
        return joined_arrays(
            [
                inputs.teacher_logits(config, one, each.windows, run)
                for one, each in zip(targets.files, self.files, strict=True)
            ]
        )

    def shares(self, config: TrainConfig, ranks: Ranks) -> list[Share]:
        """The windows of each file that are trained on. Raises UserError where there are none."""
        found, begin = [], 0
        for each in self.files:
            chosen = each.chosen(config, ranks)
            found.append(Share(begin + chosen, each.weight))
            begin += len(each.windows)
            if len(self.files) > 1:
                counts = each.entry(chosen)
                of = f" in {each.language}" if each.language else ""
                without = (
                    f", {counts['unlabelled']} without a label" if counts["unlabelled"] else ""
                )
                ranks.log(
                    f"{each.source}: {counts['trained']} of {counts['read']} questions{of}{without}"
                    f"; an epoch draws {found[-1].count} of {len(chosen)} windows."
                )
        return found

    def counts(self, shares: Sequence[Share]) -> dict[str, Any]:
        """What run.json holds of the training questions: read, trained, left_out by reason; and,
        of several files, the same of each."""
        found, begin = [], 0
        for each, share in zip(self.files, shares, strict=True):
            found.append(each.entry(share.windows - begin))
            begin += len(each.windows)
        left_out: Counter[str] = Counter()
        for entry in found:
            left_out.update(entry["left_out"])
        total = {name: sum(entry[name] for entry in found) for name in ("read", "trained")}
        named = {"files": found} if len(found) > 1 or self.files[0].language else {}
        return {**total, "left_out": dict(left_out), **named}


def read_all(sources: list[str]) -> dict[str, list[Example]]:
    """The questions of each file."""
    return {each: read_examples(each, split="train") for each in dict.fromkeys(sources)}


def articles_held_out(config: TrainConfig, questions: dict[str, list[Example]]) -> set[str]:
    """The articles of --validation_split, by the questions of each file."""
    share = config.mixture.validation_split
    if not share:
        return set()
    files = [(each, questions[each]) for each in config.data.train_file]
    return choose_articles(files, share, config.optimization.seed)


@dataclass(frozen=True)
class Targets:
    """What teachers say, of each file."""

    files: list[TeacherTargets]

    @property
    def key(self) -> Any:
        """The key of the cache with the logits, or the list of those of all files."""
        return alone_or_all([each.key for each in self.files])

    @property
    def is_derived(self) -> bool:
        """See TeacherTargets; so of all files or of none."""
        return self.files[0].is_derived

    @property
    def weights(self) -> list[str]:
        """Each teacher's weights_key."""
        return self.files[0].weights

    def logits_sum(self, config: TrainConfig) -> Any:
        """sha256 of the logits, or the list of those of all files; see `cache.logits_sum`."""
        return alone_or_all(
            [cache.logits_sum(config.data.cache_path, each.source) for each in self.files]
        )


def alone_or_all(values: list[Any]) -> Any:
    """The one value, as files of earlier versions have it, or the list of several."""
    return values[0] if len(values) == 1 else values
