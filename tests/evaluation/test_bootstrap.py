from itertools import product

import numpy as np
import pytest

from kdfast.evaluation import bootstrap


def test_intervals_are_those_of_a_plain_loop(monkeypatch):
    values = np.random.default_rng(3).normal(50, 20, (37, 2))
    monkeypatch.setattr(bootstrap, "_DRAWS_AT_ONCE", 37 * 64)  # the last portion is a short one
    found = bootstrap.intervals(values, resamples=500, seed=7)
    draw = np.random.default_rng(7)
    means = [values[draw.integers(37, size=37)].mean(axis=0) for _ in range(500)]
    assert np.allclose(found, np.percentile(means, [2.5, 97.5], axis=0))
    assert not np.allclose(found, bootstrap.intervals(values, resamples=500, seed=8))


def test_an_interval_of_many_questions_is_the_normal_one():
    right = np.arange(3000) % 5 > 0  # 80 %
    low, high = bootstrap.intervals(100.0 * right[:, None])[:, 0]
    sigma = 100 * np.sqrt(0.8 * 0.2 / 3000)
    assert low == pytest.approx(80 - 1.96 * sigma, abs=0.1 * sigma)
    assert high == pytest.approx(80 + 1.96 * sigma, abs=0.1 * sigma)


def test_one_question_has_no_width():
    assert bootstrap.intervals(np.array([[40.0]])).tolist() == [[40.0], [40.0]]


def test_p_is_that_of_all_flips():
    differences = np.array([3.0, 1.0, -2.0, 5.0, 0.5, -0.25, 4.0, 2.0])
    sums = [abs(np.dot(signs, differences)) for signs in product((-1, 1), repeat=8)]
    exact = np.mean([each >= differences.sum() for each in sums])
    assert 0.02 < exact < 0.2
    found = bootstrap.sign_flip_p(np.concatenate([differences, np.zeros(50)]))
    assert found == pytest.approx(exact, abs=4 * np.sqrt(exact / bootstrap.RESAMPLES))


def test_p_counts_flips_that_are_equal_but_for_rounding():
    # Of the 8 flips of three equal differences 2 reach the sum.
    assert bootstrap.sign_flip_p(np.array([0.1, 0.1, 0.1])) == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize(
    ("differences", "p"), [(np.zeros(9), 1.0), (np.ones(200), 1 / (1 + bootstrap.RESAMPLES))]
)
def test_p_at_its_ends(differences, p):
    assert bootstrap.sign_flip_p(differences) == p


def test_two_models_that_tie_have_a_large_p():
    assert bootstrap.sign_flip_p(np.array([1.0, -1.0] * 30)) == 1.0
