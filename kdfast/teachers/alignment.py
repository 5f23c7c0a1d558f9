"""Distributions over a teacher's tokens, carried to the tokens of a student's other tokenizer.

The teacher has read each window of the student in one or several pieces (pieces.py). What its
start head gives a token goes to the student's token that holds the token's first character, what
its end head gives, to the one that holds its last; where none does, to the nearest one of the
question, or of the window's context. Special tokens go to their counterparts: before the question
("no answer" is the very first), between, after. What has no counterpart goes to "no answer".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from kdfast.data.windows import Windows
from kdfast.teachers.characters import spans_of, token_map
from kdfast.teachers.pieces import Pieces
from kdfast.tokenizers.encode import ragged, starts_of
from kdfast.tokenizers.template import Template

BEFORE, QUESTION, BETWEEN, CONTEXT, AFTER = range(5)


def softened(logits: np.ndarray, starts: np.ndarray, temperature: float) -> np.ndarray:
    """softmax(logits / temperature) of each window: float64 (tokens, 2).

    logits: (tokens, 2). starts: int64 (n + 1,), where the windows begin; none is empty.
    """
    lengths = np.diff(starts)
    scaled = logits.astype(np.float64) / temperature
    scaled -= np.repeat(np.maximum.reduceat(scaled, starts[:-1]), lengths, axis=0)
    weights = np.exp(scaled)
    return weights / np.repeat(np.add.reduceat(weights, starts[:-1]), lengths, axis=0)


@dataclass(frozen=True)
class Carrier:
    """Carries what a teacher says of its pieces to the windows of the student.

    The templates tell the special tokens of each.
    """

    student: Windows
    pieces: Pieces
    student_template: Template
    teacher_template: Template

    def probabilities(
        self, logits: np.ndarray, begin: int, end: int, temperature: float
    ) -> np.ndarray:
        """The carried softmax(logits / temperature) of the student's windows begin to end - 1.

        logits: (teacher's tokens, 2), flat as pieces.windows.input_ids. Returns float64 (tokens,
        2), flat as these windows of the student; in each, either column sums to 1.
        """
        rows, starts = merged(self.pieces, logits, begin, end)
        soft = softened(rows, starts, temperature)
        student = self.student.window_start[begin : end + 1]
        return np.stack(
            [
                np.bincount(target, weights=column, minlength=student[-1] - student[0])
                for target, column in zip(self._targets(begin, end), soft.T, strict=True)
            ],
            axis=1,
        )

    def _targets(self, begin: int, end: int) -> np.ndarray:
        """The student's token for each token of the merged windows, for start and for end.

        int64 (2, merged tokens), flat in the student's windows begin to end - 1.
        """
        student, span = self.student, slice(begin, end)
        low, size = context_span(self.pieces, begin, end)
        prefix = self.pieces.windows.prefix[self.pieces.first[begin:end]]
        source, sizes = _segments(self.teacher_template, prefix, size)
        target, room = _segments(self.student_template, student.prefix[span], student.count[span])
        windows = student.window_start[begin:end] - student.window_start[begin]
        source = source + starts_of(sizes.sum(axis=0))[:-1]

        found = np.empty((2, int(sizes.sum())), dtype=np.int64)
        for part, many in enumerate(sizes):
            window = np.repeat(np.arange(end - begin), many)
            if part == QUESTION:
                asked = student.question[span]
                place = self._holders("question", asked, 0 * low, many, 0 * low, room[part])
            elif part == CONTEXT:
                texts, first = student.context[span], student.first_token[span]
                place = self._holders("context", texts, low, many, first, room[part])
            else:
                place = np.minimum(ragged(0 * low, many), room[part][window] - 1)
            there = (room[part] > 0)[window]
            place = np.where(there, target[part][window] + place, 0)
            found[:, ragged(source[part], many)] = windows[window] + place
        return found

    def _holders(
        self,
        part: Literal["question", "context"],
        texts: np.ndarray,
        low: np.ndarray,
        many: np.ndarray,
        first: np.ndarray,
        room: np.ndarray,
    ) -> np.ndarray:
        """token_map for `many` tokens of each window's text, from its `low`-th on: int64 (2, n).

        Of the student's tokens those count that the window has, `room` from the text's `first`-th
        on, and it is counted from there. All arguments but `part`: int (windows,).
        """
        texts, local = np.unique(texts, return_inverse=True)
        source = spans_of(self.pieces.windows, part, texts)
        target = spans_of(self.student, part, texts)
        maps = np.stack(token_map(source, target))
        window = np.repeat(np.arange(len(low)), many)
        found = maps[:, ragged(source.starts[local] + low, many)] - first[window]
        if not len(target.solid):
            return 0 * found
        # What is outside of the window goes to the character that the window has at that end: a
        # start to the first token that holds it, an end to the last.
        base = target.starts[local] + first
        bounds = np.searchsorted(target.solid, np.stack([base, base + room]))
        holders, last = target.holders, len(target.solid) - 1
        least, most = np.minimum(bounds[0], last), np.maximum(bounds[1] - 1, 0)
        lowest = np.minimum(holders.beginning_after(local, holders.first[least]) - 1, most)
        highest = np.maximum(holders.ending_after(local, holders.past[most] - 1), least)
        low = target.solid[np.stack([least, np.maximum(lowest, 0)])] - base
        high = target.solid[np.stack([np.minimum(highest, last), most])] - base
        some = (bounds[0] < bounds[1])[window]
        return np.where(some, np.clip(found, low[:, window], high[:, window]), 0)


def _segments(
    template: Template, prefix: np.ndarray, count: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Where the five parts of windows begin in them, and their sizes: int64 (5, n) each.

    prefix: tokens before the context. count: tokens of the context.
    """
    before, between = len(template.before), len(template.between)
    sizes = np.zeros((5, len(prefix)), dtype=np.int64)
    sizes[BEFORE] = before
    sizes[QUESTION] = prefix - before - between
    sizes[BETWEEN] = between
    sizes[CONTEXT] = count
    sizes[AFTER] = len(template.after)
    return np.cumsum(sizes, axis=0) - sizes, sizes


