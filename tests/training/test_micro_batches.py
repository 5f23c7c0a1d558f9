from itertools import islice
from unittest import mock

import numpy as np
import pytest
import torch

from kdfast.common.errors import UserError
from kdfast.common.run import Run
from kdfast.config import SpeedSettings
from kdfast.data.batches import MicroBatchPolicy
from kdfast.models.span_model import SpanModel
from kdfast.models.window_loader import Layout
from kdfast.training import assemble, flops, micro_batches
from tests import published, readers

CPU = torch.device("cpu")


def test_work_is_counted_by_the_formula_of_an_encoder():
    reader, _ = readers.make("bert", layers=3, hidden_size=32, intermediate_size=128)
    found = flops.count_work(SpanModel(reader))
    # Four products of the width and two of the inner width a layer, and the head's two logits.
    assert found.per_token == pytest.approx(2 * (3 * (4 * 32 * 32 + 2 * 32 * 128) + 2 * 32))
    assert found.per_token_width == pytest.approx(3 * 4 * 32)
    assert found.of(np.array([10, 20])) == pytest.approx(
        30 * found.per_token + 500 * found.per_token_width
    )


@pytest.mark.parametrize("model_type", published.TYPES)
def test_work_is_counted_for_every_type(model_type):
    reader, _ = readers.make(model_type)
    found = flops.count_work(SpanModel(reader))
    assert found.per_token > 0 and found.per_token_width > 0 and found.layers == 2
    assert (found.per_pass > 0) == (model_type == "deberta-v2")


WORK = flops.Work(per_token=2e7, per_token_width=1e4, layers=6, parameters=20_000_000)


def test_the_policy_reads_no_clock(monkeypatch):
    monkeypatch.setattr(flops.time, "perf_counter", None)
    policy = micro_batches.choose_policy(SpeedSettings(), WORK, CPU, 384, None)
    assert policy == micro_batches.nominal_policy(WORK, "cpu", 768)
    assert policy.overhead > 0 and policy.per_token > 0 and policy.per_token_width > 0
    settings = SpeedSettings(gradient_accumulation_steps=4)
    assert micro_batches.choose_policy(settings, WORK, CPU, 384, None).parts == 4


def test_the_probe_leaves_no_gradient():
    reader, _ = readers.make("bert")
    model = SpanModel(reader)
    assert micro_batches.peak_bytes_of(model, model, Run(precision="bf16"), 2, 16) == 0
    assert all(each.grad is None for each in model.parameters())


def test_a_probe_that_runs_out_of_memory_leaves_no_gradient():
    reader, _ = readers.make("bert")
    model = SpanModel(reader)

    def refuse(gradient):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    model.reader.base_model.embeddings.word_embeddings.weight.register_hook(refuse)
    with pytest.raises(torch.OutOfMemoryError):
        micro_batches.peak_bytes_of(model, model, Run(), 2, 16)
    assert all(each.grad is None for each in model.parameters())


def test_the_budget_leaves_room():
    constant, per_window, free = 1000, 50, 10_000
    most = micro_batches.GPU_TOKENS_AT_MOST
    taken = []

    def peak(count):
        taken.append(count)
        return constant + per_window * count

    assert micro_batches.find_budget(peak, lambda: free, 384) == (8000 - 1000) // 50 * 384
    assert max(taken) <= 16
    assert micro_batches.find_budget(peak, lambda: 1010, 384) == 384
    assert micro_batches.find_budget(peak, lambda: 10**9, 384) == most


def test_free_memory_is_read_after_the_trials_have_loaded_their_kernels():
    events = []

    def peak(count):
        events.append(count)
        return 100 * count

    def free():
        events.append("free")
        return 10_000

    micro_batches.find_budget(peak, free, 384)
    assert events == [4, 16, "free"]


def test_what_a_run_is_still_to_take(setup):
    run = setup()
    bytes_of_weights = 4 * sum(each.numel() for each in run.model.parameters())
    kernels = micro_batches.KERNEL_BYTES
    assert micro_batches.bytes_to_come(run.optimizer) == 2 * bytes_of_weights + kernels
    run.step(0, np.arange(3))  # the moments are there now
    assert micro_batches.bytes_to_come(run.optimizer) == kernels


def test_the_data_are_uploaded_before_memory_is_measured(setup, monkeypatch):
    events = []

    def watch(name):
        function = getattr(assemble, name)

        def watched(*given):
            events.append(name)
            return function(*given)

        monkeypatch.setattr(assemble, name, watched)

    watch("make_loader")
    watch("choose_policy")
    setup()
    assert events == ["make_loader", "choose_policy"]


@pytest.mark.parametrize("packs", [False, True])
def test_the_probe_is_of_what_will_train(packs):
    reader, _ = readers.make("roberta")
    model = SpanModel(reader)
    model.enable_packing()
    shapes = []

    def forward(ids, **packed):
        shapes.append((ids.shape, packed.keys()))
        return model(ids, **packed)

    micro_batches.peak_bytes_of(model, forward, Run(), 2, 16, packs)
    assert shapes == [((1, 32), {"packed"}) if packs else ((2, 16), set())]


@pytest.mark.parametrize(("held", "windows"), [(1, 1), (3, 1), (4, 79), (15, 79), (16, 79)])
def test_a_card_that_holds_few_windows(held, windows):
    def peak(count):
        if count > held:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return 100 * count

    assert micro_batches.find_budget(peak, lambda: 9_900, 384) == windows * 384


def test_the_matmul_rate_is_of_this_machine_and_of_numbers_that_differ(monkeypatch):
    rate = flops.matmul_rate(CPU, torch.float32)
    assert 1e8 < rate < 1e14
    given = []
    product = torch.matmul
    monkeypatch.setattr(torch, "matmul", lambda *pair: given.extend(pair) or product(*pair))
    flops.matmul_rate(CPU, torch.float16)
    assert all(len(each.unique()) > 1000 for each in given)
    assert given and not torch.equal(*given[:2])


def test_rounded_weights_count_the_same():
    reader, _ = readers.make("bert")
    model = SpanModel(reader)
    whole = flops.count_work(model)
    model.cast_linear_layers(torch.float16)
    assert flops.count_work(model) == whole


def test_a_live_teacher_adds_its_forward_pass():
    small, large = (flops.count_work(SpanModel(readers.make(layers=n)[0])) for n in (2, 6))
    both = small.with_teacher(large)
    lengths = np.array([10, 20])
    assert both.of(lengths) == pytest.approx(small.of(lengths) + large.of(lengths) / 3)
    assert (both.layers, both.parameters) == (4, small.parameters)


@pytest.mark.parametrize("packs", [False, True])
def test_a_long_window_that_does_not_fit_ends_the_run_among_short_ones(packs):
    policy = MicroBatchPolicy(1000, 1e-3, 1e-6, 0.0, None, packs)
    lengths = np.array([10] * 10 + [500])
    cuts = micro_batches.MicroBatches(policy, lengths, Layout(1, packs), Run())
    attempts = cuts.until_they_fit(np.arange(11), mock.Mock())
    with pytest.raises(UserError, match="not enough memory for a single window"):
        for batches in islice(attempts, 9):
            with cuts.catching_out_of_memory():
                if any(10 in batch for batch in batches):
                    raise torch.OutOfMemoryError("CUDA out of memory.")
