import sys
from itertools import combinations, pairwise

import numpy as np
import pytest

from kdfast.data.batches import (
    MicroBatchPolicy,
    Share,
    TrainingOrder,
    cut_by_tokens,
    cut_evenly,
    cut_in_order,
    shard,
)


def test_an_epoch_takes_every_window_once_and_ends_short():
    windows = np.array([3, 5, 8, 13, 21, 34, 55])
    order = TrainingOrder([Share(windows)], 3, seed=1)
    assert order.steps_per_epoch == 3
    steps = [order.step(step) for step in range(6)]
    assert [len(step) for step in steps] == [3, 3, 1, 3, 3, 1]
    for epoch in (steps[:3], steps[3:]):
        assert sorted(np.concatenate(epoch)) == sorted(windows)
    assert not np.array_equal(np.concatenate(steps[:3]), np.concatenate(steps[3:]))


def test_a_step_is_a_function_of_seed_and_number():
    windows = np.arange(100)
    forward = TrainingOrder([Share(windows)], 10, seed=1)
    wanted = [forward.step(step) for step in range(25)]
    for step in (24, 3, 17, 0):
        assert np.array_equal(TrainingOrder([Share(windows)], 10, seed=1).step(step), wanted[step])
    assert not np.array_equal(TrainingOrder([Share(windows)], 10, seed=2).step(0), wanted[0])


def test_every_place_is_drawn_evenly():
    first = [TrainingOrder([Share(np.arange(10))], 1, seed).step(0)[0] for seed in range(3000)]
    counts = np.bincount(first, minlength=10)
    assert counts.min() > 230 and counts.max() < 370  # 300 +- 4 sigma


def test_cuts_by_tokens_keep_the_budget_and_every_window():
    draw = np.random.default_rng(0)
    lengths = draw.integers(1, 400, 80)
    windows = draw.permutation(1000)[:80]
    batches = cut_by_tokens(windows, lengths, 768)
    of = dict(zip(windows, lengths, strict=True))
    assert sorted(np.concatenate(batches)) == sorted(windows)
    sizes = [[of[window] for window in batch] for batch in batches]
    assert all(len(batch) * max(batch) <= 768 for batch in sizes)
    # A budget is used up: the next window would not have fitted.
    assert all((len(batch) + 1) * max(batch) > 768 for batch in sizes[:-1])
    flat = [length for batch in sizes for length in batch]
    assert flat == sorted(flat, reverse=True)


def test_a_window_above_the_budget_stands_alone():
    batches = cut_by_tokens(np.arange(3), np.array([5, 500, 5]), 100)
    assert [list(batch) for batch in batches] == [[1], [0, 2]]


def test_equal_lengths_keep_their_order():
    batches = cut_by_tokens(np.array([9, 4, 7, 1]), np.array([10, 10, 10, 10]), 20)
    assert [list(batch) for batch in batches] == [[9, 4], [7, 1]]
    many = np.random.default_rng(0).permutation(500)
    assert list(np.concatenate(cut_by_tokens(many, np.full(500, 10), 50))) == list(many)


def test_even_cuts():
    assert [len(b) for b in cut_evenly(np.arange(7), np.ones(7), 3)] == [3, 2, 2]
    assert [len(b) for b in cut_evenly(np.arange(2), np.ones(2), 5)] == [1, 1]


def cost(policy, sizes):
    """Seconds of a step whose micro-batches have windows of these lengths, by the rule's words."""
    return sum(
        policy.overhead
        + len(batch) * max(batch) * (policy.per_token + policy.per_token_width * max(batch))
        for batch in sizes
    )


def every_cut(lengths):
    """All ways to cut a falling list into runs."""
    count = len(lengths)
    for number in range(count):
        for inner in combinations(range(1, count), number):
            bounds = (0, *inner, count)
            yield [lengths[a:b] for a, b in pairwise(bounds)]


