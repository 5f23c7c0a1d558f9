"""What a student learns from when no teacher's raw logits will do: averages, other tokenizers.

A derived cache has the files of a teacher's cache (teacher.py), and holds z = T log p + c, so that
softmax(z / T) = p: p is the average of the teachers' distributions, softened at the temperature T
of the run and carried to the student's tokens. c makes the largest z of each head of a window 0.

p may be 0, as for a token that no teacher's token goes to, and z is finite: what is less than
exp(-FLOOR) of the largest p counts as that much. All tokens of a window that are raised so have
less than 1e-9 of its mass. fp16 rounds z by 2^-12 of it at most, so p by 2^-12 log(p / largest p)
of itself: 0.2 % where p is a thousandth of the largest.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from kdfast.common.errors import UserError
from kdfast.common.ranks import Ranks
from kdfast.data.windows import Windows
from kdfast.teachers import cache

FLOOR = 30.0
# (begin, end) -> float64 (tokens, 2), the distributions of these windows of the student.
Probabilities = Callable[[int, int], np.ndarray]


@dataclass(frozen=True)
class Mixture(cache.Identity):
    """Distributions of several teachers, averaged, over the student's tokens."""

    windows: str  # Windows.key of the student
    temperature: float
    weights: list[float]
    sources: list[str]  # keys of the teachers' own caches, in the order of the weights
    kind: str = "derived"


def fill_cache(
    cache_dir: Path,
    mixture: Mixture,
    windows: Windows,
    shares: list[Probabilities],
    ranks: Ranks,
) -> np.ndarray:
    """Average the shares, block by block, and return the cache's array, fp16 (tokens, 2).

    windows: the student's. shares: in the order of mixture.weights.
    Raises UserError for a temperature that fp16 has no room for, and as teacher.make_once does.
    """
    hottest = float(np.finfo(np.float16).max) / FLOOR
    if mixture.temperature > hottest:
        raise UserError(
            f"--temperature is {mixture.temperature}, and averaged or carried distributions are "
            f"stored up to {hottest:.0f}: give a smaller one."
        )
    tokens = len(windows.input_ids)

    def start(partial: Path) -> None:
        cache.start_folder(partial, mixture, tokens)

    def fill(partial: Path) -> None:
        logits = cache.map_logits(partial, tokens, "r+")
        mine = islice(windows.question_blocks(), ranks.rank, None, ranks.count)
        for begin, end in mine:
            weighted = zip(mixture.weights, shares, strict=True)
            mean = sum(weight * share(begin, end) for weight, share in weighted)
            starts = windows.window_start[begin : end + 1]
            local = starts - starts[0]
            logits[starts[0] : starts[-1]] = logits_of(mean, local, mixture.temperature)
        logits.flush()

    return cache.make_once(cache_dir, mixture, tokens, start, fill, ranks)


def logits_of(probabilities: np.ndarray, starts: np.ndarray, temperature: float) -> np.ndarray:
    """fp16 (tokens, 2) whose softmax at `temperature` over each window is `probabilities`.

    probabilities: float64 (tokens, 2). starts: int64 (n + 1,), where the windows begin.
    """
    largest = np.maximum.reduceat(probabilities, starts[:-1])
    ratio = probabilities / np.repeat(largest, np.diff(starts), axis=0)
    return (temperature * np.log(np.maximum(ratio, np.exp(-FLOOR)))).astype(np.float16)
