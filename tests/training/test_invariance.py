from dataclasses import replace

import numpy as np
import pytest
import torch

from kdfast import doctor
from kdfast.common.errors import UserError
from kdfast.common.ranks import Ranks
from kdfast.train import train_loop
from kdfast.training import invariance
from tests import forks


def test_every_split_has_the_same_gradient(setup):
    run = setup(dropout=0.3, precision="fp16")
    splits = invariance.check(run.training, train_loop, np.arange(12))
    assert all(each.good for each in splits), invariance.table(splits)
    assert len(splits) > 10 and max(each.fp64 for each in splits) < 1e-12
    assert {each.name: each.micro_batches for each in splits}["one piece"] == 1
    assert max(each.micro_batches for each in splits) == invariance.WINDOWS


@pytest.mark.program
@pytest.mark.parametrize("count", [2, 3])
def test_real_ranks_find_the_same(setup, count):
    run = setup()

    def rank_check(rank):
        with Ranks.join() as run.training.run.ranks:
            return invariance.check(run.training, train_loop, np.arange(12))

    alone = invariance.check(setup().training, train_loop, np.arange(12))
    for splits in forks.run(count, rank_check):
        assert all(each.good for each in splits), invariance.table(splits)
        assert [each.name for each in splits] == [each.name for each in alone]


def test_a_mean_of_means_is_seen(setup):
    run = setup()
    objective = run.training.objective

    def mean(logits, batch):
        row_loss, parts = objective.loss(logits, batch)
        return row_loss / len(row_loss), parts

    run.training.objective = replace(objective, loss=mean)
    splits = invariance.check(run.training, train_loop, np.arange(12))
    wrong = {each.name for each in splits if not each.good}
    assert "5 equal parts" in wrong and "one piece" not in wrong
    assert "differs" in invariance.table(splits)


@pytest.mark.parametrize("stage", ["predictions", "layers"])
def test_the_command(world, capsys, stage):
    more = {"stage": stage, "validation_file": None} if stage == "layers" else {}
    assert doctor.main(["--check_invariance", *world.flags(output_dir=None, **more)]) == 0
    said = capsys.readouterr().out
    assert "one piece" in said and "differs" not in said
    assert not world.output.exists()


def test_the_command_needs_one_stage_and_what_training_needs(world, capsys):
    assert doctor.main(["--check_invariance", *world.flags(output_dir=None, stage="both")]) == 2
    assert "give --stage layers" in capsys.readouterr().err
    assert doctor.main(["--check_invariance"]) == 2
    assert "--train_file is missing" in capsys.readouterr().err


def test_a_whole_that_does_not_fit_is_refused(setup):
    run = setup()

    def refuse(gradient):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    run.model.reader.qa_outputs.weight.register_hook(refuse)
    with pytest.raises(UserError, match="do not fit into memory in one piece"):
        invariance.check(run.training, train_loop, np.arange(12))
