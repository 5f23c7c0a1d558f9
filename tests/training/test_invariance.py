import numpy as np
import pytest

from kdfast.common.ranks import Ranks
from kdfast.training import invariance
from tests import forks


def test_every_split_has_the_same_gradient(setup):
    run = setup(dropout=0.3, precision="fp16")
    splits = invariance.check(run.stepper, np.arange(12))
    assert all(each.good for each in splits), invariance.table(splits)
    assert len(splits) > 10 and max(each.fp64 for each in splits) < 1e-12
    assert {each.name: each.micro_batches for each in splits}["one piece"] == 1
    assert max(each.micro_batches for each in splits) == invariance.WINDOWS


@pytest.mark.parametrize("count", [2, 3])
def test_real_ranks_find_the_same(setup, count):
    run = setup()

    def rank_check(rank):
        with Ranks.join() as run.stepper.ranks:
            return invariance.check(run.stepper, np.arange(12))

    alone = invariance.check(setup().stepper, np.arange(12))
    for splits in forks.run(count, rank_check):
        assert all(each.good for each in splits), invariance.table(splits)
        assert [each.name for each in splits] == [each.name for each in alone]


def test_a_mean_of_means_is_seen(setup, monkeypatch):
    run = setup()
    accumulate = run.stepper.accumulate

    def per_micro_batch(step, batches, count):
        for batch in batches:
            accumulate(step, [batch], len(batch) * len(batches))

    monkeypatch.setattr(run.stepper, "accumulate", per_micro_batch)
    splits = invariance.check(run.stepper, np.arange(12))
    wrong = {each.name for each in splits if not each.good}
    assert "5 equal parts" in wrong and "one piece" not in wrong
    assert "differs" in invariance.table(splits)


def test_the_command(world, capsys):
    assert world.run(check_invariance=True, output_dir=None) == 0
    said = capsys.readouterr().out
    assert "one piece" in said and "differs" not in said
    assert not world.output.exists()
