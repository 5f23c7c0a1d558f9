"""A model under evaluation: how it is loaded, its answers to a set, and its speed."""

import time
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from kdfast.common.device import place
from kdfast.common.files import read_record
from kdfast.common.forms import optional, record, whole
from kdfast.common.precision import resolve
from kdfast.common.run import Run
from kdfast.common.settings import LARGEST
from kdfast.config import WindowSettings
from kdfast.data.batches import cut_by_tokens
from kdfast.data.examples import Example
from kdfast.data.prepare import prepare_windows
from kdfast.data.windows import Windows
from kdfast.evaluation import metrics, scoring
from kdfast.evaluation.suites import EvaluationSet
from kdfast.models.checks import check_windows
from kdfast.models.hub import local_folder
from kdfast.models.inference import Room, forward_tokens, forward_windows
from kdfast.models.load import Loaded, check_fits, load_reader, longest_input
from kdfast.models.save import RUN_FILE
from kdfast.teachers import cache
from kdfast.tokenizers.template import Template

# Questions that are asked one at a time for the latency: first unmeasured ones, then measured.
WARM_UP = 8
PASSES = 40
# What is read of a run.json next to a model.
WINDOWS = {each.name: optional(whole(1, LARGEST)) for each in fields(WindowSettings)}
RUN_FORM = record({"config": record(WINDOWS, *WINDOWS)}, "config")


