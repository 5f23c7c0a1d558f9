"""A training step: kdfast against a padding loop and the Hugging Face Trainer.

All train copies of one student on the same windows with the same loss, in turns. Before any clock,
the gradients of the first step agree, dropout off. Wall time, as a step uses every thread. This is
the table of a CPU; card_table.py has that of a GPU.
"""

import statistics
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from kdfast.common.precision import AUTOCAST
from kdfast.models.span_model import SpanModel
from kdfast.training.flops import count_work, matmul_rate

from . import card_table, gpu, records, train_step_report
from .measure import peak_memory
from .train_candidates import CPU, Kdfast, Padded, Problem, collate
from .train_group import CARD_TABLE, CPU_TABLE, GROUPED, draws, gate, made_up_logits, makers
from .workload import bert_reader, corpus, for_roberta, forward_operations, made_up_corpus

BATCHES = (32, 80)
PRECISIONS = ("no", "bf16")
ATTENTION_DROPOUTS = (0.1, 0.0)
# 80 windows at once, padded to 384, take 20 GB with attention dropout: they run in five passes.
WINDOWS_AT_ONCE = {32: 32, 80: 16}
LAYERS, TEACHER_LAYERS = 6, 12
NO_DROPOUT = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
ROUNDS = {32: 3, 80: 2}


@dataclass(frozen=True)
class Cell:
    """One group of candidates."""

    precision: str
    batch: int
    attention_dropout: float

    @property
    def with_live_teacher(self) -> bool:
        return (self.batch, self.attention_dropout) == (32, 0.1)


def live_teacher(problem: Problem):
    """A forward pass of the teacher over windows of a step, a few like ones at a time."""
    teacher = bert_reader(TEACHER_LAYERS).eval()
    kind = AUTOCAST[problem.precision]

    def run(indices: np.ndarray) -> None:
        ordered = indices[np.argsort(-problem.windows.lengths[indices], kind="stable")]
        for some in np.array_split(ordered, -(-len(ordered) // 8)):
            batch = collate(problem, some, None)
            names = ("input_ids", "attention_mask", "token_type_ids")
            with (
                torch.inference_mode(),
                torch.autocast("cpu", dtype=kind, enabled=kind is not None),
            ):
                teacher(**{name: batch[name] for name in names})

    return run


def run_cell(cell: Cell, windows, folder: Path) -> list[dict]:
    """All candidates of a cell in turns, between them the matrix products; a row for each."""
    student = bert_reader(LAYERS, attention_dropout=cell.attention_dropout)
    logits = made_up_logits(windows)
    problem = Problem(student, windows, logits, cell.precision, WINDOWS_AT_ONCE[cell.batch])
    made = makers(problem, cell.batch, folder, CPU_TABLE)
    group = {name: make() for name, make in made.items()}
    if cell.with_live_teacher:
        live = live_teacher(problem)
        group["kdfast, teacher live"] = Kdfast(problem, folder / "live", live_teacher=live)
    memory = {}
    for name, candidate in group.items():  # a turn that is not timed
        if cell.batch == 32:
            memory[name] = peak_memory(partial(candidate, draws(windows, cell.batch, seed=0)))
        else:
            candidate(draws(windows, problem.windows_at_once, seed=0))
    rounds = ROUNDS[cell.batch]
    # Two a round, so that their lengths together are about those of the other candidates' windows.
    grouped = group[GROUPED].batches_by_length(2 * rounds)
    turns = {name: [] for name in group}
    peaks = []
    for number in range(rounds):
        drawn = draws(windows, cell.batch, seed=number + 1)
        for name, candidate in group.items():
            peaks.append(matmul_rate(CPU, AUTOCAST[cell.precision] or torch.float32))
            steps = grouped[number::rounds] if name == GROUPED else [drawn]
            turns[name] += [candidate(indices) for indices in steps]
    peak = statistics.median(peaks)
    return [
        train_step_report.row(cell, name, turns[name], windows, student.config, peak)
        | {"peak_memory": memory.get(name)}
        for name in group
    ]


@pytest.fixture
def small(tmp_path, device):
    """A group of candidates on a small student and made-up windows, dropout off."""
    windows = made_up_corpus(400).windows()

    def make(dtype=torch.float32, windows_at_once=4):
        student = bert_reader(2, 64, 4, 2000, **NO_DROPOUT).to(dtype)
        logits = made_up_logits(windows)
        problem = Problem(student, windows, logits, "no", windows_at_once, 1e9, device)
        packings = CPU_TABLE | CARD_TABLE
        if device.type == "cuda" and dtype == torch.float64:  # no kernel packs it
            del packings["kdfast, packed"]
        return windows, problem, makers(problem, 8, tmp_path, packings)

    return make


@pytest.mark.parametrize("windows_at_once", [4, 8])
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_gate(small, dtype, limit, windows_at_once, device):
    windows, _, group = small(dtype, windows_at_once)
    gate(group, draws(windows, 8, seed=0), limit, device)


@pytest.mark.parametrize("name", ["Padded", "Kdfast"])
def test_the_gate_can_fail(small, device, tmp_path, name):
    windows, problem, group = small()
    other = problem.teacher_logits.copy()
    other[windows.window_start[draws(windows, 8, seed=0)[0]]] += 0.1
    moved = replace(problem, teacher_logits=other)
    moved = partial(Padded, moved, None) if name == "Padded" else partial(Kdfast, moved, tmp_path)
    with pytest.raises(AssertionError, match="moved"):
        gate(group | {"moved": moved}, draws(windows, 8, seed=0), 1e-5, device)


def test_operations_are_those_that_training_reports(small):
    windows, problem, _ = small()
    counted = count_work(SpanModel(problem.reader)).of(windows.lengths)
    assert counted == pytest.approx(forward_operations(problem.reader.config, windows.lengths))


def test_length_grouping_is_the_trainers_own(small):
    windows, _, group = small()
    random, grouped = (
        np.mean([np.ptp(windows.lengths[batch]) for batch in group[name]().batches_by_length(8)])
        for name in ("HF Trainer", GROUPED)
    )
    assert grouped < random / 2


@pytest.mark.timed
def test_train_step(two_threads, tmp_path, capsys, device, quick):
    found = records.machine(device.type) | {"threads": torch.get_num_threads()}
    questions = made_up_corpus(400) if quick else corpus()
    windows = questions.windows()
    with capsys.disabled():
        if quick or device.type == "cuda":
            plan = card_table.QUICK if quick else card_table.Plan()
            rows = card_table.measure(plan, for_roberta(windows), device, tmp_path)
            lines = gpu.train_step(rows)
            if not quick:
                parts = {"windows": questions.source, "train_step": rows}
                lines.append(records.add_to_card(found, parts))
        else:
            report = {"machine": found, "windows": questions.source}
            report["rows"] = cpu_rows(windows, tmp_path)
            lines = [*train_step_report.text(report), *train_step_report.write(report)]
        print("", *lines, sep="\n")


def cpu_rows(windows, folder: Path) -> list[dict]:
    """The rows of all cells, once the gate has been passed."""
    student = bert_reader(LAYERS, **NO_DROPOUT)
    problem = Problem(student, windows, made_up_logits(windows), "no", 8, 1e9)
    gate(makers(problem, 8, folder, CPU_TABLE), draws(windows, 8, seed=0), 1e-5, CPU)
    rows = []
    for dropout in ATTENTION_DROPOUTS:
        for precision in PRECISIONS:
            for batch in BATCHES:
                cell = Cell(precision, batch, dropout)
                print(cell, flush=True)
                rows += run_cell(cell, windows, folder)
    return rows