RULES = {
    "overhead": MicroBatchPolicy(700, 5.0, 0.01, 0.0),
    "no overhead": MicroBatchPolicy(700, 0.0, 0.01, 1e-5),
    "width": MicroBatchPolicy(2000, 1.0, 0.01, 1e-3),
    "small budget": MicroBatchPolicy(150, 3.0, 0.01, 1e-5),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("seed", range(4))
def test_no_cut_is_cheaper(name, seed):
    policy = RULES[name]
    draw = np.random.default_rng(seed)
    lengths = draw.integers(20, 385, 10)
    windows = draw.permutation(100)[:10]
    of = dict(zip(windows, lengths.tolist(), strict=True))
    sizes = [[of[window] for window in batch] for batch in policy.cut(windows, lengths)]
    assert sorted(length for batch in sizes for length in batch) == sorted(lengths)
    allowed = [
        cut
        for cut in every_cut(sorted(lengths.tolist(), reverse=True))
        if all(len(batch) == 1 or len(batch) * max(batch) <= policy.max_tokens for batch in cut)
    ]
    assert sizes in allowed
    assert cost(policy, sizes) == pytest.approx(
        min(cost(policy, cut) for cut in allowed), rel=1e-12
    )


def test_a_step_of_one_window_and_equal_parts():
    policy = MicroBatchPolicy(100, 1.0, 1.0, 0.0)
    assert [list(batch) for batch in policy.cut(np.array([7]), np.array([300]))] == [[7]]
    policy = MicroBatchPolicy(100, 1.0, 1.0, 0.0, parts=3)
    assert [len(batch) for batch in policy.cut(np.arange(7), np.ones(7, int))] == [3, 2, 2]


def packed_policy(max_tokens, parts=None):
    return MicroBatchPolicy(max_tokens, 5.0, 0.01, 1e-5, parts, packed=True)


@pytest.mark.parametrize("max_tokens", [400, 1000, 5000, 10**6])
def test_packed_cuts_are_few_and_balanced(max_tokens):
    draw = np.random.default_rng(max_tokens)
    lengths = draw.integers(1, 400, 80)
    windows = draw.permutation(1000)[:80]
    of = dict(zip(windows, lengths, strict=True))
    cuts = packed_policy(max_tokens).cut(windows, lengths)
    assert sorted(np.concatenate(cuts)) == sorted(windows)
    sums = [sum(of[window] for window in cut) for cut in cuts]
    assert max(sums) <= max_tokens and max(sums) - min(sums) <= lengths.max()
    if len(cuts) > 1:  # one less would not fit
        fewer = packed_policy(max_tokens, parts=len(cuts) - 1).cut(windows, lengths)
        assert max(sum(of[window] for window in cut) for cut in fewer) > max_tokens


@pytest.mark.parametrize("max_tokens", [400, 1000, 10**6, sys.maxsize])
def test_packed_cuts_of_a_whole_set_are_full(max_tokens):
    lengths = np.random.default_rng(3).integers(1, 400, 80).astype(np.int32)
    cuts = cut_by_tokens(np.arange(100, 180), lengths, max_tokens, packed=True)
    order = np.concatenate(cuts) - 100
    assert order.tolist() == np.argsort(-lengths, kind="stable").tolist()
    sums = [int(lengths[cut - 100].sum()) for cut in cuts]
    assert max(sums) <= max_tokens
    for number, cut in enumerate(cuts[1:]):  # its first window had no room in the one before
        assert sums[number] + lengths[cut[0] - 100] > max_tokens


def test_packed_cuts_at_the_edges():
    assert packed_policy(100).cut(np.arange(0), np.arange(0)) == []
    cuts = packed_policy(100).cut(np.arange(3), np.array([5, 500, 5]))
    assert [1] in [list(cut) for cut in cuts]
    assert len(packed_policy(1).cut(np.arange(4), np.full(4, 9))) == 4
    assert [len(cut) for cut in packed_policy(1, parts=2).cut(np.arange(6), np.full(6, 9))] == [
        3,
        3,
    ]
    cuts = cut_in_order(np.arange(4), np.array([5, 500, 5, 95]), 100)
    assert [list(cut) for cut in cuts] == [[0], [1], [2, 3]]
    assert cut_in_order(np.arange(0), np.arange(0), 100) == []
    assert len(packed_policy(10**6, parts=5).cut(np.arange(3), np.full(3, 9))) == 3


def test_packed_shares_have_equal_tokens():
    lengths = np.array([10, 400, 10, 10, 10, 380, 10, 10])
    shares = shard(np.arange(8), lengths, 2, packed_policy(100))
    assert [int(lengths[share].sum()) for share in shares] == [420, 420]


def test_a_weight_says_how_often_an_epoch_draws_a_file():
    once, half, twice = np.arange(9), np.arange(10, 18), np.arange(20, 23)
    order = TrainingOrder([Share(once), Share(half, 0.5), Share(twice, 2)], 5, seed=3)
    assert order.steps_per_epoch == 4  # 9 + 4 + 6 windows
    epochs = [
        np.concatenate([order.step(4 * epoch + place) for place in range(4)]) for epoch in range(6)
    ]
    for first, second in zip(epochs[::2], epochs[1::2], strict=True):
        for epoch in (first, second):
            assert sorted(epoch[epoch < 10]) == list(once)
            assert sorted(epoch[epoch >= 20]) == sorted([*twice, *twice])
        both = np.concatenate([first, second])
        assert sorted(both[(both >= 10) & (both < 20)]) == list(half)  # the other half
    halves = [frozenset(epoch[(epoch >= 10) & (epoch < 20)]) for epoch in epochs]
    assert len(set(halves)) > 2
    again = TrainingOrder(order.shares, 5, seed=3)
    for step in (23, 2, 14):  # a resumed run begins anywhere
        assert np.array_equal(again.step(step), order.step(step))


@pytest.mark.parametrize("weight", [0.3, 1.7, 2.5, 0.001])
def test_any_weight_draws_all_windows_evenly(weight):
    share = Share(np.arange(7), weight)
    drawn = [share.drawn(epoch, 1, 0) for epoch in range(50)]
    assert {len(each) for each in drawn} == {max(1, round(7 * weight))}
    counts = np.bincount(np.concatenate(drawn), minlength=7)
    assert counts.max() - counts.min() <= 1


def test_one_file_that_is_drawn_once_has_the_order_of_earlier_versions():
    windows = np.array([3, 5, 8, 13, 21, 34, 55])
    order = TrainingOrder([Share(windows)], 7, seed=1)
    for epoch in range(3):
        wanted = np.random.default_rng([1, epoch]).permutation(windows)
        assert np.array_equal(order.step(epoch), wanted)
