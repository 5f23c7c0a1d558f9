"""Numbers that go bad: which steps are faults, which windows and terms they come from.

A step tells its loss, gradient norm and loss scale in its one read. Nothing more is looked at
unless these are bad: then the step's micro-batches are run again under their seeds, on the weights
that the bad step has left alone, and the first term that is not finite is looked for.
"""

import json
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from kdfast.distill import fault_folder
from kdfast.distill.feed import MicroBatch
from kdfast.distill.optim import SCALE_FLOOR
from kdfast.distill.step import Stepper, StepReport
from kdfast.errors import UserError
from kdfast.squad.features import Windows

OVERFLOWS_AT_MOST = 20  # in a row
FOLDERS_AT_MOST = 3  # under --on_nonfinite skip
NAMED_AT_MOST = 3

WEIGHTS = "the student's weights"
TEACHER = "the teacher's logits"
STUDENT = "the student's logits"
EMPTY = "the mask, which leaves no token"
SOFT = "the soft term"
HARD = "the hard term"
GRADIENT = "the gradient (the loss is finite)"
OVERFLOW = "the scaled gradient (the loss is finite)"
TOGETHER = "the gradient (the loss is finite; a window's alone is, too)"

REMEDIES = {
    WEIGHTS: "go on from a sound checkpoint, or give a sound --student and a lower --learning_rate",
    TEACHER: "delete the teacher's logits in --cache_dir, and they are made anew",
    EMPTY: "delete the features in --cache_dir, and they are made anew",
    OVERFLOW: "give --mixed_precision no, or bf16 where the card has it",
}
REMEDY = "lower --learning_rate, give --mixed_precision no, or leave these questions out"


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


def broken_weight(model: nn.Module) -> str | None:
    """The name of a parameter that is not finite, or None. The host waits for the device once."""
    named = list(model.named_parameters())
    sound = torch.stack([torch.isfinite(each).all() for _, each in named]).tolist()
    return next((name for (name, _), good in zip(named, sound, strict=True) if not good), None)


def check_weights(model: nn.Module) -> None:
    """Raise UserError before weights that are not finite replace good ones on the disk."""
    if name := broken_weight(model):
        raise UserError(
            f"The student's weights are not finite any more ({name}) and are not saved: lower "
            "--learning_rate; earlier checkpoints and best/ are whole."
        )


def examine(
    stepper: Stepper, step: int, scale: float | None, batches: list[np.ndarray], count: int
) -> tuple[list[Finding], list[fault_folder.Replayed]]:
    """Run this rank's micro-batches of a step of `count` windows again; what is not finite in them.

    scale: the step's loss scale. Also returns each micro-batch with its logits.
    """
    rank = stepper.ranks.rank
    stepper.model.train()
    broken = broken_weight(stepper.model)
    bad: dict[str, list[int]] = {}
    replayed = []
    for number, batch in enumerate(stepper.feed.micro_batches(batches)):
        # Not under no_grad, where attention may take another kernel than it took.
        with stepper.autocast_to(stepper.autocast):
            logits, _, parts = stepper.rows(step, number, batch)
        logits = logits.detach()
        replayed.append(fault_folder.Replayed(batches[number], batch, logits))
        if broken:
            terms = {WEIGHTS: range(len(batches[number]))}
        else:
            terms = _bad_terms(batch, logits, parts) or _bad_gradients(
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
    batch: MicroBatch, logits: torch.Tensor, parts: torch.Tensor
) -> dict[str, list[int]]:
    """For each term that is the first bad one of some windows, their rows in the micro-batch."""
    mask = torch.ones_like(logits[..., 0], dtype=torch.bool) if batch.mask is None else batch.mask

    def is_bad(values: torch.Tensor) -> torch.Tensor:
        return (~torch.isfinite(values).all(-1) & mask).any(1)

    terms = {EMPTY: ~mask.any(1)}
    if batch.teacher_logits is not None:
        terms[TEACHER] = is_bad(batch.teacher_logits)
    terms[STUDENT] = is_bad(logits)
    terms[SOFT] = ~torch.isfinite(parts[..., 0]).all(1)
    terms[HARD] = ~torch.isfinite(parts[..., 1]).all(1)
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


