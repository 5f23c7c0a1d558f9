"""From the logits of windows to the best spans of every question, and from those to texts.

The ranking is by start + end logit, a question's null score the minimum over its windows.
numpy only: nothing here knows a model.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kdfast.common.errors import UserError
from kdfast.common.files import write_text
from kdfast.data.examples import Example
from kdfast.data.windows import Windows
from kdfast.evaluation.spans import TokenScores, top_spans

Entry = dict[str, Any]  # of an n-best list

# What HF's script answers where a question has not a single span with a text.
NO_SPAN: Entry = {"start_logit": 0.0, "end_logit": 0.0, "text": "empty"}


@dataclass(frozen=True)
class Spans:
    """The n best spans of each of Q questions, best first; -1 and -inf where there are fewer.

    window (Q, n) int64; start, end (Q, n) int64: first and last token, positions in the window.
    start_logit, end_logit (Q, n) float32.
    null_logits (Q, 2) float32: the first token's logits in the window whose sum of them is lowest.
    null_score (Q,) float64: their sum.
    """

    window: np.ndarray
    start: np.ndarray
    end: np.ndarray
    start_logit: np.ndarray
    end_logit: np.ndarray
    null_logits: np.ndarray
    null_score: np.ndarray


class Predictions(NamedTuple):
    """All by question id.

    predictions: the answer, "" where the null odds are above the threshold.
    nbest: entries with start_logit, end_logit, text, probability, best first, "" among them.
    null_odds: the null score less the best span's score.
    never_null: the best span's text. With null_odds it is what a best threshold is searched with.
    """

    predictions: dict[str, str]
    nbest: dict[str, list[Entry]]
    null_odds: dict[str, float]
    never_null: dict[str, str]


def best_spans(
    windows: Windows, logits: np.ndarray, *, max_answer_length: int = 30, n_best_size: int = 20
) -> Spans:
    """The n best spans of every question over all its windows, ranked by start + end logit.

    Spans lie within the window's context tokens. Sums are taken in float64, where those of two
    float32 neither overflow nor round to a tie.

    Args:
        logits: float (tokens, 2), flat like windows.input_ids.
        max_answer_length: Tokens in a span at most.
        n_best_size: Spans per question.

    Raises:
        ValueError: For a wrong shape.
        UserError: For a logit that is NaN or +inf.
    """
    window_start = np.asarray(windows.window_start)
    if logits.shape != (window_start[-1], 2):
        raise ValueError(f"logits must be ({window_start[-1]}, 2), but are {logits.shape}")
    check_logits(windows, logits)
    question = np.asarray(windows.question)
    questions = len(windows.question_ids)
    prefix = np.asarray(windows.prefix, dtype=np.int64)
    first, count = window_start[:-1] + prefix, np.asarray(windows.count)
    window, start, end = top_spans(
        TokenScores(logits[:, 0], logits[:, 1], first, count, question, questions),
        max_answer_length=max_answer_length,
        n_best_size=n_best_size,
        combine=np.add,
    )
    real = window >= 0
    start[real] += prefix[window[real]]
    end[real] += prefix[window[real]]
    span_logits = np.full((2, *window.shape), -np.inf, dtype=np.float32)
    span_logits[0][real] = logits[window_start[window[real]] + start[real], 0]
    span_logits[1][real] = logits[window_start[window[real]] + end[real], 1]
    null_logits, null_score = _lowest_null(logits[window_start[:-1]], question, questions)
    return Spans(window, start, end, span_logits[0], span_logits[1], null_logits, null_score)


def predictions(
    spans: Spans, windows: Windows, examples: Iterable[Example], null_threshold: float = 0.0
) -> Predictions:
    """Texts, probabilities and null odds, as HF's run_qa.py finds them with SQuAD 2.0.

    (postprocess_qa_predictions with version_2_with_negative, which says what the files hold.)
    An n-best list holds the n best of the spans and the null answer, and the null answer in any
    case; probabilities are a softmax over the list. A question without a span that has a text gets
    the text "empty" with logits 0. One departure: with n_best_size 1 HF finds only that text
    wherever the null answer is the best, here the list then has two entries.

    Args:
        examples: Those the windows were made from.
        null_threshold: Null odds above it make the answer "".

    Raises:
        ValueError: If an example is missing.
    """
    contexts = {example.id: example.context for example in examples}
    n_best = max(2, spans.window.shape[1])
    real = spans.window >= 0
    held = real.sum(axis=1).tolist()
    char_start, char_end = np.zeros((2, *real.shape), dtype=np.int64)
    char_start[real], char_end[real] = windows.char_span(
        spans.window[real], spans.start[real], spans.end[real]
    )
    result = Predictions({}, {}, {}, {})
    for q, key in enumerate(windows.question_ids):
        if key not in contexts:
            raise ValueError(f"the examples lack question {key!r} of the windows")
        context, n = contexts[key], held[q]
        texts = [
            context[a:b]
            for a, b in zip(char_start[q, :n].tolist(), char_end[q, :n].tolist(), strict=True)
        ]
        logits = zip(
            spans.start_logit[q, :n].tolist(), spans.end_logit[q, :n].tolist(), strict=True
        )
        entries = [
            {"start_logit": start, "end_logit": end, "text": text}
            for text, (start, end) in zip(texts, logits, strict=True)
        ]
        null_start, null_end = spans.null_logits[q].tolist()
        null = {"start_logit": null_start, "end_logit": null_end, "text": ""}
        best = next((entry for entry in entries if entry["text"]), None)

        listed = sorted([*entries, null], key=_score, reverse=True)[:n_best]
        if not any(entry is null for entry in listed):
            listed.append(null)
        if best is None:
            best = dict(NO_SPAN)
            listed.insert(0, best)
        _add_probabilities(listed)

        odds = float(spans.null_score[q]) - _score(best)
        result.predictions[key] = "" if odds > null_threshold else best["text"]
        result.nbest[key] = listed
        result.null_odds[key] = odds
        result.never_null[key] = best["text"]
    return result


def write_predictions(result: Predictions, folder: Path) -> None:
    """predictions.json, nbest_predictions.json and null_odds.json in an existing folder."""
    for name, content in (
        ("predictions.json", result.predictions),
        ("nbest_predictions.json", result.nbest),
        ("null_odds.json", result.null_odds),
    ):
        write_text(Path(folder) / name, json.dumps(content, indent=4) + "\n")


def _lowest_null(
    logits: np.ndarray, question: np.ndarray, questions: int
) -> tuple[np.ndarray, np.ndarray]:
    """(questions, 2) logits and (questions,) sums of each question's window of the lowest sum."""
    total = logits.astype(np.float64).sum(axis=1)
    order = np.lexsort((total, question))
    lowest = order[np.searchsorted(question[order], np.arange(questions))]
    return logits[lowest].astype(np.float32), total[lowest]


def check_logits(windows: Windows, logits: np.ndarray) -> None:
    """Raise UserError, naming the question, where a logit is NaN or +inf."""
    for begin in range(0, len(logits), 1 << 20):
        good = (logits[begin : begin + (1 << 20)] < np.inf).all(axis=1)
        if not good.all():
            token = begin + int(np.argmin(good))
            window = int(np.searchsorted(windows.window_start, token, side="right")) - 1
            key = windows.question_ids[int(windows.question[window])]
            raise UserError(
                f"the model's logits for question {key!r} hold NaN or infinity: its weights are "
                "broken, or its precision is too small for them (try fp32)"
            )


def _score(entry: Entry) -> float:
    return entry["start_logit"] + entry["end_logit"]


def _add_probabilities(entries: list[Entry]) -> None:
    top = max(map(_score, entries))
    weights = [math.exp(_score(entry) - top) for entry in entries]
    total = sum(weights)
    for entry, weight in zip(entries, weights, strict=True):
        entry["probability"] = weight / total