def context_span(pieces: Pieces, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """What the pieces of the student's windows begin to end - 1 hold of the teacher's context.

    int64 (n,) each: the first token, and how many there are.
    """
    first, last = pieces.first[begin:end], pieces.first[begin + 1 : end + 1] - 1
    low = pieces.windows.first_token[first].astype(np.int64)
    return low, pieces.windows.first_token[last] + pieces.windows.count[last] - low


def merged(
    pieces: Pieces, logits: np.ndarray, begin: int, end: int
) -> tuple[np.ndarray, np.ndarray]:
    """Logits of the student's windows begin to end - 1, each as if read in one piece.

    Returns float64 (tokens, 2) and int64 (n + 1,), where each window begins. Logits are relative
    to that of "no answer" in their piece, which makes pieces comparable. A token of the context
    has its logit from the piece in which it has most context; question and special tokens, which
    are in every piece, have their mean.
    """
    teacher = pieces.windows
    bounds = pieces.first[begin : end + 1]
    each = slice(bounds[0], bounds[-1])
    starts = teacher.window_start[bounds[0] : bounds[-1] + 1]
    rows = logits[starts[0] : starts[-1]].astype(np.float64)
    starts = starts - starts[0]
    lengths = np.diff(starts)
    rows -= np.repeat(rows[starts[:-1]], lengths, axis=0)
    per_window = np.diff(bounds)
    if len(lengths) == len(per_window):
        return rows, starts

    low, size = context_span(pieces, begin, end)
    window = np.repeat(np.arange(end - begin), per_window)
    count = teacher.count[each].astype(np.int64)
    prefix = teacher.prefix[each].astype(np.int64)
    first = teacher.first_token[each] - low[window]
    # Neighbours meet in the middle of what they share.
    own_first, own_past = first.copy(), first + count
    left = np.flatnonzero(window[1:] == window[:-1])
    own_first[left + 1] = own_past[left] = (first[left + 1] + (first + count)[left]) // 2
    beside = (lengths - count)[bounds[:-1] - bounds[0]]
    whole = starts_of(beside + size)

    piece = np.repeat(np.arange(len(lengths)), lengths)
    token = np.arange(len(rows)) - (starts[:-1] + prefix)[piece]  # 0: the piece's first of context
    after = token >= count[piece]
    inside = (token >= 0) & ~after
    token += np.where(inside, first[piece], np.where(after, (size[window] - count)[piece], 0))
    owned = (token >= own_first[piece]) & (token < own_past[piece])
    share = np.where(inside, owned, (1 / per_window)[window][piece])
    place = token + (whole[:-1][window] + prefix)[piece]
    columns = [np.bincount(place, weights=c * share, minlength=whole[-1]) for c in rows.T]
    return np.stack(columns, axis=1), whole
