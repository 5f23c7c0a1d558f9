"""Steps whose loss or gradient is not finite: which of them end a run, and what they come from.

A step reports its loss, gradient norm and loss scale in its one read of the device. Nothing more is
looked at unless these are bad: then the step's micro-batches run again under their seeds, on the
weights that the bad step has left alone, and the first term that is not finite is looked for.
"""

import json
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from kdfast.common.errors import UserError
from kdfast.data.windows import Windows
from kdfast.models.checks import nonfinite_weight
from kdfast.models.inference import forward_windows
from kdfast.models.save import check_weights, kept_models
from kdfast.models.window_loader import MicroBatch
from kdfast.training.assemble import Training
from kdfast.training.optimizer import SCALE_FLOOR
from kdfast.training.step import StepReport, seed_generators

OVERFLOWS_AT_MOST = 20  # in a row
LOOKED_AT = 4  # windows, before weights are kept
# A sound run skips a few steps at its start, until the loss scale fits, and one in 2,000 later.
# Updates drive the learning rate: a run that skips half ends in the middle of its schedule.
USED_AT_LEAST = 0.5  # of the steps
EXAMINED_AT_MOST = 3  # steps, under --on_nonfinite skip
NAMED_AT_MOST = 3  # terms, and questions of each

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

REMEDIES = {
    WEIGHTS: "give a sound --student, or a lower --learning_rate",
    TEACHER: "delete the teacher's logits in --cache_dir, and they are computed again",
    EMPTY: "delete the features in --cache_dir, and they are prepared again",
    OVERFLOW: "give --mixed_precision no, or bf16 where the card has it",
}
REMEDY = "lower --learning_rate, give --mixed_precision no, or leave these questions out"


@dataclass(frozen=True)
class Finding:
    """A term that is not finite, and the windows where it is not. rank: where it was found.

    detail: which weight, for WEIGHTS.
    """

    term: str
    windows: list[int]
    rank: int
    detail: str = ""


class NonfiniteSteps:
    """Looks at every step's report, and ends the run, or says what was skipped."""

    def __init__(self, training: Training, windows: Windows):
        self.training = training
        self.windows = windows
        self.scales: deque[tuple[int, float]] = deque(maxlen=6)  # (first step, loss scale)
        self.overflowed: deque[int] = deque(maxlen=100)
        self.count = 0
        self._sound_after = -1  # steps

    def check(self, report: StepReport, micro_batches: list[np.ndarray]) -> str | None:
        """A sentence about a step that is skipped under --on_nonfinite skip, else None.

        All ranks call it, with equal reports, each with its own micro-batches of the step. Raises
        UserError under halt, and under skip where the weights are not finite, so that no step could
        succeed.
        """
        training = self.training
        if report.loss_scale is not None:
            if not self.scales or self.scales[-1][1] != report.loss_scale:
                self.scales.append((report.step, report.loss_scale))
            if report.skipped and math.isfinite(report.loss):
                self.overflowed.append(report.step)
        why = why_bad(report, training.optimizer.overflows)
        if why is None:
            return None
        self.count += 1
        ends = training.settings.on_nonfinite == "halt" or bool(
            nonfinite_weight(training.optimizer.named.items())
        )
        if not ends and self.count > EXAMINED_AT_MOST:
            return f"Step {report.step} is skipped: {why}."
        sentence = self._diagnosis(report, micro_batches, why)
        if ends:
            raise UserError(sentence)
        return sentence

    def check_logits(self) -> None:
        """Raise UserError where weights, or logits of some windows in fp32, are not finite.

        Finite weights may be so large that a forward pass overflows. All ranks call it before the
        weights are measured or kept.
        """
        training = self.training
        run, steps = training.run, training.progress.steps
        if self._sound_after == steps:
            return
        check_weights(training.student, run.output)
        few = training.order.step(max(0, steps - 1))[:LOOKED_AT]
        passes = forward_windows(training.student, self.windows, [few], run.device, None)
        if run.ranks.any(not all(np.isfinite(rows).all() for _, rows in passes)):
            kept = kept_models(run.output) or "; --save_steps would keep earlier weights"
            raise UserError(
                f"After {steps} steps the student's weights are so large that its logits are not "
                f"finite, and they are not saved: lower --learning_rate{kept}."
            )
        self._sound_after = steps

    def why_too_few_updates(self) -> str | None:
        """A sentence, without a full stop, about a run most of whose steps were skipped."""
        used, steps = self.training.optimizer.updates, self.training.progress.steps
        if used >= USED_AT_LEAST * steps:
            return None
        return (
            f"{f'Only {used}' if used else 'None'} of {steps} steps reached the weights, as the "
            "gradients of the others were not finite, so that the student is not what the settings "
            "ask for: check the student's weights, lower --learning_rate, or give "
            "--mixed_precision no, or bf16 where the card has it"
        )

    def _diagnosis(self, report: StepReport, micro_batches: list[np.ndarray], why: str) -> str:
        """The step, the questions, the term, the scaler's history and a remedy, in one sentence."""
        run = self.training.run
        own = examine(self.training, report, micro_batches)
        told = run.ranks.gather(json.dumps([asdict(each) for each in own]))
        findings = [Finding(**each) for text in told for each in json.loads(text)]
        terms = {each.term for each in findings}
        remedy = next((REMEDIES[term] for term in REMEDIES if term in terms), REMEDY)
        return (
            f"Step {report.step} did not reach the weights, as {why}: "
            f"{self._blame(findings)}{self._history()}; {remedy}"
            f"{kept_models(run.output)}."
        )

    def _blame(self, findings: list[Finding]) -> str:
        """Terms and windows, in words."""
        if not findings:
            return "run again it was finite, so that the hardware or a file may be at fault"
        parts = []
        for each in findings[:NAMED_AT_MOST]:
            if each.term == WEIGHTS:
                return f"{each.term} are not finite ({each.detail})"
            who = f" at rank {each.rank}" if self.training.run.ranks.count > 1 else ""
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
        changes = ", ".join(f"{scale:g} from step {step}" for step, scale in self.scales)
        return f"; the loss scale was {changes}, with {len(self.overflowed)} overflows lately"


