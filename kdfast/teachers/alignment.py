"""Distributions over a teacher's tokens, aligned to the tokens of a student's other tokenizer.

The teacher has read each window of the student in one or several windows of its own (rewindow.py).
The probability of a start at a token goes to the student's token that holds the token's first
character, that of an end to the one that holds its last; where none does, to the nearest one of
the question, or of the window's context. Special tokens go to their counterparts: before the
question ("no answer" is the very first), between, after. What has no counterpart goes to "no
answer".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from kdfast.data.windows import Windows
from kdfast.teachers.char_spans import CharSpans, spans_of
from kdfast.teachers.rewindow import Rewindowed
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
class Aligner:
    """Aligns a teacher's distributions over its own windows to the windows of a student.

    student: the student's windows. teacher: the same, rewindowed. The templates tell the special
    tokens of each.
    """

    student: Windows
    teacher: Rewindowed
    student_template: Template
    teacher_template: Template

    def align(self, logits: np.ndarray, begin: int, end: int, temperature: float) -> np.ndarray:
        """Align softmax(logits / temperature) to the student's windows begin to end - 1.

        logits: (teacher's tokens, 2), flat as teacher.windows.input_ids. Returns float64 (tokens,
        2), flat as these windows of the student; in each, either column sums to 1.
        """
        rows, starts = merged(self.teacher, logits, begin, end)
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
        low, size = context_span(self.teacher, begin, end)
        prefix = self.teacher.windows.prefix[self.teacher.first[begin:end]]
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
        source = spans_of(self.teacher.windows, part, texts)
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


def context_span(teacher: Rewindowed, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """What the teacher reads of the contexts of the student's windows begin to end - 1.

    int64 (n,) each: the first of its tokens, and how many there are.
    """
    first, last = teacher.first[begin:end], teacher.first[begin + 1 : end + 1] - 1
    low = teacher.windows.first_token[first].astype(np.int64)
    return low, teacher.windows.first_token[last] + teacher.windows.count[last] - low


def merged(
    teacher: Rewindowed, logits: np.ndarray, begin: int, end: int
) -> tuple[np.ndarray, np.ndarray]:
    """Logits of the student's windows begin to end - 1, as if the teacher read each in one window.

    Returns float64 (tokens, 2) and int64 (n + 1,), where each window begins. Logits are relative
    to that of "no answer" in their own window, which makes windows comparable. A token of the
    context has its logit from the window in which it has most context; question and special
    tokens, which are in every window, have their mean.
    """
    windows = teacher.windows
    bounds = teacher.first[begin : end + 1]
    each = slice(bounds[0], bounds[-1])
    starts = windows.window_start[bounds[0] : bounds[-1] + 1]
    rows = logits[starts[0] : starts[-1]].astype(np.float64)
    starts = starts - starts[0]
    lengths = np.diff(starts)
    rows -= np.repeat(rows[starts[:-1]], lengths, axis=0)
    per_window = np.diff(bounds)
    if len(lengths) == len(per_window):
        return rows, starts

    low, size = context_span(teacher, begin, end)
    window = np.repeat(np.arange(end - begin), per_window)
    count = windows.count[each].astype(np.int64)
    prefix = windows.prefix[each].astype(np.int64)
    first = windows.first_token[each] - low[window]
    # Neighbours meet in the middle of what they share.
    own_first, own_past = first.copy(), first + count
    left = np.flatnonzero(window[1:] == window[:-1])
    own_first[left + 1] = own_past[left] = (first[left + 1] + (first + count)[left]) // 2
    other = (lengths - count)[bounds[:-1] - bounds[0]]
    whole = starts_of(other + size)

    read = np.repeat(np.arange(len(lengths)), lengths)  # the window of the teacher that it is in
    token = np.arange(len(rows)) - (starts[:-1] + prefix)[read]  # 0: the first of the context there
    after = token >= count[read]
    inside = (token >= 0) & ~after
    token += np.where(inside, first[read], np.where(after, (size[window] - count)[read], 0))
    owned = (token >= own_first[read]) & (token < own_past[read])
    share = np.where(inside, owned, (1 / per_window)[window][read])
    place = token + (whole[:-1][window] + prefix)[read]
    columns = [np.bincount(place, weights=c * share, minlength=whole[-1]) for c in rows.T]
    return np.stack(columns, axis=1), whole


def token_map(source: CharSpans, target: CharSpans) -> tuple[np.ndarray, np.ndarray]:
    """For each token of `source` the token of `target` that holds its first and its last character.

    Both hold the same texts, cut by two tokenizers. Returns (first, last), int64 (source tokens,):
    tokens counted in their text; 0 where none of `target` holds a character there.

    Where no token holds the character, the nearest counts; halfway between two, the later for
    `first` and the earlier for `last`. Of several that hold it, as do the bytes of an emoji, it is
    their first for `first` and their last for `last`.
    """
    solid, holders = target.solid, target.holders
    found = np.zeros((2, len(source.text)), dtype=np.int64)
    held = np.flatnonzero(np.diff(holders.starts)[source.text] > 0)
    text = source.text[held]
    char = holders.nearest_held(text, source.first[held], later=True)
    found[0, held] = solid[holders.ending_after(text, char)] - target.starts[text]
    char = holders.nearest_held(text, source.past[held] - 1, later=False)
    found[1, held] = solid[holders.beginning_after(text, char) - 1] - target.starts[text]
    return found[0], found[1]
