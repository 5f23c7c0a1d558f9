from dataclasses import replace

import numpy as np
import pytest
import torch

from kdfast.config import TrainConfig
from kdfast.models import checks
from kdfast.models.load import SpanModel
from kdfast.training import micro_batches
from tests import readers

CPU = torch.device("cpu")


def test_work_is_counted_by_the_formula_of_an_encoder():
    reader, _ = readers.make("bert", layers=3, hidden_size=32, intermediate_size=128)
    work = micro_batches.count_work(SpanModel(reader))
    # Four products of the width and two of the inner width a layer, and the head's two logits.
    assert work.per_token == pytest.approx(2 * (3 * (4 * 32 * 32 + 2 * 32 * 128) + 2 * 32))
    assert work.per_token_width == pytest.approx(3 * 4 * 32)
    assert work.of(np.array([10, 20])) == pytest.approx(
        30 * work.per_token + 500 * work.per_token_width
    )


@pytest.mark.parametrize("model_type", checks.SUPPORTED)
def test_work_is_counted_for_every_type(model_type):
    reader, _ = readers.make(model_type)
    work = micro_batches.count_work(SpanModel(reader))
    assert work.per_token > 0 and work.per_token_width > 0 and work.layers == 2
    assert (work.per_pass > 0) == (model_type == "deberta-v2")


WORK = micro_batches.Work(per_token=2e7, per_token_width=1e4, layers=6, parameters=20_000_000)


def test_the_rule_reads_no_clock(monkeypatch):
    monkeypatch.setattr(micro_batches.time, "perf_counter", None)
    config = TrainConfig(train_file="f", output_dir="o")
    probe = micro_batches.MemoryProbe(None, None, CPU, None)
    policy = micro_batches.choose_policy(config, WORK, probe)
    assert policy == micro_batches.nominal_policy(WORK, "cpu", 768)
    assert policy.overhead > 0 and policy.per_token > 0 and policy.per_token_width > 0
    parts = micro_batches.choose_policy(replace(config, gradient_accumulation_steps=4), WORK, probe)
    assert parts.parts == 4


def test_the_probe_leaves_no_gradient():
    reader, _ = readers.make("bert")
    model = SpanModel(reader)
    micro_batches.MemoryProbe(model, model, CPU, torch.bfloat16).run(2, 16)
    assert all(each.grad is None for each in model.parameters())


def test_the_budget_leaves_room():
    constant, per_window, free = 1000, 50, 10_000
    taken = []

    def peak(count):
        taken.append(count)
        return constant + per_window * count

    assert micro_batches.find_budget(peak, free, 384) == (8000 - 1000) // 50 * 384
    assert max(taken) <= 4
    assert micro_batches.find_budget(peak, 1010, 384) == 384
    assert micro_batches.find_budget(peak, 10**9, 384) == micro_batches.GPU_TOKENS_AT_MOST


def test_a_card_that_holds_few_windows_gets_one_at_a_time():
    def peak(count):
        if count > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return 100

    assert micro_batches.find_budget(peak, 10_000, 384) == 384


def test_the_matmul_rate_is_of_this_machine():
    rate = micro_batches.matmul_rate(CPU, torch.float32)
    assert 1e8 < rate < 1e14


def test_rounded_weights_count_the_same():
    reader, _ = readers.make("bert")
    model = SpanModel(reader)
    whole = micro_batches.count_work(model)
    model.cast_linear_layers(torch.float16)
    assert micro_batches.count_work(model) == whole


def test_a_live_teacher_adds_its_forward_pass():
    small, large = (micro_batches.count_work(SpanModel(readers.make(layers=n)[0])) for n in (2, 6))
    both = small.with_teacher(large)
    lengths = np.array([10, 20])
    assert both.of(lengths) == pytest.approx(small.of(lengths) + large.of(lengths) / 3)
    assert (both.layers, both.parameters) == (4, small.parameters)