def why_bad(report: StepReport, overflows: int) -> str | None:
    """Why a step cannot be used; None for a good one, and for an overflow that the scaler mends.

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


def examine(
    training: Training, report: StepReport, micro_batches: list[np.ndarray]
) -> list[Finding]:
    """Run this rank's micro-batches of a reported step again: what is not finite in them."""
    rank = training.run.ranks.rank
    training.model.train()
    if broken := nonfinite_weight(training.optimizer.named.items()):
        return [Finding(WEIGHTS, [], rank, broken)]
    bad: dict[str, list[int]] = {}
    for number, batch in enumerate(training.loader.micro_batches(micro_batches)):
        # Not under no_grad, where attention may take another kernel than it took.
        output, _, parts = rows(training, report.step, number, batch)
        named = dict(zip(training.objective.parts, parts.detach().unbind(-1), strict=True))
        terms = _bad_terms(batch, output.detach(), named)
        for term, places in (terms or _bad_gradients(training, report, number, batch)).items():
            bad.setdefault(term, []).extend(micro_batches[number][list(places)].tolist())
    return [Finding(term, windows, rank) for term, windows in bad.items()]


def rows(
    training: Training, step: int, number: int, batch: MicroBatch
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, row losses and their parts of micro-batch `number`, as the step computed them."""
    run = training.run
    seed_generators(run.device, training.settings.seed, step, run.ranks.rank, number)
    with run.autocast():
        output = training.forward(**batch.inputs)
        with run.full_precision():
            return output, *training.objective.loss(output, batch)


def _bad_terms(
    batch: MicroBatch, output: torch.Tensor, parts: dict[str, torch.Tensor]
) -> dict[str, list[int]]:
    """For each term that is the first bad one of some windows, their rows in the micro-batch."""
    mask = batch.mask
    if mask is None:
        ids = batch.inputs["input_ids"]
        assert ids is not None
        mask = torch.ones_like(ids, dtype=torch.bool)

    def is_bad(logits: torch.Tensor) -> torch.Tensor:
        return (~torch.isfinite(logits).all(-1) & mask).any(1)

    terms = {EMPTY: ~mask.any(1)}
    if batch.teacher_logits is not None:
        terms[TEACHER] = is_bad(batch.teacher_logits)
    if output.dim() == 3:
        terms[STUDENT] = is_bad(output)
    for name, values in parts.items():
        terms[PARTS.get(name, name)] = ~torch.isfinite(values.reshape(len(mask), -1)).all(1)
    left = torch.ones(len(mask), dtype=torch.bool, device=mask.device)
    found = {}
    for term, bad in terms.items():
        if rows := torch.nonzero(bad & left)[:, 0].tolist():
            found[term] = rows
        left &= ~bad
    return found


def _bad_gradients(
    training: Training, report: StepReport, number: int, batch: MicroBatch
) -> dict[str, list[int]]:
    """The rows of a micro-batch of finite losses whose scaled gradient is not finite."""
    scale = report.loss_scale

    def is_finite(places: Sequence[int]) -> bool:
        # Run again each time: a compiled graph cannot be gone through twice.
        _, row_loss, _ = rows(training, report.step, number, batch)
        loss = row_loss[list(places)].sum() / report.windows * (1.0 if scale is None else scale)
        wanted = training.optimizer.parameters
        gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
        return all(bool(torch.isfinite(each).all()) for each in gradients if each is not None)

    everything = range(len(batch.start_positions))
    if is_finite(everything):
        return {}
    alone = [row for row in everything if not is_finite([row])]
    if not alone:
        return {TOGETHER: list(everything)}
    return {GRADIENT if scale is None else OVERFLOW: alone}
