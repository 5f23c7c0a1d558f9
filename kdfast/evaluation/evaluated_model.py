"""A reader under evaluation: how it is loaded, what it makes of a set, what is written of that."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kdfast.common.errors import UserError
from kdfast.common.files import read_json_object
from kdfast.common.progress import reading_bar
from kdfast.common.ranks import Ranks
from kdfast.common.settings import LARGEST
from kdfast.config import WindowSettings
from kdfast.data.examples import Example
from kdfast.data.prepare import prepare_windows
from kdfast.data.read import read_examples
from kdfast.data.windows import Windows
from kdfast.evaluation import latency, metrics, scoring, tables
from kdfast.evaluation.settings import EvaluateConfig
from kdfast.evaluation.suites import EvaluationSet
from kdfast.models import load
from kdfast.models.checks import check_windows
from kdfast.models.save import RUN_FILE
from kdfast.teachers import cache
from kdfast.tokenizers.template import Template


@dataclass(frozen=True)
class Answered:
    """A reader's answers to a set, and their scores: over all, and of each question.

    null_threshold: math.inf where the reader may not abstain.
    """

    evaluation: scoring.Evaluation
    scores: metrics.QuestionScores
    windows: Windows
    null_threshold: float

    def question_lines(self) -> dict[str, dict[str, Any]]:
        """Question id -> its answer, the best span, null odds, exact and f1, 0 to 1."""
        scores, answers = self.scores, self.evaluation.answers
        return {
            key: {
                "answer": answers.predictions[key],
                "best_span": answers.never_null[key],
                "null_odds": answers.null_odds[key],
                "exact": float(exact),
                "f1": float(f1),
            }
            for key, exact, f1 in zip(scores.ids, scores.exact, scores.f1, strict=True)
        }


class Contender:
    """The model of folder or hub id `name`, on `device`; `role` is the flag that named it."""

    def __init__(
        self,
        config: EvaluateConfig,
        name: str,
        role: str,
        device: torch.device,
        precision: str,
        ranks: Ranks,
    ):
        loaded = load.load_reader(name, role)
        self.config, self.name, self.ranks = config, name, ranks
        folder = load.local_folder(name, role)
        for note in loaded.notes:
            self.ranks.warn(note)
        self.windows = self._choose_windows(loaded, folder)
        load.check_fits(loaded, self.windows["max_seq_length"], name)
        self.device, self.precision = device, precision
        self.tokenizer = loaded.tokenizer
        self.model = loaded.model.to(device)
        self.weights = cache.weights_key(folder)

    def answer(
        self, each: EvaluationSet, examples: list[Example], null_threshold: float
    ) -> Answered:
        """Its answers to the questions of a set, which are `examples`, scored by the set's rule."""
        config = self.config
        windows = self._windows(each.source)
        for note in windows.notes(training=False):
            self.ranks.warn(f"{self.name}: {note}")
        validation = scoring.Validation(
            windows=windows,
            examples=examples,
            max_answer_length=config.max_answer_length,
            n_best_size=config.n_best_size,
            null_threshold=null_threshold,
            rule=each.rule,
        )
        evaluation = validation.score(self.model, self.device, self.precision, self.ranks)
        found = evaluation.answers
        scores = metrics.question_scores(
            metrics.gold_answers(examples), found.never_null, each.rule.best_scores
        )
        scores = metrics.apply_threshold(scores, found.null_odds, null_threshold)
        return Answered(evaluation, scores, windows, null_threshold)

    def null_threshold(self) -> float:
        """The threshold of the settings: given, fitted on other data, or 0.

        Raises UserError for a result without one, for that of one reader where there are two, and
        where the reader does best by abstaining always: the official script names that 0.
        """
        config = self.config
        name = config.null_threshold_from
        if name is None:
            return 0.0 if config.null_threshold is None else config.null_threshold
        content = read_json_object(Path(name).expanduser())
        figures = content.get("metrics", content)
        if isinstance(figures, dict) and "best_f1_thresh" in figures:
            if config.compare:
                raise UserError(
                    f"--null_threshold_from {name} is the result of one reader, and --compare "
                    "makes two: give data, on which each gets its own threshold."
                )
        elif "metrics" in content or "sets" in content:
            raise UserError(
                f"--null_threshold_from {name} holds no best_f1_thresh: give the result of one set."
            )
        else:
            self.ranks.warn(f"{self.name}: looking for the best threshold on {name}")
            examples = read_examples(name, split="validation")
            figures = self.answer(config.own_set(name), examples, 0.0).evaluation.metrics
        names = ("best_f1_thresh", "best_f1", "total")
        if not all(type(figures.get(each)) in (int, float) for each in names):
            raise UserError(
                f"--null_threshold_from {name} holds a best_f1_thresh without best_f1 and total: "
                "give the result of an evaluation."
            )
        if figures["best_f1"] <= 100.0 * figures.get("NoAns_total", 0) / figures["total"]:
            raise UserError(
                f"--null_threshold_from {name}: {self.name} does best there by answering nothing, "
                "so there is no threshold to take: give one by --null_threshold."
            )
        return figures["best_f1_thresh"]

    def describe(self, source: str) -> dict[str, Any]:
        """Name, type, size, weights and latency, the last measured on the questions of `source`."""
        return {
            "name": self.name,
            "type": self.model.reader.config.model_type,
            "parameters": sum(each.numel() for each in self.model.parameters()),
            "weights_sha256": self.weights,
            "windows": self.windows,
            "latency": {
                "data": source,
                **latency.measure(self.model, self._windows(source), self.device, self.precision),
            },
        }

    def _windows(self, source: str) -> Windows:
        config = self.config
        windows = prepare_windows(
            source,
            self.tokenizer,
            WindowSettings(**self.windows),
            split="validation",
            cache_dir=config.cache_path,
            progress=reading_bar(source),
        )
        longest = self.windows["max_seq_length"]
        check_windows(self.model.reader, windows, longest, config.cache_path)
        return windows

    def _choose_windows(self, loaded: load.Loaded, folder: Path) -> dict[str, int]:
        """The window settings; says them where neither flags nor the usual values decide."""
        is_part = folder.name in ("best", "last") or folder.name.startswith("checkpoint-")
        run = (folder.parent if is_part else folder) / RUN_FILE
        trained = read_json_object(run).get("config")
        trained = trained if isinstance(trained, dict) else {}
        longest = load.longest_input(loaded, self.name)
        special = Template.learn(loaded.tokenizer).size
        found = self.config.window_settings(trained, longest, special)
        if found != self.config.window_settings({}, LARGEST, special):
            said = "  ".join(f"{name} {value}" for name, value in found.items())
            of_run = f", as in {run}" * bool(trained)
            least = f", as it reads {longest} tokens" * (found["max_seq_length"] == longest)
            self.ranks.warn(f"{self.name}: {said}{of_run}{least}")
        return found


