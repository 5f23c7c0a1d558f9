"""What is written of a set: figures, intervals, the worst of perturbed forms, comparisons, a table.

Records are plain values for JSON. Figures are percentages, differences points.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from kdfast.common.errors import printable
from kdfast.evaluation import bootstrap
from kdfast.evaluation.evaluated_model import SetResult
from kdfast.evaluation.metrics import QuestionScores
from kdfast.evaluation.suites import EvaluationSet

# Headings of the table, and the figures under them.
COLUMNS = {
    "EM": "exact",
    "F1": "f1",
    "HasAns F1": "HasAns_f1",
    "NoAns F1": "NoAns_f1",
    "best F1": "best_f1",
}


def set_record(each: EvaluationSet, results: Sequence[SetResult]) -> dict[str, Any]:
    """The figures of the first model on a set; under "compared" the second's and the difference."""
    own = results[0]
    record = {
        "name": each.name,
        "dataset": each.dataset,
        "config": each.config,
        "split": each.split,
        "revision": each.revision,
        "file": each.file,
        "language": each.language,
        "metric": each.rule.name,
        "windows": own.windows,
        **_model_figures(own),
        "intervals": intervals(own.scores),
    }
    if each.by_original:
        record["worst_forms"] = worst_forms(own.scores)
    for other in results[1:]:
        difference = comparison(own.scores, other.scores)
        record["compared"] = {**_model_figures(other), "difference": difference}
    return record


def question_records(results: Sequence[SetResult]) -> dict[str, dict[str, Any]]:
    """Question id -> answer, best span, null odds, exact and f1 (0 to 1) of the first model, and
    under "compared" those of the second."""
    records: dict[str, dict[str, Any]] = {}
    for result in results:
        scores, answers = result.scores, result.evaluation.answers
        for key, exact, f1 in zip(scores.ids, scores.exact, scores.f1, strict=True):
            record = {
                "answer": answers.predictions[key],
                "best_span": answers.never_null[key],
                "null_odds": answers.null_odds[key],
                "exact": float(exact),
                "f1": float(f1),
            }
            if key in records:
                records[key]["compared"] = record
            else:
                records[key] = record
    return records


def intervals(scores: QuestionScores) -> dict[str, list[float]]:
    """Figure -> [low, high]: exact and f1, and those of HasAns_ and NoAns_ where there are any.

    Questions with an answer and those without are each resampled by themselves.
    """
    values = _percent(scores)
    has_answer = np.array(scores.has_answer, dtype=bool)
    every = np.ones(len(values), dtype=bool)
    found: dict[str, list[float]] = {}
    for prefix, rows in (("", every), ("HasAns_", has_answer), ("NoAns_", ~has_answer)):
        if rows.any():
            ends = bootstrap.intervals(values[rows]).T.tolist()
            found |= {f"{prefix}exact": ends[0], f"{prefix}f1": ends[1]}
    return found


def worst_forms(scores: QuestionScores) -> dict[str, dict]:
    """metrics and intervals with one entry per original question, its worst form, itself included.

    The id of a perturbed form is the original's, a hyphen, and more. eval_squad.py, of the authors
    of the adversarial sets (robinjia/adversarial-squad), differs: to it a perturbed form counts
    even where the original went worse.
    """
    worst: dict[str, int] = {}
    for row, key in enumerate(scores.ids):
        original = key.split("-")[0]
        held = worst.setdefault(original, row)
        if (scores.f1[row], scores.exact[row]) < (scores.f1[held], scores.exact[held]):
            worst[original] = row
    values = _percent(scores)[list(worst.values())]
    exact, f1 = bootstrap.intervals(values).T.tolist()
    return {
        "metrics": {
            "exact": float(values[:, 0].mean()),
            "f1": float(values[:, 1].mean()),
            "total": len(values),
        },
        "intervals": {"exact": exact, "f1": f1},
    }


def comparison(scores: QuestionScores, other: QuestionScores) -> dict[str, dict]:
    """For exact and f1: how much better `scores` are than `other`, which are of the same questions.

    mean of the differences; its interval; p of a sign-flip permutation test; the questions that
    went better and worse. Raises ValueError where the questions differ.
    """
    if scores.ids != other.ids:
        raise ValueError("the two evaluations are of different questions")
    differences = _percent(scores) - _percent(other)
    ends = bootstrap.intervals(differences).T.tolist()
    return {
        name: {
            "mean": float(column.mean()),
            "interval": interval,
            "p": bootstrap.sign_flip_p(column),
            "better": int((column > 0).sum()),
            "worse": int((column < 0).sum()),
        }
        for name, column, interval in zip(("exact", "f1"), differences.T, ends, strict=True)
    }


def table(results: list[dict]) -> str:
    """Results of sets as Markdown: figures with their intervals, then comparisons if there are."""
    rows = [("set", "questions", *COLUMNS, "windows/s", "scored by")]
    for result in results:
        speed = f"{result['windows_per_second']:.1f}"
        rows.append((result["name"], *_figures(result), speed, scored_by(result)))
        if "worst_forms" in result:
            worst = _figures(result["worst_forms"])
            rows.append((f"{result['name']}, worst forms", *worst, "", scored_by(result)))
    tables = [_markdown(rows)]
    compared = [result for result in results if "compared" in result]
    if compared:
        rows = [("set", "EM more", "p", "F1 more", "p")]
        for result in compared:
            exact, f1 = (result["compared"]["difference"][name] for name in ("exact", "f1"))
            cells = [
                cell
                for each in (exact, f1)
                for cell in (_ranged(each["mean"], each["interval"], "+"), f"{each['p']:.4f}")
            ]
            rows.append((result["name"], *cells))
        tables.append(_markdown(rows))
    return "\n\n".join(tables)


def scored_by(result: dict) -> str:
    """The rule that a result file names; one of an earlier version names none, and had SQuAD's."""
    metric, language = result.get("metric", "squad"), result.get("language")
    return f"{metric} ({language})" if metric == "mlqa" else metric


def _model_figures(result: SetResult) -> dict[str, Any]:
    """null_threshold None: the model may not abstain there."""
    threshold = result.null_threshold
    return {
        "metrics": result.evaluation.metrics,
        "null_threshold": threshold if math.isfinite(threshold) else None,
        "windows_per_second": result.evaluation.windows_per_second,
    }


def _percent(scores: QuestionScores) -> np.ndarray:
    """(questions, 2) float64: exact and f1."""
    return 100.0 * np.array([scores.exact, scores.f1], dtype=np.float64).T


def _figures(result: dict) -> list[str]:
    metrics, ends = result["metrics"], result["intervals"]
    return [str(metrics["total"])] + [
        _ranged(metrics[name], ends.get(name)) if name in metrics else ""
        for name in COLUMNS.values()
    ]


def _ranged(figure: float, interval: list[float] | None, sign: str = "") -> str:
    if interval is None:
        return f"{figure:{sign}.2f}"
    return f"{figure:{sign}.2f} [{interval[0]:{sign}.2f}, {interval[1]:{sign}.2f}]"


def _markdown(rows: list[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(map(printable, row))} |" for row in rows]
    lines.insert(1, f"|:--{'|--:' * (len(rows[0]) - 1)}|")
    return "\n".join(lines)
