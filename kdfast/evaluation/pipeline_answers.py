"""Answers as the question-answering pipeline of transformers 4 gave them, from logits.

It ranks by probabilities, where answers.py ranks by sums of logits over a question's windows: each
window has a softmax of its own. numpy only: nothing here knows a model.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import Any

import numpy as np

from kdfast.data.windows import Windows
from kdfast.evaluation.answers import check_logits
from kdfast.evaluation.reader_settings import ReaderSettings
from kdfast.evaluation.spans import TokenScores, top_spans
from kdfast.tokenizers.encode import ragged, starts_of
from kdfast.tokenizers.word_offsets import WordOffsets

Answer = dict[str, Any]  # "score", "start", "end", "answer"
Answers = Answer | list[Answer]

# The answer to a question whose context has no token at all.
NOTHING: Answer = {"score": 0.0, "start": 0, "end": 0, "answer": ""}


def pipeline_answers(
    windows: Windows,
    logits: np.ndarray,
    contexts: list[str],
    words: WordOffsets,
    text_of: np.ndarray,
    settings: ReaderSettings,
) -> list[Answers]:
    """For each question its answer, or a list of at most top_k of them, the most probable first.

    An answer is {"score", "start", "end", "answer"}, the last being context[start:end]. Its score:
    in each window, a softmax over the first token and the context's tokens of the start logits,
    and one of the end logits; a span's probability is the product of its two, and spans have at
    most max_answer_len tokens. A window proposes its 2 top_k + 10 most probable spans (top_k of
    them without align_to_words), and proposals that differ in case at most are one answer: that
    of the earliest window's most probable one, with the sum of their probabilities as its score,
    which so may exceed 1. With handle_impossible_answer the answer "" joins them, with the lowest
    probability over the windows that both ends are the first token.

    A single answer is given as such, without a list, at any top_k.

    Args:
        windows: Of the questions.
        logits: float (tokens, 2), flat like windows.input_ids.
        contexts: One for each question.
        words: Of the distinct contexts.
        text_of: int (questions,): which of these is the question's.
        settings: top_k, handle_impossible_answer, max_answer_len and align_to_words.

    Raises:
        UserError: For a logit that is NaN or +inf.

    Source: postprocess, select_starts_ends and decode_spans of
    transformers/pipelines/question_answering.py, 4.57.6. That takes float32 for the softmax, this
    float64. Where a window has fewer spans than it is to propose, that fills up with spans of
    probability 0 over other tokens, this has only real ones; a context without a token has the
    answer "" with the score 0. And a first token that a question holds once more, as in a question
    about "<s>", has no part in the softmax here.
    """
    check_logits(windows, logits)
    question = np.asarray(windows.question, dtype=np.int64)
    count = np.asarray(windows.count, dtype=np.int64)
    probability, begin = _probabilities(windows, logits, count)
    longest = int(min(settings.max_answer_len, count.max(initial=1)))
    top_k = settings.top_k
    proposals = 2 * top_k + 10 if settings.align_to_words else top_k
    each = np.arange(len(count))
    window, start, end = top_spans(
        TokenScores(probability[:, 0], probability[:, 1], begin + 1, count, each, len(count)),
        max_answer_length=max(1, longest),
        n_best_size=int(min(proposals, max(1, longest * count.max(initial=1)))),
        combine=np.multiply,
    )
    real = window >= 0
    window, start, end = window[real], start[real], end[real]
    score = probability[begin[window] + 1 + start, 0] * probability[begin[window] + 1 + end, 1]
    low = words.starts[text_of[question[window]]] + windows.first_token[window]
    if settings.align_to_words:
        high = low + count[window] - 1
        first, past = words.characters(low + start, low + end, low, high)
    else:
        first, past = words.offsets[low + start, 0], words.offsets[low + end, 1]

    null = np.full(len(contexts), np.inf)
    np.minimum.at(null, question, probability[begin].prod(axis=1))
    found: list[dict[str, Answer]] = [{} for _ in contexts]
    rows = zip(
        question[window].tolist(), score.tolist(), first.tolist(), past.tolist(), strict=True
    )
    for q, proposed in groupby(rows, key=lambda row: row[0]):
        found[q] = _merged(contexts[q], proposed)
    result: list[Answers] = []
    for merged, null_score in zip(found, null.tolist(), strict=True):
        answers = list(merged.values())
        if settings.handle_impossible_answer:
            answers.append({**NOTHING, "score": null_score})
        answers = sorted(
            answers or [dict(NOTHING)], key=lambda answer: answer["score"], reverse=True
        )[:top_k]
        result.append(answers[0] if len(answers) == 1 else answers)
    return result


def _probabilities(
    windows: Windows, logits: np.ndarray, count: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """float64 (n, 2): for each window those of its first token and then of its context's tokens;
    and where each window begins in them."""
    head = np.asarray(windows.window_start)[:-1]
    runs = np.stack([np.ones_like(count), count], 1).ravel()
    where = ragged(np.stack([head, head + windows.prefix], 1).ravel(), runs)
    begin = starts_of(count + 1)[:-1]
    result = logits[where].astype(np.float64)
    result -= np.repeat(np.maximum.reduceat(result, begin), count + 1, axis=0)
    np.exp(result, out=result)
    result /= np.repeat(np.add.reduceat(result, begin), count + 1, axis=0)
    return result, begin


def _merged(context: str, proposed: Iterable[tuple[int, float, int, int]]) -> dict[str, Answer]:
    """One question's answers by their text in lower case, in the order of their first proposal."""
    answers: dict[str, Answer] = {}
    for _, score, start, end in proposed:
        text = context[start:end]
        known = answers.get(text.lower())
        if known is None:
            answers[text.lower()] = {"score": score, "start": start, "end": end, "answer": text}
        else:
            known["score"] += score
    return answers
