"""The order of training: which windows a step takes, and the micro-batches inside the step."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np


@dataclass(frozen=True)
class Share:
    """The windows of a file, int array (n,), and how often an epoch draws them: `weight` times."""

    windows: np.ndarray
    weight: float = 1.0

    @property
    def count(self) -> int:
        """How many windows an epoch draws."""
        return max(1, round(self.weight * len(self.windows)))

    def drawn(self, epoch: int, *key: int) -> np.ndarray:
        """Those of an epoch: the next `count` of an endless row of shuffles, keyed by `key`.

        So that none is drawn again before all others have been.
        """
        begin, length = epoch * self.count, len(self.windows)
        first, last = begin // length, (begin + self.count - 1) // length
        row = [
            # The closing 1 keeps it apart from the key of an epoch's order.
            np.random.default_rng([*key, number, 1]).permutation(self.windows)
            for number in range(first, last + 1)
        ]
        return np.concatenate(row)[begin - first * length :][: self.count]


class TrainingOrder:
    """Steps of `batch_size` windows from a new shuffle each epoch, keyed by (seed, epoch).

    shares: the windows that take part. The last step of an epoch may be short.
    A step is a pure function of its number, so that a run can start anywhere.
    """

    def __init__(self, shares: Sequence[Share], batch_size: int, seed: int):
        self.shares = shares
        self.batch_size = batch_size
        self.seed = seed
        self.steps_per_epoch = -(-sum(share.count for share in shares) // batch_size)
        self._shuffled: tuple[int, np.ndarray] | None = None

    def step(self, step: int) -> np.ndarray:
        """The windows of optimizer step `step`, counted from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._shuffled is None or self._shuffled[0] != epoch:
            draw = np.random.default_rng([self.seed, epoch])
            self._shuffled = (epoch, draw.permutation(self._drawn(epoch)))
        start = place * self.batch_size
        return self._shuffled[1][start : start + self.batch_size]

    def _drawn(self, epoch: int) -> np.ndarray:
        """The windows of an epoch. Sorted, so that how they were drawn decides nothing more."""
        drawn = [share.drawn(epoch, self.seed, n) for n, share in enumerate(self.shares)]
        return np.sort(np.concatenate(drawn))


