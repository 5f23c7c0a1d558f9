"""What a student learns from several teachers, or from one with another tokenizer.

The cache has the files of a teacher's own cache (cache.py), and holds z = T log p + c, so that
softmax(z / T) = p: p is the average of the teachers' distributions, softened at the temperature T
of the run and aligned to the student's tokens. c makes the largest z of each head of a window 0.

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
    """Average the teachers' distributions, block by block, into a cache.

    Args:
        cache_dir: One folder for all ranks.
        mixture: What determines the cache's content.
        windows: The student's.
        shares: One for each teacher, in the order of mixture.weights.
        ranks: Who share the blocks.

    Returns:
        The cache's array, fp16 (tokens, 2).

    Raises:
        UserError: The temperature is too high for fp16; and as cache.make_once.
    """
    hottest = float(np.finfo(np.float16).max) / FLOOR
    if mixture.temperature > hottest:
        raise UserError(
            f"--temperature is {mixture.temperature}, and averaged or aligned distributions are "
            f"stored up to {hottest:.0f}: give a smaller one."
        )
    tokens = len(windows.input_ids)

    def start(partial: Path) -> None:
        cache.start_folder(partial, mixture, tokens)

    def fill(partial: Path) -> None:
        logits = cache.map_logits(partial, tokens, "r+")
        mine = islice(windows.question_blocks(), ranks.rank, None, ranks.count)
        for begin, end in mine:
            starts = windows.window_start[begin : end + 1]
            mean = np.zeros((starts[-1] - starts[0], 2))
            for weight, share in zip(mixture.weights, shares, strict=True):
                mean += weight * share(begin, end)
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
