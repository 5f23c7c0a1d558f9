"""The candidates of a training step, what they train on, and the gate that they must pass."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from .hf_trainer import BY_LENGTH, RANDOM, HuggingFace
from .measure import free_memory
from .train_candidates import WIDTH, Kdfast, Padded, Problem

GROUPED = "HF Trainer, by length"
CPU_TABLE = {"kdfast": "auto"}
CARD_TABLE = {"kdfast, padded": "off", "kdfast, packed": "on"}

Candidate = Padded | HuggingFace | Kdfast
Makers = dict[str, Callable[[], Candidate]]


def made_up_logits(windows) -> np.ndarray:
    draw = np.random.default_rng(1)
    return draw.normal(0, 3, (len(windows.input_ids), 2)).astype(np.float16)


def draws(windows, batch: int, seed: int) -> np.ndarray:
    """The windows of an unbiased step."""
    return np.random.default_rng(seed).choice(np.flatnonzero(windows.trainable), batch, False)


def makers(problem: Problem, batch: int, folder: Path, packings: dict[str, str]) -> Makers:
    """What makes each candidate. packings: of kdfast, the setting by the candidate's name."""
    return {
        "padded to 384": partial(Padded, problem, WIDTH),
        "padded to the longest": partial(Padded, problem, None),
        "HF Trainer": partial(HuggingFace, problem, batch, folder / "random", RANDOM),
        GROUPED: partial(HuggingFace, problem, batch, folder / "grouped", BY_LENGTH),
        **{
            name: partial(Kdfast, problem, folder / name.replace(", ", "_"), packing)
            for name, packing in packings.items()
        },
    }


def gradients(candidate: Candidate, indices: np.ndarray) -> torch.Tensor:
    """The gradient of a step at all weights, flat, as the optimizer finds it: of the first step
    that fp16's loss scale, which halves meanwhile, does not make overflow."""
    found = []

    def keep(*_):
        grads = [each.grad.flatten().cpu() for each in candidate.model.parameters()]
        found[:] = [torch.cat(grads).double()]

    handle = candidate.optimizer.register_step_pre_hook(keep)
    for _ in range(10):
        candidate(indices)  # the Trainer makes no step of one that overflows
        if found and found[0].isfinite().all():
            break
    handle.remove()
    return found[0]


def gate(group: Makers, indices: np.ndarray, limit: float, device: torch.device) -> None:
    """Every candidate's first gradient against the one padded to 384, relative to its norm."""
    first, *others = group
    expected = gradients(group[first](), indices)
    for name in others:
        free_memory(device)
        error = (gradients(group[name](), indices) - expected).norm() / expected.norm()
        assert error <= limit, f"{name}: {error:.1e}"
    free_memory(device)
