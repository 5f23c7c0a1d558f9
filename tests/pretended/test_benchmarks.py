"""The tables of `make gpu` for tiny readers: rows, gates, the record. Speeds mean nothing here."""

from contextlib import ExitStack, contextmanager
from unittest import mock

import pytest
import torch

from benchmarks import bench_kd_loss, bench_teacher_pass, card_table, gpu, kd_loss_report, records
from benchmarks.train_candidates import Problem
from benchmarks.train_group import CARD_TABLE, draws, gate, made_up_logits, makers
from benchmarks.workload import Shape, for_roberta, made_up_corpus, roberta_reader
from tests.pretended.device import pretended

pytestmark = [pytest.mark.pretended, pytest.mark.program]

TINY = Shape(1, 16, 2, 2000)
CARD = torch.device("cuda", 0)


@contextmanager
def card():
    """A V100, with what it cannot pretend left out: large products, compiled code, bare kernels."""

    def no_kernels(cell, name, form):
        return lambda: (1e-6, 1e-6)

    stand_ins = {
        (torch.cuda, "get_device_name"): lambda device=None: "Pretended V100",
        (card_table, "matmul_rate"): lambda device, dtype: 1e12,
        (bench_teacher_pass, "matmul_rate"): lambda device, dtype: 1e12,
        (bench_kd_loss, "compiled"): lambda function: function,
        (bench_kd_loss, "usable"): lambda device: ["native"],
        (bench_kd_loss, "rows_alone"): no_kernels,
    }
    with ExitStack() as stack:
        device = stack.enter_context(pretended())
        for (module, name), stand_in in stand_ins.items():
            stack.enter_context(mock.patch.object(module, name, stand_in))
        yield device


def windows():
    return for_roberta(made_up_corpus(40).windows())


def check_record(rows, part, folder):
    """The record of the card holds the rows, and its table a line for each."""
    records.add_to_card(records.machine("cuda"), {part: rows}, folder)
    [record] = gpu.load(folder)
    assert record[part] == rows
    assert record["machine"]["card"] == "Pretended V100"
    assert record["machine"]["capability"] == "sm_70"
    assert record["machine"]["memory"] == "16.0 GB"
    return gpu.document(f"{gpu.BEGIN}{gpu.END}", [record])


def test_a_training_step(tmp_path):
    plan = card_table.Plan({"roberta-base": TINY}, batch=4, rounds=1, warm=1, steps=1)
    with card():
        rows = card_table.measure(plan, windows(), CARD, tmp_path)
        text = check_record(rows, "train_step", tmp_path)
    padded, longest, trainer, grouped, ours, packed = rows
    assert [row["candidate"] for row in (ours, packed)] == list(CARD_TABLE)
    assert {row["windows_at_once"] for row in (padded, longest, trainer, grouped)} == {4}
    # RoBERTa's, Adam's moments and gradients: the least that a training step takes.
    least = 16 * sum(each.numel() for each in roberta_reader(TINY).parameters())
    for row in rows:
        assert (row["precision"], row["batch"], len(row["seconds"])) == ("fp16", 4, 1)
        assert row["windows_per_second"] > 0 and row["peak_memory"] > least
        assert row["share_of_data_sheet"] == pytest.approx(row["share_of_peak"] / 125, abs=1e-4)
    assert packed["padding"] < 0.01 < padded["padding"]
    assert padded["padding"] > longest["padding"] == trainer["padding"]
    assert f"| V100 | packed | 406 | {packed['windows_per_second']:,.0f} |" in text


@pytest.mark.parametrize("moved", ["kdfast, packed", "HF Trainer"])
def test_the_gate_sees_a_wrong_loss_on_a_card(tmp_path, moved):
    some = windows()
    with card():
        problem = Problem(
            roberta_reader(TINY, 0.0), some, made_up_logits(some), "fp16", 2, 1e9, CARD
        )
        first, other = makers(problem, 4, tmp_path, CARD_TABLE), problem.teacher_logits.copy()
        other[: some.window_start[len(some) // 2]] *= -1
        group = {"padded to 384": first["padded to 384"], "right": first[moved]}
        gate(group, draws(some, 4, seed=0), card_table.GATES["fp16"], CARD)
        wrong = Problem(problem.reader, some, other, "fp16", 2, 1e9, CARD)
        group["wrong"] = makers(wrong, 4, tmp_path, CARD_TABLE)[moved]
        with pytest.raises(AssertionError, match="wrong"):
            gate(group, draws(some, 4, seed=0), card_table.GATES["fp16"], CARD)


def test_padding_candidates_take_what_fits(tmp_path):
    some = windows()
    with card() as device:
        problem = Problem(roberta_reader(TINY), some, made_up_logits(some), "fp16", 6, 1.0, CARD)
        device.run_out_above(2 * 384)
        assert card_table.windows_that_fit(problem, 6, tmp_path) == 2


def test_a_teachers_pass(tmp_path):
    chunks = [windows()] * 2
    with card():
        rows = bench_teacher_pass.card_rows({"tiny": TINY}, chunks, CARD, tmp_path)
        text = check_record(rows, "teacher_pass", tmp_path)
    own = [f"kdfast, {name}" for name in ("fp32", "fp16", "fp16, packed")]
    assert [row["pass"] for row in rows] == ["Haystack, fp32", *own]
    for row in rows:
        assert row["windows_per_second"] > 0 and row["peak_memory"] > 0
        assert f"| tiny | {row['pass']} |" in text


def test_the_loss(tmp_path):
    with card():
        report = bench_kd_loss.measure("cuda", [(8, 384)], 0.01)
        rows = kd_loss_report.summary(report)
        text = check_record(rows, "kd_loss", tmp_path)
        assert kd_loss_report.text({"machine": records.machine("cuda"), **report})
    assert {(row["dtype"], row["form"], row["backend"]) for row in rows} == {
        (dtype, form, "native")
        for dtype in ("float32", "float16")
        for form in ("interleaved", "contiguous")
    }
    assert "| 8 x 384, float32 | native |" in text
