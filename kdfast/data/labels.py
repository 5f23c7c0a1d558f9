"""The token labels of questions: where their answers begin and end in the context."""

from __future__ import annotations

import numpy as np

from kdfast.data.cache import UNLABELLED
from kdfast.data.examples import Example, Lost, first_place
from kdfast.data.tally import Tally
from kdfast.tokenizers.encode import Tokens


def find_labels(
    batch: list[Example], contexts: Tokens, local: np.ndarray, tally: Tally
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First and last token of each question's first answer that has a place in its context.

    Counted in the context. Both are -1 where there is no answer, or none that training may use
    (then trainable is False), and UNLABELLED where nobody said.

    The first token is the first one that ends after the answer's first character, the last
    token the last one that begins before its end: the tokens that hold the answer's outer
    characters, where any does.
    """
    n = len(batch)
    labelled = np.ones(n, dtype=bool)
    answered = np.zeros(n, dtype=bool)
    trainable = np.ones(n, dtype=bool)
    span = np.zeros((n, 2), dtype=np.int64)
    for i, example in enumerate(batch):
        if example.answers is None:
            labelled[i] = False
        elif example.answers:
            found = first_place(example.context, example.answers)
            if isinstance(found, Lost):
                trainable[i] = False
                tally.add(found.value, example.id)
                continue
            number, place = found
            answered[i] = True
            span[i] = place.start, place.end
            if number:
                tally.add("later_answer", example.id)
            if place.moved:
                tally.add("moved", example.id)
    # All contexts searched at once: each gets a range of keys of its own. The running maximum
    # keeps the keys sorted where a token begins before an earlier one.
    wide = 1 + max(len(e.context) for e in batch)
    owner = wide * np.repeat(np.arange(len(contexts.starts) - 1), np.diff(contexts.starts))
    ends = np.maximum.accumulate(owner + contexts.offsets[:, 1])
    begins = np.maximum.accumulate(owner + contexts.offsets[:, 0])
    base = contexts.starts[local]
    first = np.searchsorted(ends, wide * local + span[:, 0], side="right") - base
    last = np.searchsorted(begins, wide * local + span[:, 1], side="left") - 1 - base
    # No token holds any of it: characters that the tokenizer drops.
    lost = answered & ~((first >= 0) & (first <= last))
    trainable[lost] = False
    answered &= ~lost
    for unheld in np.flatnonzero(lost):
        tally.add("no_token", batch[unheld].id)
    tally.counts["unlabelled"] = int((~labelled).sum())
    tally.counts["unanswerable"] = int((labelled & ~answered & trainable).sum())
    none = np.where(labelled, -1, UNLABELLED)
    return np.where(answered, first, none), np.where(answered, last, none), trainable


def placed(position: np.ndarray, inside: np.ndarray, unlabelled: np.ndarray) -> np.ndarray:
    return np.where(unlabelled, UNLABELLED, np.where(inside, position, 0))
