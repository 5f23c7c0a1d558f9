"""What a run does about a step that is a fault: diagnosis, a folder to replay, one sentence."""

import json
import math
from collections import deque
from dataclasses import asdict
from pathlib import Path

from kdfast.distill import fault_folder
from kdfast.distill.faults import (
    EMPTY,
    OVERFLOW,
    TEACHER,
    WEIGHTS,
    Finding,
    broken_weight,
    examine,
    fault_of,
)
from kdfast.distill.step import Stepper, StepReport
from kdfast.errors import UserError
from kdfast.squad.features import Windows

FOLDERS_AT_MOST = 3  # under --on_nonfinite skip
NAMED_AT_MOST = 3
REMEDIES = {
    WEIGHTS: "go on from a sound checkpoint, or give a sound --student and a lower --learning_rate",
    TEACHER: "delete the teacher's logits in --cache_dir, and they are made anew",
    EMPTY: "delete the features in --cache_dir, and they are made anew",
    OVERFLOW: "give --mixed_precision no, or bf16 where the card has it",
}
REMEDY = "lower --learning_rate, give --mixed_precision no, or leave these questions out"


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
        is_last = stepper.config.on_nonfinite == "halt" or self._is_broken()
        if not is_last and self.faults > FOLDERS_AT_MOST:
            return f"Step {report.step} is skipped: {why}."
        sentence = self._diagnosis(report, why)
        if is_last:
            raise UserError(sentence)
        return sentence

    def _is_broken(self) -> bool:
        """Whether a weight is not finite, so that no step could succeed any more."""
        return broken_weight(self.stepper.updater.named.items()) is not None

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