class Watch:
    """Looks at every step's report, and ends the run, or says what was skipped, at a fault.

    output: the run's folder, where a fault leaves a folder that `python -m kdfast.replay` reads.
    """

    def __init__(self, output: Path, stepper: Stepper, windows: Windows, tokenizer):
        self.output = output
        self.stepper = stepper
        self.windows = windows
        self.tokenizer = tokenizer
        self.scales: deque[tuple[int, float]] = deque(maxlen=100)  # (first step, loss scale)
        self.overflowed: deque[int] = deque(maxlen=100)
        self.faults = 0

    def see(self, report: StepReport) -> str | None:
        """A sentence about a fault under --on_nonfinite skip, else None.

        All ranks call it, with reports that are equal. Raises UserError for a fault under halt,
        and under skip where the weights are not finite, so that no step could succeed.
        """
        stepper = self.stepper
        if report.loss_scale is not None:
            if not self.scales or self.scales[-1][1] != report.loss_scale:
                self.scales.append((report.step, report.loss_scale))
            if report.skipped and math.isfinite(report.loss):
                self.overflowed.append(report.step)
        why = fault_of(report, stepper.updater.overflows)
        if why is None:
            return None
        self.faults += 1
        is_last = stepper.config.on_nonfinite == "halt" or broken_weight(stepper.model) is not None
        if not is_last and self.faults > FOLDERS_AT_MOST:
            return f"Step {report.step} is skipped: {why}."
        sentence = self._diagnosis(report, why)
        if is_last:
            raise UserError(sentence)
        return sentence

    def _diagnosis(self, report: StepReport, why: str) -> str:
        """Find out what was bad, and leave it in a folder: one rank, which has it, does."""
        ranks = self.stepper.ranks
        mine, replayed = examine(
            self.stepper, report.step, report.loss_scale, self.stepper.batches, report.windows
        )
        told = ranks.gather(json.dumps([asdict(each) for each in mine]))
        findings = [Finding(**each) for text in told for each in json.loads(text)]
        teller = findings[0].rank if findings else 0
        kept = ""
        if ranks.rank == teller:
            kept = self._keep(report, why, mine, replayed)
        kept = ranks.share(kept, teller)
        terms = {each.term for each in findings}
        remedy = next((REMEDIES[term] for term in REMEDIES if term in terms), REMEDY)
        return (
            f"Step {report.step} did not reach the weights, as {why}: "
            f"{self._blame(findings)}{self._history()}; {kept}; {remedy}; "
            "earlier checkpoints and best/ are whole."
        )

    def _keep(
        self,
        report: StepReport,
        why: str,
        findings: list[Finding],
        replayed: list[fault_folder.Replayed],
    ) -> str:
        facts = {
            "step": report.step,
            "rank": self.stepper.ranks.rank,
            "ranks": self.stepper.ranks.count,
            "why": why,
            "findings": [asdict(each) for each in findings],
            "report": asdict(report),
            "scales": list(self.scales),
            "overflowed_steps": list(self.overflowed),
        }
        try:
            folder = fault_folder.write(
                self.output, self.stepper, self.windows, self.tokenizer, facts, replayed
            )
        except (OSError, UserError) as error:
            return f"its windows could not be kept ({error})"
        return f"python -m kdfast.replay {folder} runs it again"

    def _blame(self, findings: list[Finding]) -> str:
        """Terms and windows, in words."""
        if not findings:
            return "run again it was finite, so that the hardware or a file may be at fault"
        parts = []
        for each in findings[:NAMED_AT_MOST]:
            if each.term == WEIGHTS:
                return f"{each.term} are not finite ({each.detail})"
            who = f" at rank {each.rank}" if self.stepper.ranks.count > 1 else ""
            parts.append(f"not finite is {each.term} of {self._questions(each.windows)}{who}")
        return " and ".join(parts)

    def _questions(self, windows: list[int]) -> str:
        named = [
            f"question {self.windows.question_ids[int(self.windows.question[window])]} "
            f"(window {window})"
            for window in windows[:NAMED_AT_MOST]
        ]
        more = len(windows) - len(named)
        return ", ".join(named) + (f" and {more} more windows" if more else "")

    def _history(self) -> str:
        """The scaler's, in words."""
        if not self.scales:
            return ""
        changes = ", ".join(f"{scale:g} from step {step}" for step, scale in list(self.scales)[-6:])
        return f"; the loss scale was {changes}, with {len(self.overflowed)} overflows lately"
