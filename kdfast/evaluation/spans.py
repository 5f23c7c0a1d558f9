"""The search for the best spans of groups of windows: exact, vectorised, in bounded memory.

It knows only scores of tokens. The caller says how two of them make a span's score.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kdfast.common.errors import UserError

# Cells of one dense block (windows x context tokens): a few arrays of this size stay in cache.
BLOCK_CELLS = 1 << 15

# Start and end scores to scores of spans, elementwise, in float64.
Combine = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class TokenScores:
    """Scores of the tokens of W windows, all windows after one another.

    Attributes:
        start, end: float (tokens,), without NaN or +inf.
        first, count: int (W,): where in these a window's tokens that may be answers begin, and how
            many they are.
        group: int (W,), from 0 to groups - 1. Windows of one group (a question) compete.
        groups: How many there are.
    """

    start: np.ndarray
    end: np.ndarray
    first: np.ndarray
    count: np.ndarray
    group: np.ndarray
    groups: int


class TopSpans(NamedTuple):
    """Window, start and end of spans, each int64 (groups, n), best first, -1 where there are fewer.

    start and end count from the window's token `first`.
    """

    window: np.ndarray
    start: np.ndarray
    end: np.ndarray


@dataclass(frozen=True)
class _Block:
    """W windows of whole groups: start and end scores float64 (W, width), -inf to the right of a
    window's tokens; count and group (W,)."""

    start: np.ndarray
    end: np.ndarray
    count: np.ndarray
    group: np.ndarray
    groups: int


def top_spans(
    scores: TokenScores, *, max_answer_length: int, n_best_size: int, combine: Combine
) -> TopSpans:
    """The best spans of every group of windows: an exact search over all spans of a window.

    A span has at most max_answer_length tokens and a score above -inf. Equal scores: the lower
    window first, then the lower start, then the shorter span.

    Args:
        combine: Must not decrease in either score (np.add for logits, np.multiply for
            probabilities).

    Raises:
        UserError: For a length or a size below 1.
    """
    if max_answer_length < 1 or n_best_size < 1:
        raise UserError(
            "max_answer_length and n_best_size must be at least 1, "
            f"but are {max_answer_length} and {n_best_size}"
        )
    count, group, groups = scores.count, scores.group, scores.groups
    found = np.full((3, groups, n_best_size), -1, dtype=np.int64)
    order = np.argsort(group, kind="stable")
    # The windows of group g are order[edge[g] : edge[g + 1]].
    edge = np.searchsorted(group[order], np.arange(groups + 1))
    limit = BLOCK_CELLS // max(1, int(count.max(initial=0)))
    begin = 0
    while begin < groups:
        # As many whole groups as fit in a block, but at least one.
        stop = int(np.searchsorted(edge, edge[begin] + limit, side="right")) - 1
        stop = min(max(stop, begin + 1), groups)
        rows = order[edge[begin] : edge[stop]]
        block = _Block(*_dense(scores, rows), count[rows], group[rows] - begin, stop - begin)
        row, start, end = _top_of_block(block, max_answer_length, n_best_size, combine)
        real = row >= 0
        found[0, begin:stop][real] = rows[row[real]]
        found[1:, begin:stop] = start, end
        begin = stop
    return TopSpans(found[0], found[1], found[2])


def _dense(scores: TokenScores, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Start and end scores of some windows, as a _Block has them."""
    count = scores.count[rows]
    column = np.arange(int(count.max(initial=0)))
    inside = column < count[:, None]
    where = scores.first[rows, None] + column
    np.minimum(where, max(0, len(scores.start) - 1), out=where)
    start = scores.start[where].astype(np.float64)
    end = scores.end[where].astype(np.float64)
    start[~inside] = end[~inside] = -np.inf
    return start, end


def _top_of_block(block: _Block, longest: int, n: int, combine: Combine) -> np.ndarray:
    """`top_spans` of one block. Returns row, start, end as int64 (3, groups, n).

    Why few starts are enough: a start's best span is its own score with the best end it can reach.
    If n starts have a best span that goes before this start's best one, then n spans go before
    every span of this start. So only the n best starts of a group are paired with all their ends.
    """
    start, end, count = block.start, block.end, block.count
    group, groups = block.group, block.groups
    found = np.full((3, groups, n), -1, dtype=np.int64)
    width = start.shape[1]
    longest = min(longest, width)
    with np.errstate(invalid="ignore"):
        peak = combine(start, _running_maximum(end, longest))
    peak[np.arange(width) >= count[:, None]] = -np.inf
    row, column = np.nonzero(_best_columns(peak, n))
    order, rank = _ranked(group[row], peak[row, column], groups)
    # Back in reading order, so that of two equal spans the first one is the one to prefer.
    chosen = np.sort(order[rank < n])
    row, column = row[chosen], column[chosen]
    if not len(row):
        return found

    reach = column[:, None] + np.arange(longest)
    with np.errstate(invalid="ignore"):
        scores = combine(
            start[row, column][:, None], end[row[:, None], np.minimum(reach, width - 1)]
        )
    scores[reach >= count[row][:, None]] = -np.inf
    owner = group[row]
    slot = _place(owner, groups)
    table = np.full((groups, int(slot.max()) + 1, longest), -np.inf)
    table[owner, slot] = scores
    entry = np.zeros(table.shape[:2], dtype=np.int64)
    entry[owner, slot] = np.arange(len(row))

    cells = table.reshape(groups, -1)
    owner, cell = np.nonzero(_best_columns(cells, n))
    order, rank = _ranked(owner, cells[owner, cell], groups)
    owner, cell = owner[order], cell[order]
    source = entry[owner, cell // longest]
    found[0, owner, rank] = row[source]
    found[1, owner, rank] = column[source]
    found[2, owner, rank] = column[source] + cell % longest
    return found


def _running_maximum(values: np.ndarray, length: int) -> np.ndarray:
    """(W, width): the maximum of each cell and the length - 1 to its right, as far as they go."""
    best = values.copy()
    covered = 1
    while covered < length:
        step = min(covered, length - covered)
        np.maximum(best[:, :-step], best[:, step:], out=best[:, :-step])
        covered += step
    return best


def _best_columns(scores: np.ndarray, n: int) -> np.ndarray:
    """(rows, columns) bool: each row's n best cells above -inf, of equal ones the leftmost."""
    columns = scores.shape[1]
    if n >= columns:
        return scores > -np.inf
    last = np.partition(scores, columns - n, axis=1)[:, columns - n, None]
    keep = scores >= last
    crowded = np.flatnonzero(keep.sum(axis=1) > n)
    if len(crowded):
        above = scores[crowded] > last[crowded]
        tied = keep[crowded] & ~above
        room = n - above.sum(axis=1, keepdims=True)
        keep[crowded] = above | (tied & (tied.cumsum(axis=1) <= room))
    return keep & (scores > -np.inf)


def _ranked(group: np.ndarray, scores: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """An order by group, then falling score, then index; and every ordered item's group rank."""
    order = np.lexsort((-scores, group))
    return order, _place(group[order], groups)


def _place(group: np.ndarray, groups: int) -> np.ndarray:
    """The place of each item among those of its group; `group` does not decrease."""
    return np.arange(len(group)) - np.searchsorted(group, np.arange(groups))[group]
