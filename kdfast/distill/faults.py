"""Numbers that go bad: which steps are faults, which windows and terms they come from.

A step tells its loss, gradient norm and loss scale in its one read. Nothing more is looked at
unless these are bad: then the step's micro-batches are run again under their seeds, on the weights
that the bad step has left alone, and the first term that is not finite is looked for.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from kdfast.distill import fault_folder
from kdfast.distill.feed import MicroBatch
from kdfast.distill.optim import SCALE_FLOOR
from kdfast.distill.step import Stepper, StepReport
from kdfast.errors import UserError

OVERFLOWS_AT_MOST = 20  # in a row

WEIGHTS = "the student's weights"
TEACHER = "the teacher's logits"
STUDENT = "the student's logits"
EMPTY = "the mask, which leaves no token"
PARTS = {
    "soft": "the soft term",
    "hard": "the hard term",
    "hidden": "the hidden states' term",
    "attention": "the attention's term",
}
GRADIENT = "the gradient (the loss is finite)"
OVERFLOW = "the scaled gradient (the loss is finite)"
TOGETHER = "the gradient (the loss is finite; a window's alone is, too)"


@dataclass(frozen=True)
class Finding:
    """A term that is not finite, and the windows where it is not. rank: who found it.

    detail: which weight, for WEIGHTS.
    """

    term: str
    windows: list[int]
    rank: int
    detail: str = ""


def fault_of(report: StepReport, overflows: int) -> str | None:
    """Why a step is a fault; None for a good one, and for an overflow that is the scaler's to mend.

    overflows: of the scaler, one after another, this step's among them.
    """
    if not math.isfinite(report.loss):
        return f"the loss is {report.loss}"
    if math.isfinite(report.grad_norm):
        return None
    if report.loss_scale is None:
        return f"the gradient's norm is {report.grad_norm}"
    if report.loss_scale <= SCALE_FLOOR:
        return f"the gradient overflows at the lowest loss scale, {SCALE_FLOOR:g}"
    if overflows >= OVERFLOWS_AT_MOST:
        return f"the gradient has overflowed in {overflows} steps in a row"
    return None


def broken_weight(parameters: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """The name of a parameter that is not finite, or None. The host waits for the device once."""
    named = list(parameters)
    sound = torch.stack([torch.isfinite(each).all() for _, each in named]).tolist()
    return next((name for (name, _), good in zip(named, sound, strict=True) if not good), None)


def check_weights(model: nn.Module) -> None:
    """Raise UserError before weights that are not finite replace good ones on the disk."""
    if name := broken_weight(model.named_parameters()):
        raise UserError(
            f"The student's weights are not finite any more ({name}) and are not saved: lower "
            "--learning_rate; earlier checkpoints and best/ are whole."
        )


def examine(
    stepper: Stepper, step: int, scale: float | None, batches: list[np.ndarray], count: int
) -> tuple[list[Finding], list[fault_folder.Replayed]]:
    """Run this rank's micro-batches of a step of `count` windows again; what is not finite in them.

    scale: the step's loss scale. Also returns each micro-batch with what became of it.
    """
    rank = stepper.ranks.rank
    stepper.model.train()
    broken = broken_weight(stepper.updater.named.items())
    bad: dict[str, list[int]] = {}
    replayed = []
    for number, batch in enumerate(stepper.feed.micro_batches(batches)):
        # Not under no_grad, where attention may take another kernel than it took.
        with stepper.autocast_to(stepper.autocast):
            output, _, parts = stepper.rows(step, number, batch)
        output = output.detach()
        replayed.append(fault_folder.Replayed(batches[number], batch, output))
        if broken:
            terms = {WEIGHTS: range(len(batches[number]))}
        else:
            named = dict(zip(stepper.PARTS, parts.unbind(-1), strict=True))
            terms = _bad_terms(batch, output, named) or _bad_gradients(
                stepper, step, number, batch, scale, count
            )
        for term, rows in terms.items():
            bad.setdefault(term, []).extend(batches[number][list(rows)].tolist())
    findings = [
        Finding(term, windows, rank, (broken or "") if term == WEIGHTS else "")
        for term, windows in bad.items()
    ]
    return findings, replayed


def _bad_terms(
    batch: MicroBatch, output: torch.Tensor, parts: dict[str, torch.Tensor]
) -> dict[str, list[int]]:
    """For each term that is the first bad one of some windows, their rows in the micro-batch."""
    mask = batch.mask
    if mask is None:
        mask = torch.ones_like(batch.inputs["input_ids"], dtype=torch.bool)

    def is_bad(logits: torch.Tensor) -> torch.Tensor:
        return (~torch.isfinite(logits).all(-1) & mask).any(1)

    terms = {EMPTY: ~mask.any(1)}
    if batch.teacher_logits is not None:
        terms[TEACHER] = is_bad(batch.teacher_logits)
    if output.dim() == 3:
        terms[STUDENT] = is_bad(output)
    for name, values in parts.items():
        terms[PARTS[name]] = ~torch.isfinite(values.reshape(len(mask), -1)).all(1)
    left = torch.ones(len(mask), dtype=torch.bool, device=mask.device)
    found = {}
    for term, bad in terms.items():
        if rows := torch.nonzero(bad & left)[:, 0].tolist():
            found[term] = rows
        left &= ~bad
    return found


def _bad_gradients(
    stepper: Stepper, step: int, number: int, batch: MicroBatch, scale: float | None, count: int
) -> dict[str, list[int]]:
    """The rows of a micro-batch of finite losses whose scaled gradient is not finite."""

    def is_finite(rows: Sequence[int]) -> bool:
        # Run again each time: a compiled graph cannot be gone through twice.
        with stepper.autocast_to(stepper.autocast):
            _, row_loss, _ = stepper.rows(step, number, batch)
        loss = row_loss[list(rows)].sum() / count * (1.0 if scale is None else scale)
        wanted = stepper.updater.parameters
        gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
        return all(bool(torch.isfinite(each).all()) for each in gradients if each is not None)

    everything = range(len(batch.start_positions))
    if is_finite(everything):
        return {}
    alone = [row for row in everything if not is_finite([row])]
    if not alone:
        return {TOGETHER: list(everything)}
    return {GRADIENT if scale is None else OVERFLOW: alone}