def result_of(each: EvaluationSet, answered: Sequence[Answered]) -> dict[str, Any]:
    """What is written of a set that one reader, or two, have answered: the first one's figures, and
    under "compared" the other's and the difference."""
    own = answered[0]
    result = {
        "name": each.name,
        "dataset": each.dataset,
        "config": each.config,
        "split": each.split,
        "revision": each.revision,
        "file": each.file,
        "language": each.language,
        "metric": each.rule.name,
        "windows": len(own.windows),
        **figures_of(own),
        "intervals": tables.intervals(own.scores),
    }
    if each.by_original:
        result["worst_forms"] = tables.worst_forms(own.scores)
    if len(answered) > 1:
        difference = tables.comparison(own.scores, answered[1].scores)
        result["compared"] = {**figures_of(answered[1]), "difference": difference}
    return result


def figures_of(answered: Answered) -> dict[str, Any]:
    """A reader's figures on a set; null_threshold None: it may not abstain there."""
    threshold = answered.null_threshold
    return {
        "metrics": answered.evaluation.metrics,
        "null_threshold": threshold if math.isfinite(threshold) else None,
        "windows_per_second": answered.evaluation.windows_per_second,
    }


def questions_of(answered: Sequence[Answered]) -> dict[str, dict[str, Any]]:
    """Question id -> what the first reader made of it, and under "compared" what the other did."""
    lines = answered[0].question_lines()
    for other in answered[1:]:
        for key, line in other.question_lines().items():
            lines[key]["compared"] = line
    return lines
