"""How far figures may be trusted: bootstrap intervals and paired tests over questions.

Percentile bootstrap and sign-flip permutation test as in Efron and Tibshirani, An Introduction to
the Bootstrap, chapters 13 and 15. The draws depend on the seed and the sizes alone.
"""

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95
SEED = 0
SETTINGS = {"resamples": RESAMPLES, "level": LEVEL, "seed": SEED}
_DRAWS_AT_ONCE = 1 << 22  # of the questions of several resamples: bounds the memory


def intervals(values: np.ndarray, *, resamples: int = RESAMPLES, seed: int = SEED) -> np.ndarray:
    """(2, k): lower and upper end of the LEVEL interval of each column's mean.

    values: float (n, k), a row a question; n > 0. A resample draws n whole rows with replacement.
    """
    tail = 50 * (1 - LEVEL)
    means = _resampled_means(np.asarray(values, dtype=np.float64), resamples, seed)
    return np.percentile(means, [tail, 100 - tail], axis=0)


def sign_flip_p(differences: np.ndarray, *, flips: int = RESAMPLES, seed: int = SEED) -> float:
    """The two-sided p of a mean difference of 0, when each difference may as well be its negative.

    differences: float (n,), of one question each. From 1 / (flips + 1) to 1.
    """
    moved = np.asarray(differences, dtype=np.float64)
    moved = moved[moved != 0]
    if not len(moved):
        return 1.0
    draw = np.random.default_rng(seed)
    # Sums that equal the observed one but for rounding count as no smaller.
    observed = abs(moved.sum()) * (1 - 1e-9)
    reached = 0
    for count in _portions(flips, len(moved)):
        signs = 2.0 * draw.integers(0, 2, size=(count, len(moved)), dtype=np.int8) - 1.0
        reached += int((np.abs(signs @ moved) >= observed).sum())
    return (1 + reached) / (1 + flips)


def _resampled_means(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """(resamples, k) float64."""
    n = len(values)
    draw = np.random.default_rng(seed)
    means = []
    for count in _portions(resamples, n):
        drawn = draw.integers(n, size=(count, n)) + n * np.arange(count)[:, None]
        times = np.bincount(drawn.ravel(), minlength=count * n).reshape(count, n)
        means.append(times @ values / n)
    return np.concatenate(means)


def _portions(total: int, size: int) -> list[int]:
    """`total` in parts such that part times size stays within _DRAWS_AT_ONCE, where it can."""
    most = max(1, _DRAWS_AT_ONCE // size)
    return [min(most, total - begin) for begin in range(0, total, most)]
