"""Evaluation: windows through a model, logits to answers, answers to the official figures."""

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from kdfast.common import heartbeat
from kdfast.common.errors import UserError
from kdfast.common.progress import passing_bar
from kdfast.common.run import Run
from kdfast.common.signals import StopSignals
from kdfast.data.batches import cut_by_tokens
from kdfast.data.examples import Example
from kdfast.data.windows import Windows
from kdfast.evaluation import answers, metrics
from kdfast.evaluation.metric_rules import SQUAD, MetricRule
from kdfast.models.inference import forward_tokens, forward_windows
from kdfast.models.span_model import SpanModel
from kdfast.models.window_loader import flat_positions


@dataclass(frozen=True)
class Measured:
    """One model on one set or several: metrics under SQuAD's official key names, and its speed.

    Of several sets "exact" and "f1" are means, and "total" is a sum; "files" has all of each.
    """

    metrics: dict[str, Any]
    windows_per_second: float


@dataclass(frozen=True)
class Evaluation(Measured):
    """One model on one set, with its answers."""

    answers: answers.Predictions


@dataclass(frozen=True)
class Validation:
    """Labelled questions, their windows, and how they are answered.

    null_threshold: a question whose best span scores more than this below its null answer is
    answered with "". best_by: the figure by which one evaluation is better than another. name: the
    file's. Raises UserError where the windows are of other questions.
    """

    windows: Windows
    examples: list[Example]
    max_answer_length: int
    n_best_size: int
    null_threshold: float = 0.0
    rule: MetricRule = SQUAD
    best_by: str = "f1"
    name: str = ""

    def __post_init__(self) -> None:
        if list(self.windows.question_ids) != [example.id for example in self.examples]:
            raise UserError(
                "The prepared features of the validation set are not of its questions: delete "
                "features/ in --cache_dir, and they are made again."
            )

    @property
    def key(self) -> str:
        """Names what figures are measured on: they compare only where it is the same."""
        by = "" if self.best_by == "f1" else f" {self.best_by}"
        return (
            f"{self.windows.key} {self.max_answer_length} {self.n_best_size} "
            f"{self.null_threshold} {self.rule.label}{by}"
        )

    def score(self, model: SpanModel, run: Run) -> Evaluation:
        """Let the model answer every question, and score the answers.

        Each of the run's ranks reads its share of the windows, and all return the same.

        Raises:
            UserError: For logits that are NaN or infinite.
        """
        found = self.score_unless_stopped(model, replace(run, stop=StopSignals()))
        assert found is not None  # nobody can ask this `stop`
        return found

    def score_unless_stopped(self, model: SpanModel, run: Run) -> Evaluation | None:
        """As `score`. None where run.stop cut one of the ranks short; run.stop.agreed says so."""
        ranks, stop = run.ranks, run.stop
        windows = self.windows
        # In the last row, the ranks that were cut short.
        logits = np.zeros((len(windows.input_ids) + 1, 2), dtype=np.float32)
        everything = np.arange(len(windows))
        max_tokens = forward_tokens(model, windows, run.device, run.dtype)
        batches = cut_by_tokens(everything, windows.lengths, max_tokens)
        batches = batches[ranks.rank :: ranks.count]
        started = time.perf_counter()
        passes = forward_windows(model, windows, batches, run.device, run.dtype)
        with passing_bar("evaluate", "window", sum(map(len, batches)), ranks.is_first) as bar:
            for indices, rows in passes:
                logits[flat_positions(windows, indices)] = rows
                bar.update(len(indices))
                heartbeat.report(f"window {indices[0]} of an evaluation")
                if stop.is_asked:
                    logits[-1] = 1
                    break
        logits = ranks.sum_array(torch.from_numpy(logits)).numpy()
        stop.agreed = stop.agreed or bool(logits[-1, 0])
        if stop.agreed:
            return None
        rate = len(windows) / (time.perf_counter() - started)
        spans = answers.best_spans(
            windows,
            logits[:-1],
            max_answer_length=self.max_answer_length,
            n_best_size=self.n_best_size,
        )
        found = answers.predictions(spans, windows, self.examples, self.null_threshold)
        # Best thresholds are looked for over never-null answers: else only lower ones could win.
        scores = metrics.score(
            metrics.gold_answers(self.examples),
            found.never_null,
            found.null_odds,
            self.null_threshold,
            self.rule.best_scores,
        )
        return Evaluation(scores, rate, found)


@dataclass(frozen=True)
class ValidationSets:
    """What a run is evaluated on: one set, or several."""

    sets: list[Validation]

    @property
    def key(self) -> str:
        """As that of a set."""
        return " + ".join(each.key for each in self.sets)

    def named(self) -> dict[str, Any]:
        """The rule of the one set; of several, each has its own in the figures."""
        return self.sets[0].rule.named() if len(self.sets) == 1 else {}

    def score(self, model: SpanModel, run: Run) -> Measured:
        """As that of a set."""
        return self._measured([each.score(model, run) for each in self.sets])

    def score_unless_stopped(self, model: SpanModel, run: Run) -> Measured | None:
        """As that of a set."""
        found = []
        for each in self.sets:
            evaluation = each.score_unless_stopped(model, run)
            if evaluation is None:
                return None
            found.append(evaluation)
        return self._measured(found)

    def _measured(self, found: list[Evaluation]) -> Measured:
        if len(found) == 1:
            return found[0]
        figures: dict[str, Any] = {
            name: sum(each.metrics[name] for each in found) / len(found) for name in ("exact", "f1")
        }
        figures["total"] = sum(each.metrics["total"] for each in found)
        figures["files"] = [
            {"file": own.name, **own.rule.named(), **each.metrics}
            for own, each in zip(self.sets, found, strict=True)
        ]
        windows = [len(each.windows) for each in self.sets]
        seconds = sum(
            count / each.windows_per_second for count, each in zip(windows, found, strict=True)
        )
        return Measured(figures, sum(windows) / seconds)


def line(scores: dict[str, Any]) -> str:
    """The figures of one evaluation on one line."""
    names = ("exact", "f1", "HasAns_exact", "HasAns_f1", "NoAns_f1", "best_f1")
    found = "  ".join(f"{name} {scores[name]:.2f}" for name in names if name in scores)
    each = [f"{own['file']}: {line(own)}" for own in scores.get("files", ())]
    return "; ".join([f"mean {found}", *each]) if each else found
