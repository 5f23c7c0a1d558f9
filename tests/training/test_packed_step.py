"""A step over packed windows is the step over padded ones: in fp64, to the order of sums."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from kdfast.common.errors import UserError
from kdfast.common.ranks import Ranks
from kdfast.config import TrainConfig
from kdfast.config_checks import check
from kdfast.models.packing import PACKS, PackedWindows
from kdfast.train import train_loop
from kdfast.training import checkpoint, invariance
from tests import forks
from tests.steppers import gradient
from tests.training.test_checkpoint import save

WINDOWS = np.arange(12)
CUT = {"dtype": torch.float64, "max_tokens_per_micro_batch": 400}


def distance(one, other):
    return float((one - other).norm() / other.norm())


def step(run):
    """The gradient of a step as the run cuts it, and its report."""
    return gradient(run, run.training.cuts.cut(WINDOWS))


@pytest.mark.parametrize("model_type", sorted(PACKS))
def test_packed_and_padded_have_one_gradient(setup, model_type):
    padded = setup(model_type=model_type, **CUT)
    packed = setup(model_type=model_type, packing="on", **CUT)
    wanted, report = step(padded)
    ours, own_report = step(packed)
    assert distance(ours, wanted) < 1e-10
    assert own_report.loss == pytest.approx(report.loss, rel=1e-6)  # fp32 in the log
    tokens = padded.windows.lengths[WINDOWS].sum()
    assert own_report.padded_tokens == own_report.tokens == tokens < report.padded_tokens
    assert own_report.micro_batches == -(-tokens // 400) > 1
    batch = next(iter(packed.training.loader.micro_batches([WINDOWS])))
    assert batch.inputs["input_ids"].shape == (1, tokens)


def late(bounds):
    """The boundaries between windows, each a token too late."""
    return torch.cat([bounds[:1], bounds[1:-1] + 1, bounds[-1:]])


FAULTS = {
    "lengths": ("of", lambda packed: replace(packed, cu_seq_lens=late(packed.cu_seq_lens))),
    "gather": ("of", lambda packed: replace(packed, rows=packed.rows.roll(1))),
    "positions": ("position_ids", lambda positions: positions.roll(1, dims=1)),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_a_fault_is_seen(setup, monkeypatch, model_type, fault):
    wanted, _ = step(setup(model_type=model_type, **CUT))
    packed = setup(model_type=model_type, packing="on", **CUT)
    name, spoil = FAULTS[fault]
    right = getattr(PackedWindows, name)
    monkeypatch.setattr(PackedWindows, name, lambda *given: spoil(right(*given)))
    assert distance(step(packed)[0], wanted) > 1e-3


def test_equal_parts_are_as_many(setup):
    padded = setup(dtype=torch.float64, gradient_accumulation_steps=5)
    packed = setup(dtype=torch.float64, gradient_accumulation_steps=5, packing="on")
    ours, report = step(packed)
    assert distance(ours, step(padded)[0]) < 1e-10 and report.micro_batches == 5


def test_gradient_checkpointing_keeps_the_windows_apart(setup):
    """Layers run again in the backward pass, when forward() has long ended."""
    wanted, _ = step(setup(**CUT))
    ours, _ = step(setup(packing="on", gradient_checkpointing=True, **CUT))
    assert distance(ours, wanted) < 1e-10


def test_every_split_has_the_same_gradient(setup):
    run = setup(dropout=0.3, packing="on")
    splits = invariance.check(run.training, train_loop, WINDOWS)
    assert all(each.good for each in splits), invariance.table(splits)
    assert max(each.micro_batches for each in splits) == invariance.WINDOWS


@pytest.mark.program
@pytest.mark.parametrize(("count", "windows"), [(2, 12), (3, 2)])
def test_ranks_have_the_gradient_of_padded_windows_at_one(setup, count, windows):
    indices = np.arange(windows)
    wanted = gradient(setup(**CUT), [indices])[0]
    run = setup(packing="on", **CUT)

    def rank_step(rank):
        with Ranks.join() as run.training.run.ranks:
            run.optimizer.updates, kept = 2, []
            run.optimizer.unscale = lambda: kept.extend(
                torch.cat([each.grad.flatten() for each in run.optimizer.parameters]).tolist()
            )
            return kept, run.step(3, indices)

    found = forks.run(count, rank_step)
    for theirs, report in found:
        assert distance(torch.tensor(theirs, dtype=torch.float64), wanted) < 1e-10
        assert report == found[0][1] and report.padded_tokens == report.tokens


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(setup, tmp_path):
    settings = {"packing": "on", "dropout": 0.1, "max_tokens_per_micro_batch": 300}
    whole = setup(**settings)
    for number in range(2):
        whole.step(number, WINDOWS)
    folder = save(whole, tmp_path, 2)
    wanted = [whole.step(number, WINDOWS) for number in range(2, 5)]
    resumed = setup(**settings)
    torch.rand(5)
    _, policy = checkpoint.load_checkpoint(folder, resumed.model, resumed.optimizer)
    assert policy == whole.training.cuts.policy and policy.packed
    assert [resumed.step(number, WINDOWS) for number in range(2, 5)] == wanted


def test_memory_that_runs_out_halves_the_tokens(setup):
    wanted, _ = step(setup(**CUT))
    run = setup(packing="on", **CUT | {"max_tokens_per_micro_batch": 1000})

    def refuse(gradient):
        if run.training.cuts.policy.max_tokens > 300:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    weight = run.model.reader.base_model.encoder.layer[0].output.dense.weight
    weight.register_hook(refuse)
    recorder = invariance.Recorder(run.model, 0.0)
    run.training.optimizer = recorder
    report = run.step(3, WINDOWS)
    assert distance(recorder.gradient, wanted) < 1e-10
    assert report.max_tokens <= 300 and report.padded_tokens == report.tokens


def test_on_a_cpu_windows_are_padded_unless_asked(setup):
    assert not setup().training.cuts.policy.packed
    assert not setup(packing="off").training.cuts.policy.packed


def test_what_cannot_pack_is_refused(setup):
    with pytest.raises(UserError, match="mpnet cannot read packed windows: give auto"):
        setup(model_type="mpnet", packing="on")
    given = {"teacher": "t", "student": "s", "train_file": "f", "output_dir": "o"}
    for more, sentence in (
        ({"torch_compile": True}, "--torch_compile exclude each other"),
        ({"stage": "layers"}, "--stage layers exclude each other"),
        ({"stage": "both"}, "--stage both exclude each other"),
    ):
        check(TrainConfig(**given, **more))
        with pytest.raises(UserError, match=sentence):
            check(TrainConfig(**given, **more, packing="on"))
