"""The log of a run: a JSON line per step and evaluation, TensorBoard on request, the clock."""

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdfast.common.files import append, read_bytes, write_text
from kdfast.common.folders import subfolder
from kdfast.models.save import writing
from kdfast.training.flops import Work
from kdfast.training.step import StepReport

LOG_FILE = "train_log.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


@dataclass(frozen=True)
class Speed:
    """How fast steps ran. Tokens are real ones; padding_share: padding of what was computed.

    matmul_share: operations in the matrix products of the real tokens, forward and backward, of
    those that the device does in that time in large products of that type.
    """

    windows_per_second: float
    tokens_per_second: float
    padding_share: float
    matmul_share: float


class TrainLog:
    """Appends to output_dir/train_log.jsonl; a resumed run drops the lines after its checkpoint.

    steps: the steps that the run has behind it; evaluated: those before its last evaluation. lost:
    a sentence where lines of these steps are gone, or None.
    Raises UserError where the disk is full.
    """

    def __init__(self, output_dir: Path, steps: int, evaluated: int, tensorboard: bool):
        self.path = output_dir / LOG_FILE
        kept = read_log(output_dir, steps, evaluated)
        self.lost = lost_steps(kept, steps)
        with writing(self.path):
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
            self.file = append(self.path)
        self.writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            subfolder(output_dir / TENSORBOARD_FOLDER)
            self.writer = SummaryWriter(str(output_dir / TENSORBOARD_FOLDER), purge_step=steps)
            for line in kept:  # TensorBoard drops the evaluation after the last step, too
                if line.get("evaluated_after") == steps:
                    self._show_evaluation(steps, line)

    def step(self, report: StepReport, speed: Speed) -> None:
        """Log a step, from values that are on the host already."""
        line = asdict(report)
        parts = line.pop("parts")
        self._write(line | parts | asdict(speed))
        if self.writer:
            for name, value in parts.items():
                self.writer.add_scalar(f"train/{name}", value, report.step)
            for name in ("loss", "grad_norm", "lr"):
                self.writer.add_scalar(f"train/{name}", line[name], report.step)
            for name, value in asdict(speed).items():
                self.writer.add_scalar(f"speed/{name}", value, report.step)

    def evaluation(self, steps: int, metrics: dict[str, Any]) -> None:
        """Log an evaluation after `steps` steps."""
        self._write({"evaluated_after": steps, **metrics})
        self._show_evaluation(steps, metrics)
        self.flush()

    def _show_evaluation(self, steps: int, metrics: dict[str, Any]) -> None:
        for each in metrics.get("files", ()):
            if self.writer:
                for name in ("exact", "f1"):
                    self.writer.add_scalar(f"eval/{name} of {each['file']}", each[name], steps)
        for name, value in metrics.items():
            if self.writer and name not in ("evaluated_after", "files"):
                self.writer.add_scalar(f"eval/{name}", value, steps)

    def flush(self) -> None:
        """Make it durable."""
        with writing(self.path):
            self.file.flush()
            os.fsync(self.file.fileno())
        if self.writer:
            self.writer.flush()

    def close(self) -> None:
        with writing(self.path):
            self.file.close()
        if self.writer:
            self.writer.close()

    def _write(self, line: dict) -> None:
        # JSON has no NaN: a loss or norm that is not finite is null.
        line = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in line.items()
        }
        with writing(self.path):
            self.file.write(json.dumps(line) + "\n")


def read_log(output_dir: Path, steps: int, evaluated: int) -> list[dict]:
    """The lines of the first `steps` steps of a run and of its evaluations up to `evaluated`.

    Damaged lines are left out, and `lost_steps` counts them.
    """
    path = output_dir / LOG_FILE
    lines = []
    content = read_bytes(path).decode(errors="replace") if path.is_file() else ""
    for text in content.splitlines():
        try:
            line = json.loads(text)
            if line.get("step", -1) < steps and line.get("evaluated_after", 0) <= evaluated:
                lines.append(line)
        except (ValueError, TypeError, AttributeError, RecursionError):
            continue  # torn, or not of this program
    return lines


def lost_steps(lines: Sequence[dict], steps: int) -> str | None:
    """A sentence where the log has no line of some of a run's first steps, or None."""
    there = {step for line in lines if type(step := line.get("step")) is int and step >= 0}
    if len(there) >= steps:
        return None
    first = next(step for step in range(len(there) + 1) if step not in there)
    return (
        f"{LOG_FILE} has no line of {steps - len(there)} of the first {steps} steps, the earliest "
        f"being step {first}: they are lost or damaged, and curves go straight over them."
    )


class Clock:
    """Seconds spent in training steps, and what they did; evaluation and saving do not count.

    matmul_rate: operations a second of large matrix products in the run's type. before: `sums` of
    the steps that the run has behind it, as a checkpoint holds them.
    """

    def __init__(self, work: Work, matmul_rate: float, before: Sequence[float] = ()):
        self.work = work
        self.matmul_rate = matmul_rate
        # Seconds, windows, tokens, padded tokens, operations.
        self.sums = np.array(before) if before else np.zeros(5)
        self._since = time.perf_counter()

    def add(self, report: StepReport, lengths: np.ndarray) -> Speed:
        """Count a step that has just ended, over windows of `lengths`; returns its own speed."""
        now = time.perf_counter()
        operations = 3 * self.work.of(lengths)
        spent = now - self._since
        step = np.array([spent, report.windows, report.tokens, report.padded_tokens, operations])
        self._since = now
        self.sums += step
        return self._speed(step)

    def speed(self) -> Speed | None:
        """Of all steps so far; None before the first."""
        return self._speed(self.sums) if self.sums[0] else None

    def _speed(self, sums: np.ndarray) -> Speed:
        seconds, windows, tokens, padded_tokens, operations = map(float, sums)
        return Speed(
            windows_per_second=windows / seconds,
            tokens_per_second=tokens / seconds,
            padding_share=1 - tokens / padded_tokens,
            matmul_share=operations / seconds / self.matmul_rate,
        )

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Time inside does not count."""
        yield
        self._since = time.perf_counter()


def progress_line(report: StepReport, speed: Speed) -> str:
    """Loss, learning rate and speed of a step; the parts of the loss are in the log."""
    line = f"loss {report.loss:.3f} lr {report.lr:.1e} {speed.windows_per_second:.1f} windows/s"
    return line + " skipped" if report.skipped else line