@dataclass(frozen=True)
class MicroBatchPolicy:
    """How a step is cut into micro-batches: all that it depends on besides the windows' lengths.

    max_tokens: padded tokens in one micro-batch. A micro-batch of n windows of width L is taken to
    last overhead + n L (per_token + per_token_width L) seconds, forward and backward. parts: cut
    into so many equal micro-batches instead, or None. packed: there is no padding, and the
    fewest micro-batches that max_tokens allows are best.
    """

    max_tokens: int
    overhead: float
    per_token: float
    per_token_width: float
    parts: int | None = None
    packed: bool = False

    def cut(self, windows: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
        """The micro-batches of a step. windows: int array (n,); lengths: int array (n,)."""
        if self.packed:
            return cut_packed(windows, lengths, self.max_tokens, self.parts)
        if self.parts is not None:
            return cut_evenly(windows, lengths, self.parts)
        return cut_by_cost(windows, lengths, self)


def shard(
    windows: np.ndarray, lengths: np.ndarray, count: int, policy: MicroBatchPolicy
) -> list[np.ndarray]:
    """The windows of a step in `count` shares that cost about the same, some perhaps empty.

    Packed windows cost their tokens. A pure function of the lengths and the policy, so that every
    rank finds all shares by itself.
    """
    costs = lengths
    if not policy.packed:
        costs = lengths * (policy.per_token + policy.per_token_width * lengths)
    return [windows[share] for share in balance(costs, count)]


def balance(costs: np.ndarray, count: int) -> list[np.ndarray]:
    """`count` shares of range(len(costs)) whose costs have about the same sum, some perhaps empty.

    The largest cost left goes to the share that has cost least so far.
    """
    shares: list[list[int]] = [[] for _ in range(count)]
    least = [(0.0, number) for number in range(count)]
    for index in np.argsort(-costs, kind="stable").tolist():
        spent, number = heapq.heappop(least)
        shares[number].append(index)
        heapq.heappush(least, (spent + float(costs[index]), number))
    return [np.array(share, dtype=np.int64) for share in shares]


def cut_packed(
    windows: np.ndarray, lengths: np.ndarray, max_tokens: int, parts: int | None = None
) -> list[np.ndarray]:
    """As few micro-batches as hold max_tokens each, or min(parts, n), with about equal tokens.

    A window longer than max_tokens stands alone.
    """
    if len(windows) == 0:
        return []
    count = min(parts or -(-int(lengths.sum()) // max_tokens), len(windows))
    shares = balance(lengths, count)
    while parts is None and any(
        len(share) > 1 and lengths[share].sum() > max_tokens for share in shares
    ):
        count += 1
        shares = balance(lengths, count)
    return [windows[share] for share in shares]


def cut_by_cost(
    windows: np.ndarray, lengths: np.ndarray, policy: MicroBatchPolicy
) -> list[np.ndarray]:
    """The micro-batches, longest windows first, whose costs under `policy` have the least sum.

    A window longer than policy.max_tokens stands alone. Sorted by length, some best cut takes
    neighbours, so the best sum of the first j windows is that of the first i < j plus the cost of
    windows i to j - 1, whose width is the length of window i.
    """
    order = np.argsort(-lengths, kind="stable")
    widths = lengths[order].astype(np.float64)
    window_cost = widths * (policy.per_token + policy.per_token_width * widths)
    best = np.zeros(len(order) + 1)
    begin = np.zeros(len(order) + 1, dtype=np.int64)  # of the last micro-batch of the first j
    for end in range(1, len(order) + 1):
        most = max(1, int(policy.max_tokens // max(1.0, widths[end - 1])))
        first = max(0, end - most)
        count = np.arange(end - first, 0, -1)
        cost = best[first:end] + policy.overhead + count * window_cost[first:end]
        cost[(count * widths[first:end] > policy.max_tokens) & (count > 1)] = np.inf
        chosen = int(cost.argmin())
        best[end], begin[end] = cost[chosen], first + chosen
    batches = []
    end = len(order)
    while end:
        batches.append(windows[order[begin[end] : end]])
        end = begin[end]
    return batches[::-1]


def cut_by_tokens(
    windows: np.ndarray, lengths: np.ndarray, max_tokens: int, packed: bool = False
) -> list[np.ndarray]:
    """Micro-batches of windows of like length, longest first, filled up to max_tokens each.

    For a pass over a whole set, whose neighbours in the order of length hardly differ.
    windows: int array (n,); lengths: int array (n,), their tokens. A micro-batch costs its count
    times its longest window, or, packed, the tokens of all. A window longer than max_tokens stands
    alone. Windows of equal length keep their order, so the cuts depend on nothing else.
    """
    order = np.argsort(-lengths, kind="stable")
    descending = lengths[order]
    if packed:
        return cut_in_order(windows[order], descending, max_tokens)
    bounds = [0]
    while bounds[-1] < len(order):
        room = max(1, max_tokens // max(1, int(descending[bounds[-1]])))
        bounds.append(min(len(order), bounds[-1] + room))
    return [windows[order[start:end]] for start, end in pairwise(bounds)]


def cut_in_order(windows: np.ndarray, lengths: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Packed micro-batches of neighbours, filled up to max_tokens each.

    A window longer than max_tokens stands alone.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    bounds = [0]
    while (begin := bounds[-1]) < len(windows):
        fitting = np.searchsorted(ends, ends[begin] - lengths[begin] + max_tokens, side="right")
        bounds.append(max(begin + 1, int(fitting)))
    return [windows[start:end] for start, end in pairwise(bounds)]


def cut_evenly(windows: np.ndarray, lengths: np.ndarray, parts: int) -> list[np.ndarray]:
    """min(parts, n) micro-batches of windows of like length, their counts equal to within one."""
    order = np.argsort(-lengths, kind="stable")
    parts = min(parts, len(order))
    return [windows[part] for part in np.array_split(order, parts)] if parts else []