@dataclass(frozen=True)
class AnswerSettings:
    """How the models of an evaluation answer.

    Attributes:
        max_seq_length, max_query_length, doc_stride: As in WindowSettings. None: as a model was
            trained, or else the default, as far as the model can read.
        max_answer_length: Tokens in the longest answer that is considered.
        n_best_size: Answers that are kept for each question.
        cache_dir: Folder for prepared windows.
        mixed_precision: "no", "fp16" or "bf16". None: what suits a model and the device.
    """

    max_seq_length: int | None
    max_query_length: int | None
    doc_stride: int | None
    max_answer_length: int
    n_best_size: int
    cache_dir: Path
    mixed_precision: str | None = None

    def windows_for(
        self, trained: dict[str, Any], longest: int = LARGEST, special: int = 0
    ) -> WindowSettings:
        """The window settings of a model.

        What was not given is lowered to what the model can use.

        Args:
            trained: Those that it was trained with, by name.
            longest: The most tokens that it reads.
            special: How many of them its tokenizer adds to a question and a context.
        """
        found = {}
        for name, default in asdict(WindowSettings()).items():
            found[name] = getattr(self, name) or trained.get(name) or default
        if self.max_seq_length is None:
            found["max_seq_length"] = min(found["max_seq_length"], longest)
        room = found["max_seq_length"] - special
        if self.max_query_length is None and found["max_query_length"] >= room:
            found["max_query_length"] = max(1, room // 2)
        room -= found["max_query_length"]
        if self.doc_stride is None and found["doc_stride"] > room:
            found["doc_stride"] = max(1, room // 2)
        return WindowSettings(**found)


@dataclass(frozen=True)
class SetResult:
    """A model's answers to a set, with its figures and the scores of each question.

    Attributes:
        windows: How many windows the questions made.
        null_threshold: math.inf where the model may not abstain.
    """

    evaluation: scoring.Evaluation
    scores: metrics.QuestionScores
    windows: int
    null_threshold: float


class EvaluatedModel:
    """A model on its device, with its tokenizer and the window settings that suit it.

    Args:
        name: Folder or hub id.
        role: The flag that named it.
        settings: How it answers.
        run: Device, and the ranks that share the windows.

    Raises:
        UserError: For a model that does not load, that is replaced meanwhile, that reads fewer
            tokens than a window has, or that does not compute in the precision.
    """

    def __init__(self, name: str, role: str, settings: AnswerSettings, run: Run):
        folder, weights = local_folder(name, role), None
        with suppress(OSError):  # load_reader says what is wrong
            weights = cache.weights_key(folder)
        loaded = load_reader(name, role)
        cache.check_unchanged(folder, weights, name)
        self.name, self.settings = name, settings
        types = [loaded.model.reader.config.model_type]
        precision = resolve(settings.mixed_precision, run.device, types, run.ranks.warn)
        self.run = replace(run, precision=precision)
        for note in loaded.notes:
            run.ranks.warn(note)
        self.windows = self._choose_windows(loaded, folder)
        check_fits(loaded, self.windows.max_seq_length, name)
        self.tokenizer = loaded.tokenizer
        self.model = place(loaded.model, run.device)
        self.weights = weights

    def answer(
        self, each: EvaluationSet, examples: list[Example], null_threshold: float
    ) -> SetResult:
        """Answer the questions of a set, which are `examples`, and score them by the set's rule."""
        windows = self._prepare(each.source)
        for note in windows.notes(training=False):
            self.run.ranks.warn(f"{self.name}: {note}")
        validation = scoring.Validation(
            windows=windows,
            examples=examples,
            max_answer_length=self.settings.max_answer_length,
            n_best_size=self.settings.n_best_size,
            null_threshold=null_threshold,
            rule=each.rule,
        )
        evaluation = validation.score(self.model, self.run)
        found = evaluation.answers
        scores = metrics.question_scores(
            metrics.gold_answers(examples), found.never_null, each.rule.best_scores
        )
        scores = metrics.apply_threshold(scores, found.null_odds, null_threshold)
        return SetResult(evaluation, scores, len(windows), null_threshold)

    def describe(self, source: str) -> dict[str, Any]:
        """Name, type, size, weights and latency, the last measured on the questions of `source`."""
        return {
            "name": self.name,
            "type": self.model.reader.config.model_type,
            "parameters": sum(each.numel() for each in self.model.parameters()),
            "weights_sha256": self.weights,
            "windows": asdict(self.windows),
            "latency": {"data": source, **self._latency(self._prepare(source))},
        }

    def _prepare(self, source: str) -> Windows:
        cache_dir = self.settings.cache_dir
        windows = prepare_windows(
            source,
            self.tokenizer,
            self.windows,
            split="validation",
            cache_dir=cache_dir,
            ranks=self.run.ranks,
        )
        check_windows(self.model.reader, windows, self.windows.max_seq_length, cache_dir)
        return windows

    def _choose_windows(self, loaded: Loaded, folder: Path) -> WindowSettings:
        """The window settings; logged where neither flags nor the defaults decide."""
        is_part = folder.name in ("best", "last") or folder.name.startswith("checkpoint-")
        run = (folder.parent if is_part else folder) / RUN_FILE
        trained = read_record(run, RUN_FORM).get("config", {})
        longest = longest_input(loaded, self.name)
        special = Template.learn(loaded.tokenizer).size
        found = self.settings.windows_for(trained, longest, special)
        if found != self.settings.windows_for({}, special=special):
            values = "  ".join(f"{name} {value}" for name, value in asdict(found).items())
            of_run = f", as in {run}" * bool(trained)
            least = f", as it reads {longest} tokens" * (found.max_seq_length == longest)
            self.run.ranks.warn(f"{self.name}: {values}{of_run}{least}")
        return found

    def _latency(self, windows: Windows) -> dict[str, Any]:
        """Milliseconds from a question's windows in memory to their logits there: median and p80.

        The questions stand evenly over the set and are asked one after another; all windows of one
        go through the model together, as far as a pass has room. Tokenizing and decoding are not
        in it.
        """
        run = self.run
        bounds = np.searchsorted(windows.question, np.arange(len(windows.question_ids) + 1))
        chosen = np.linspace(0, len(bounds) - 2, WARM_UP + PASSES).astype(np.int64)
        room = Room(forward_tokens(self.model, windows, run.device, run.dtype))
        taken = []
        for question in chosen:
            indices = np.arange(bounds[question], bounds[question + 1])
            started = time.perf_counter()
            cuts = cut_by_tokens(indices, windows.lengths[indices], room.tokens)
            list(forward_windows(self.model, windows, cuts, run.device, run.dtype, room))
            taken.append(1000 * (time.perf_counter() - started))
        low, high = np.percentile(taken[WARM_UP:], [50, 80])
        return {"median_ms": float(low), "p80_ms": float(high), "passes": PASSES}
