"""The table of a training step on a GPU: readers of true size with random weights, in fp16.

Each turn makes its candidate, takes a few steps untimed, times the next ones and gives all memory
back, as several sets of weights and of Adam's moments would not fit. Gradients agree before any
clock: in fp32 first, then in fp16.
"""

import re
import statistics
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from kdfast.common.device import is_out_of_memory
from kdfast.common.precision import AUTOCAST
from kdfast.data.windows import Windows
from kdfast.training.flops import matmul_rate

from .hf_trainer import RANDOM, HuggingFace
from .measure import free_memory, peak_on_card
from .train_candidates import WIDTH, Padded, Problem, Turn
from .train_group import CARD_TABLE, GROUPED, draws, gate, made_up_logits, makers
from .train_step_report import row
from .workload import ROBERTAS, Shape, roberta_reader

# Relative to the gradient's norm. fp16 keeps 11 bits of each product, in every candidate.
GATES = {"no": 1e-4, "fp16": 1e-2}
# Operations a second in dense fp16 products, by NVIDIA's data sheets; the first one that matches.
DATA_SHEETS = {
    r"V100.*PCIE": 112e12,
    r"V100": 125e12,
    r"\bT4\b": 65e12,
    r"A100": 312e12,
    r"\bL4\b": 121e12,
    r"H100 PCIe": 756e12,
    r"H[12]00": 989e12,
}


@dataclass(frozen=True)
class Plan:
    """How much is measured: rounds of a turn for each candidate, each of `warm` steps that are not
    timed and `steps` that are."""

    models: dict[str, Shape] = field(default_factory=lambda: ROBERTAS)
    batch: int = 80
    rounds: int = 3
    warm: int = 3
    steps: int = 10


QUICK = Plan({"2 layers x 64": Shape(2, 64, 4)}, batch=8, rounds=1, warm=1, steps=2)


@dataclass(frozen=True)
class Cell:
    """What `train_step_report.row` names."""

    precision: str
    batch: int
    attention_dropout: float = 0.0


def data_sheet(card: str) -> float | None:
    """The card's rate by its data sheet, where this file knows it."""
    return next((rate for name, rate in DATA_SHEETS.items() if re.search(name, card)), None)


def measure(plan: Plan, windows: Windows, device: torch.device, folder: Path) -> list[dict]:
    """A row for each model and candidate. windows: `workload.for_roberta`'s."""
    rows = []
    precision = "fp16" if device.type == "cuda" else "no"
    for name, shape in plan.models.items():
        still = Problem(
            roberta_reader(shape, dropout=0.0),
            windows,
            made_up_logits(windows),
            "no",
            windows_at_once=4,
            max_grad_norm=1e9,
            device=device,
        )
        for kind in dict.fromkeys(("no", precision)):
            group = makers(replace(still, precision=kind), 8, folder, CARD_TABLE)
            gate(group, draws(windows, 8, seed=0), GATES[kind], device)
        problem = replace(
            still, reader=roberta_reader(shape), precision=precision, max_grad_norm=1.0
        )
        at_once = windows_that_fit(problem, plan.batch, folder)
        problem = replace(problem, windows_at_once=at_once)
        rows += [{"model": name, **each} for each in measure_model(plan, problem, folder)]
    return rows


def windows_that_fit(problem: Problem, batch: int, folder: Path) -> int:
    """The largest equal part of a batch whose windows the padding candidates take at once."""
    longest = np.argsort(-problem.windows.lengths, kind="stable")[:batch]
    for parts in range(1, batch + 1):
        if batch % parts:
            continue
        smaller = replace(problem, windows_at_once=batch // parts)
        try:
            Padded(smaller, WIDTH)(longest)
            HuggingFace(smaller, batch, folder / "fits", RANDOM)(longest)
            return batch // parts
        except RuntimeError as error:
            if not is_out_of_memory(error) or parts == batch:
                raise
        finally:
            free_memory(problem.device)
    raise AssertionError("a batch has a part of one window")


def measure_model(plan: Plan, problem: Problem, folder: Path) -> list[dict]:
    """All candidates of a model in turns; a row for each."""
    device, windows = problem.device, problem.windows
    group = makers(problem, plan.batch, folder, CARD_TABLE)
    turns: dict[str, list[Turn]] = {name: [] for name in group}
    peaks: dict[str, list[int | None]] = {name: [] for name in group}
    rates = []
    for number in range(plan.rounds):
        seeds = range(number * 1000, number * 1000 + plan.warm + plan.steps)
        drawn = [draws(windows, plan.batch, seed) for seed in seeds]
        for name, make in group.items():
            rates.append(matmul_rate(device, AUTOCAST[problem.precision] or torch.float32))
            candidate, steps = make(), drawn
            if name == GROUPED:
                timed = candidate.batches_by_length(plan.rounds * plan.steps)[number :: plan.rounds]
                steps = drawn[: plan.warm] + timed
            candidate(*steps[: plan.warm])
            turn, peak = peak_on_card(device, partial(candidate, *steps[plan.warm :]))
            turns[name].append(turn)
            peaks[name].append(peak)
            del candidate
            free_memory(device)
    rate = statistics.median(rates)
    sheet = data_sheet(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    rows = []
    for name in group:
        cell = Cell(problem.precision, plan.batch)
        each = row(cell, name, turns[name], windows, problem.reader.config, rate)
        rows.append(
            each
            | {
                "windows_at_once": None if name.startswith("kdfast") else problem.windows_at_once,
                "share_of_data_sheet": sheet and round(each["share_of_peak"] * rate / sheet, 4),
                "peak_memory": None if None in peaks[name] else max(peaks[name]),
            }
        )
    return rows
