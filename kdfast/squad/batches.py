"""The order of training: which windows a step takes, and the micro-batches inside the step."""

from itertools import pairwise

import numpy as np


class TrainingOrder:
    """Steps of `batch_size` windows from a new shuffle each epoch, keyed by (seed, epoch).

    windows: int array, the windows that take part. The last step of an epoch may be short.
    A step is a pure function of its number, so that a run can start anywhere.
    """

    def __init__(self, windows: np.ndarray, batch_size: int, seed: int):
        self.windows = windows
        self.batch_size = batch_size
        self.seed = seed
        self.steps_per_epoch = -(-len(windows) // batch_size)
        self._shuffled: tuple[int, np.ndarray] | None = None

    def step(self, step: int) -> np.ndarray:
        """The windows of optimizer step `step`, counted from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._shuffled is None or self._shuffled[0] != epoch:
            draw = np.random.default_rng([self.seed, epoch])
            self._shuffled = (epoch, draw.permutation(self.windows))
        start = place * self.batch_size
        return self._shuffled[1][start : start + self.batch_size]


def cut_by_tokens(windows: np.ndarray, lengths: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Micro-batches of windows of like length, longest first, of at most max_tokens each.

    windows: int array (n,); lengths: int array (n,), their tokens. A micro-batch costs its count
    times its longest window. A window longer than max_tokens stands alone. Windows of equal length
    keep their order, so the cuts depend on nothing else.
    """
    order = np.argsort(-lengths, kind="stable")
    descending = lengths[order]
    bounds = [0]
    while bounds[-1] < len(order):
        room = max(1, max_tokens // max(1, int(descending[bounds[-1]])))
        bounds.append(min(len(order), bounds[-1] + room))
    return [windows[order[start:end]] for start, end in pairwise(bounds)]


def cut_evenly(windows: np.ndarray, lengths: np.ndarray, parts: int) -> list[np.ndarray]:
    """min(parts, n) micro-batches of windows of like length, their counts equal to within one."""
    order = np.argsort(-lengths, kind="stable")
    return [windows[part] for part in np.array_split(order, min(parts, len(order)))]
