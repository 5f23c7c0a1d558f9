"""A training step: kdfast against a padding loop and the Hugging Face Trainer.

All train copies of one student on the same windows with the same loss, in turns. Before any clock,
the gradients of the first step agree, dropout off. Wall time, as a step uses every thread.
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

from . import train_step_report
from .bert_reader import bert_reader, forward_operations
from .hf_trainer import BY_LENGTH, RANDOM, HuggingFace
from .interleaved import machine
from .peak_memory import peak_memory
from .reading_corpus import corpus, made_up_corpus
from .train_candidates import CPU, WIDTH, Kdfast, Padded, Problem, collate

BATCHES = (32, 80)
PRECISIONS = ("no", "bf16")
ATTENTION_DROPOUTS = (0.1, 0.0)
# 80 windows at once, padded to 384, take 20 GB with attention dropout: they run in five passes.
WINDOWS_AT_ONCE = {32: 32, 80: 16}
LAYERS, TEACHER_LAYERS = 6, 12
NO_DROPOUT = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
GROUPED = "HF Trainer, by length"
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


def made_up_logits(windows) -> np.ndarray:
    draw = np.random.default_rng(1)
    return draw.normal(0, 3, (len(windows.input_ids), 2)).astype(np.float16)


def draws(windows, batch: int, seed: int) -> np.ndarray:
    """The windows of an unbiased step."""
    return np.random.default_rng(seed).choice(np.flatnonzero(windows.trainable), batch, False)


def candidates(cell: Cell, problem: Problem, folder: Path) -> dict:
    group = {
        "padded to 384": Padded(problem, WIDTH),
        "padded to the longest": Padded(problem, None),
        "HF Trainer": HuggingFace(problem, cell.batch, folder / "random", RANDOM),
        GROUPED: HuggingFace(problem, cell.batch, folder / "grouped", BY_LENGTH),
        "kdfast": Kdfast(problem, folder / "cached"),
    }
    if cell.with_live_teacher:
        live = live_teacher(problem)
        group["kdfast, teacher live"] = Kdfast(problem, folder / "live", live)
    return group


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


def gradients(candidate, indices: np.ndarray) -> torch.Tensor:
    """The gradient of one step at all weights, flat, as the optimizer finds it."""
    found = []

    def keep(*_):
        found.append(torch.cat([each.grad.flatten() for each in candidate.model.parameters()]))

    handle = candidate.optimizer.register_step_pre_hook(keep)
    candidate(indices)
    handle.remove()
    return found[0].double()


def gate(group: dict, indices: np.ndarray, limit: float) -> None:
    """Every candidate's first gradient against the one padded to 384, relative to its norm."""
    first, *others = group
    expected = gradients(group[first], indices)
    for name in others:
        error = (gradients(group[name], indices) - expected).norm() / expected.norm()
        assert error <= limit, f"{name}: {error:.1e}"


def run_cell(cell: Cell, windows, folder: Path) -> list[dict]:
    """All candidates of a cell in turns, between them the matrix products; a row for each."""
    student = bert_reader(LAYERS, attention_dropout=cell.attention_dropout)
    logits = made_up_logits(windows)
    problem = Problem(student, windows, logits, cell.precision, WINDOWS_AT_ONCE[cell.batch])
    group = candidates(cell, problem, folder)
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
def small(tmp_path):
    """A group of candidates on a small student and made-up windows, dropout off."""
    windows = made_up_corpus(400).windows()

    def make(dtype=torch.float32, windows_at_once=4):
        student = bert_reader(2, 64, 4, 2000, **NO_DROPOUT).to(dtype)
        problem = Problem(student, windows, made_up_logits(windows), "no", windows_at_once, 1e9)
        return windows, problem, candidates(Cell("no", 8, 0.0), problem, tmp_path)

    return make


@pytest.mark.parametrize("windows_at_once", [4, 8])
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_gate(small, dtype, limit, windows_at_once):
    windows, _, group = small(dtype, windows_at_once)
    gate(group, draws(windows, 8, seed=0), limit)


def test_the_gate_can_fail(small):
    windows, problem, group = small()
    other = problem.teacher_logits.copy()
    other[windows.window_start[draws(windows, 8, seed=0)[0]]] += 0.1
    moved = {"moved": Padded(replace(problem, teacher_logits=other), None)}
    with pytest.raises(AssertionError, match="moved"):
        gate(group | moved, draws(windows, 8, seed=0), 1e-5)


def test_operations_are_those_that_training_reports(small):
    windows, problem, _ = small()
    counted = count_work(SpanModel(problem.reader)).of(windows.lengths)
    assert counted == pytest.approx(forward_operations(problem.reader.config, windows.lengths))


def test_length_grouping_is_the_trainers_own(small):
    windows, _, group = small()
    random, grouped = (
        np.mean([np.ptp(windows.lengths[batch]) for batch in group[name].batches_by_length(8)])
        for name in ("HF Trainer", GROUPED)
    )
    assert grouped < random / 2


@pytest.mark.timed
def test_train_step(two_threads, tmp_path, capsys):
    found = machine("cpu") | {"threads": torch.get_num_threads()}
    questions = corpus()
    windows = questions.windows()
    student = bert_reader(LAYERS, **NO_DROPOUT)
    problem = Problem(student, windows, made_up_logits(windows), "no", 8, 1e9)
    gate(candidates(Cell("no", 8, 0.0), problem, tmp_path), draws(windows, 8, seed=0), 1e-5)
    rows = []
    for dropout in ATTENTION_DROPOUTS:
        for precision in PRECISIONS:
            for batch in BATCHES:
                cell = Cell(precision, batch, dropout)
                with capsys.disabled():
                    print(cell, flush=True)
                rows += run_cell(cell, windows, tmp_path)
    report = {"machine": found, "windows": questions.source, "rows": rows}
    written = train_step_report.write(report)
    with capsys.disabled():
        print("", *train_step_report.text(report), *written, sep="\n")
