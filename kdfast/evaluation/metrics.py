"""Exact match and F1 with the meaning of the official SQuAD 2.0 script, evaluate-v2.0.py.

Texts in, numbers out: nothing here knows windows, models or files. `best_scores` may be that of
another benchmark (`metric_rules`); how questions come together stays the same.

The official script stops with a KeyError when a question has no prediction, or a predicted
question no null odds. Here a question without a prediction is wrong at any threshold, also
where the right answer is "no answer", and counts in every total; `unmatched_ids` names such
questions so that a program can say so. Missing null odds are an error.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from numbers import Real

from kdfast.common.errors import UserError

PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLES = re.compile(r"\b(?:a|an|the)\b")

# (gold answers, prediction) -> exact and F1 of one question.
BestScores = Callable[[tuple[str, ...], str], tuple[float, float]]


@dataclass(frozen=True)
class QuestionScores:
    """One entry per question of the data, in its order.

    exact: 0 or 1; f1: 0 to 1. Plain Python numbers, not percentages; `numpy.asarray` suits them.
    has_answer: the data give an answer. predicted: a prediction exists (if not, both scores are 0).
    null: the prediction is the empty text.
    """

    ids: list[str]
    exact: list[float]
    f1: list[float]
    has_answer: list[bool]
    predicted: list[bool]
    null: list[bool]


def normalize_answer(text: str) -> str:
    """Lower case, no ASCII punctuation, no English article, single spaces; in this order.

    The order matters: "the-cat" loses its hyphen first and is then one word without an article.
    """
    text = text.lower().translate(PUNCTUATION)
    return " ".join(ARTICLES.sub(" ", text).split())


def best_scores(answers: tuple[str, ...], prediction: str) -> tuple[float, float]:
    """(exact, f1) of one prediction, each the best over the gold answers.

    Gold answers with nothing left after normalisation are dropped; where none is left, the empty
    text is the right one.
    """
    golds = list(filter(None, map(normalize_answer, answers))) or [""]
    guess = normalize_answer(prediction)
    words = guess.split()
    return int(guess in golds), max(_bag_f1(gold.split(), words) for gold in golds)


def gold_answers(examples: Iterable) -> dict[str, tuple[str, ...]]:
    """Question id -> the texts of its gold answers, () where it has none; for `score`.

    Raises UserError for an unlabelled question (`answers` is None): it cannot be scored.
    """
    gold = {}
    for example in examples:
        if example.answers is None:
            raise UserError(
                f"question {example.id!r} has no `answers`, so it cannot be scored: give every "
                "question an answers list (an empty one means unanswerable)"
            )
        gold[example.id] = tuple(answer.text for answer in example.answers)
    return gold


def unmatched_ids(
    gold: Mapping[str, tuple[str, ...]], predictions: Mapping[str, str]
) -> tuple[list[str], list[str]]:
    """(questions without a prediction, predictions of questions that the data do not have).

    The first are scored 0, the second are ignored; both in the order of their own file.
    """
    missing = [key for key in gold if key not in predictions]
    unknown = [key for key in predictions if key not in gold]
    return missing, unknown


def question_scores(
    gold: Mapping[str, tuple[str, ...]],
    predictions: Mapping[str, str],
    best_scores: BestScores = best_scores,
) -> QuestionScores:
    """Every question's best score over its gold answers, before any threshold.

    Raises UserError for a prediction that is not a text.
    """
    scores = QuestionScores([], [], [], [], [], [])
    exact: float
    overlap: float
    for key, answers in gold.items():
        prediction = predictions.get(key)
        if prediction is None and key not in predictions:
            exact, overlap = 0, 0
        elif not isinstance(prediction, str):
            raise UserError(
                f"the prediction of question {key!r} is {prediction!r}, not a text: "
                'write "" for no answer'
            )
        else:
            exact, overlap = best_scores(answers, prediction)
        scores.ids.append(key)
        scores.exact.append(exact)
        scores.f1.append(overlap)
        scores.has_answer.append(bool(answers))
        scores.predicted.append(key in predictions)
        scores.null.append(prediction == "")
    return scores


def apply_threshold(
    scores: QuestionScores, null_odds: Mapping[str, float], null_threshold: float
) -> QuestionScores:
    """The scores once every question with odds above the threshold is answered with no answer.

    Such a question scores 1 if the data have no answer to it and 0 if they have one, even if
    nothing is left of that answer after normalisation; a question without a prediction stays at 0.
    """
    exact, overlap = list(scores.exact), list(scores.f1)
    for i, key in enumerate(scores.ids):
        if scores.predicted[i] and null_odds[key] > null_threshold:
            exact[i] = overlap[i] = float(not scores.has_answer[i])
    return replace(scores, exact=exact, f1=overlap)


def score(
    gold: Mapping[str, tuple[str, ...]],
    predictions: Mapping[str, str],
    null_odds: Mapping[str, float] | None = None,
    null_threshold: float = 1.0,
    best_scores: BestScores = best_scores,
) -> dict[str, float]:
    """The official script's numbers under its key names; percentages are not rounded.

    gold: question id -> its gold answer texts, () for an unanswerable question.
    predictions: question id -> answer text, "" for no answer.
    null_odds: question id -> how much the model prefers no answer; a question whose odds are above
    `null_threshold` counts as answered with "". Without odds they are 0.0 everywhere, as in the
    official script, and the best_* keys are absent. HasAns_* and NoAns_* are absent where the data
    have no such question.

    The best_* keys mean what their name says only if the predictions are never null: with a
    prediction that is already "", no threshold brings the answer back.

    Raises UserError: no question, no question with a prediction, a prediction that is not a text,
    odds that are missing or not a number.
    """
    if not gold:
        raise UserError("the data hold no question: there is nothing to score")
    scores = question_scores(gold, predictions, best_scores)
    if not any(scores.predicted):
        raise UserError(
            "the predictions hold none of the data's question ids: they belong to another data set"
        )
    odds = dict.fromkeys(predictions, 0.0) if null_odds is None else null_odds
    _check_odds(scores, odds)

    final = apply_threshold(scores, odds, null_threshold)
    metrics = _summary(final, range(len(gold)))
    for prefix, wanted in (("HasAns", True), ("NoAns", False)):
        rows = [i for i, has_answer in enumerate(scores.has_answer) if has_answer is wanted]
        if rows:
            part = _summary(final, rows)
            metrics.update({f"{prefix}_{name}": value for name, value in part.items()})
    if null_odds is not None:
        for name, values in (("exact", scores.exact), ("f1", scores.f1)):
            best, threshold = _best_threshold(scores, values, odds)
            metrics[f"best_{name}"] = best
            metrics[f"best_{name}_thresh"] = threshold
    return metrics


def _bag_f1(gold: list[str], guess: list[str]) -> float:
    """F1 over two bags of normalised words; 1 if both are empty."""
    if not gold or not guess:
        return int(gold == guess)
    same = sum((Counter(gold) & Counter(guess)).values())
    if same == 0:
        return 0
    precision = same / len(guess)
    recall = same / len(gold)
    return (2 * precision * recall) / (precision + recall)


def _check_odds(scores: QuestionScores, null_odds: Mapping[str, float]) -> None:
    for key, predicted in zip(scores.ids, scores.predicted, strict=True):
        if predicted and key not in null_odds:
            raise UserError(
                f"question {key!r} has a prediction but no null odds: the two files must come "
                "from the same run"
            )
    for key, value in null_odds.items():
        # NaN has no place in an order, so no threshold would be the best one.
        if not isinstance(value, Real) or isinstance(value, bool) or math.isnan(value):
            raise UserError(f"the null odds of question {key!r} are {value!r}, not a number")


def _summary(scores: QuestionScores, rows: Iterable[int]) -> dict[str, float]:
    """Percentages over some questions. `sum`, in the data's order, rounds as the official does."""
    rows = list(rows)
    return {
        "exact": 100.0 * sum(scores.exact[i] for i in rows) / len(rows),
        "f1": 100.0 * sum(scores.f1[i] for i in rows) / len(rows),
        "total": len(rows),
    }


def _best_threshold(
    scores: QuestionScores, values: list[float], null_odds: Mapping[str, float]
) -> tuple[float, float]:
    """(best percentage, the threshold that gives it), as the official search finds them.

    It starts with every question unanswered, at a threshold named 0.0, and lets questions in by
    growing odds, equal odds in the order of `null_odds`. The first best point wins. Questions of
    equal odds are let in one by one, so the percentage found may be one that no threshold reaches:
    published figures are computed this way.
    """
    row = {key: i for i, key in enumerate(scores.ids) if scores.predicted[i]}
    current: float = sum(not scores.has_answer[i] for i in row.values())
    best, threshold = current, 0.0
    for key in sorted(null_odds, key=null_odds.__getitem__):
        if key not in row:
            continue
        i = row[key]
        if scores.has_answer[i]:
            current += values[i]
        elif not scores.null[i]:
            current -= 1
        if current > best:
            best, threshold = current, null_odds[key]
    return 100.0 * best / len(scores.ids), threshold
