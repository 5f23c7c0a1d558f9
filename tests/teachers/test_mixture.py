import errno
import os
from dataclasses import replace

import numpy as np
import pytest

from kdfast.common.errors import UserError
from kdfast.common.ranks import Ranks
from kdfast.data.prepare import prepare_windows
from kdfast.data.windows import Windows
from kdfast.teachers import cache
from kdfast.teachers import mixture as derived
from tests import corpora, forks
from tests.small_tokenizers import of_family

MIXTURE = derived.Mixture("windows", 1.5, [0.25, 0.75], ["one", "two"])


@pytest.fixture
def windows(tmp_path, monkeypatch):
    blocks = Windows.question_blocks
    monkeypatch.setattr(Windows, "question_blocks", lambda self: blocks(self, 5))
    source = corpora.write(tmp_path / "train.json")
    return prepare_windows(source, of_family("bert"), cache_dir=tmp_path / "cache")


def distributions(windows, seed):
    """Made-up distributions, flat as input_ids, a tenth of it 0; and the share that gives them."""
    draw = np.random.default_rng(seed)
    mass = draw.exponential(1, (len(windows.input_ids), 2)) ** 4
    mass *= draw.random(mass.shape) > 0.1
    starts = windows.window_start
    mass[starts[:-1]] += 1e-3
    mass /= np.repeat(np.add.reduceat(mass, starts[:-1]), windows.lengths, axis=0)
    return mass, lambda begin, end: mass[starts[begin] : starts[end]]


def softmax(logits, temperature):
    weights = np.exp((logits - logits.max(axis=0)).astype(float) / temperature)
    return weights / weights.sum(axis=0)


def assert_distributions(logits, windows, wanted, temperature):
    for begin, end in zip(windows.window_start[:-1], windows.window_start[1:], strict=True):
        found = softmax(logits[begin:end], temperature)
        # fp16 rounds log(p / largest p), which is 30 at most, by 2^-12 of it at most.
        np.testing.assert_allclose(found, wanted[begin:end], rtol=2 * 30 * 2**-12, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.01, 1.0, 1.5, 30.0, 2000.0])
def test_the_softmax_of_the_logits_is_the_average(tmp_path, windows, temperature):
    one, two = distributions(windows, 1), distributions(windows, 2)
    mixture = replace(MIXTURE, temperature=temperature)
    arguments = tmp_path, mixture, windows, [one[1], two[1]], Ranks()
    logits = derived.fill_cache(*arguments)
    assert logits.dtype == np.float16 and logits.shape == (len(windows.input_ids), 2)
    assert_distributions(logits, windows, 0.25 * one[0] + 0.75 * two[0], temperature)
    assert np.isfinite(logits).all() and logits.max() == 0
    opened = cache.open_cache(tmp_path, mixture, len(windows.input_ids))
    np.testing.assert_array_equal(opened, logits)


def test_mass_that_is_not_there_stays_away():
    mass = np.zeros((400, 2))
    mass[3] = 0.5
    mass[7, 0], mass[9, 1] = 0.5, 0.5
    logits = derived.logits_of(mass, np.array([0, 400]), 2.0)
    found = softmax(logits, 2)
    assert found[mass == 0].sum() < 1e-9
    np.testing.assert_allclose(found, mass, atol=1e-9)


def test_the_key_covers_temperature_weights_sources_and_windows():
    changes = [
        {"temperature": 2.0},
        {"weights": [0.75, 0.25]},
        {"sources": ["two", "one"]},
        {"windows": "others"},
    ]
    assert len({replace(MIXTURE, **each).key for each in changes} | {MIXTURE.key}) == 5


def test_a_temperature_that_fp16_cannot_hold(tmp_path, windows):
    with pytest.raises(UserError, match=r"--temperature is 2200\.0.*up to 2183"):
        hot = replace(MIXTURE, temperature=2200.0)
        derived.fill_cache(tmp_path, hot, windows, [], Ranks())


def test_a_killed_writer_and_a_full_disk_leave_no_cache(tmp_path, windows, monkeypatch):
    whole, share = distributions(windows, 3)

    def killed(begin, end):
        if begin:
            raise KeyboardInterrupt
        return share(begin, end)

    mixture = replace(MIXTURE, weights=[1.0])
    with pytest.raises(KeyboardInterrupt):
        derived.fill_cache(tmp_path, mixture, windows, [killed], Ranks())
    assert cache.open_cache(tmp_path, mixture, len(windows.input_ids)) is None

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(UserError, match="disk is full"):
        patch.setattr(os, "posix_fallocate", full)
        derived.fill_cache(tmp_path, mixture, windows, [share], Ranks())
    logits = derived.fill_cache(tmp_path, mixture, windows, [share], Ranks())
    assert_distributions(logits, windows, whole, 1.5)
    # What is there already is taken.
    again = derived.fill_cache(tmp_path, mixture, windows, [killed], Ranks())
    np.testing.assert_array_equal(again, logits)


def test_ranks_share_the_blocks(tmp_path, windows):
    whole, share = distributions(windows, 4)
    mixture = replace(MIXTURE, weights=[1.0])

    def rank_fill(rank):
        begun = []

        def mine(begin, end):
            begun.append(begin)
            return share(begin, end)

        with Ranks.join() as ranks:
            derived.fill_cache(tmp_path, mixture, windows, [mine], ranks)
        return begun

    one, two = forks.run(2, rank_fill)
    assert one and two and sorted(one + two) == [begin for begin, _ in windows.question_blocks()]
    logits = cache.open_cache(tmp_path, mixture, len(windows.input_ids))
    assert_distributions(logits, windows, whole, 1.5)
