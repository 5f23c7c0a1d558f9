"""The log of a run: a JSON line per step and evaluation, TensorBoard on request, the clock."""

import json
import math
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from kdfast.distill.step import StepReport

LOG_FILE = "train_log.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


class TrainLog:
    """Appends to output_dir/train_log.jsonl; a resumed run drops the lines after its checkpoint.

    steps: the steps that the run has behind it.
    """

    def __init__(self, output_dir: Path, steps: int, tensorboard: bool):
        self.path = output_dir / LOG_FILE
        kept = read_log(output_dir, steps)
        self.file = self.path.open("w", encoding="utf-8")
        self.file.writelines(json.dumps(line) + "\n" for line in kept)
        self.writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(output_dir / TENSORBOARD_FOLDER), purge_step=steps)

    def step(self, report: StepReport) -> None:
        """Log a step, from values that are on the host already."""
        self._write(asdict(report))
        if self.writer:
            for name in ("loss", "soft", "hard", "grad_norm", "lr"):
                self.writer.add_scalar(f"train/{name}", getattr(report, name), report.step)

    def evaluation(self, steps: int, metrics: dict[str, float]) -> None:
        """Log an evaluation after `steps` steps."""
        self._write({"evaluated_after": steps, **metrics})
        if self.writer:
            for name, value in metrics.items():
                self.writer.add_scalar(f"eval/{name}", value, steps)
        self.flush()

    def flush(self) -> None:
        self.file.flush()
        if self.writer:
            self.writer.flush()

    def close(self) -> None:
        self.flush()
        self.file.close()
        if self.writer:
            self.writer.close()

    def _write(self, line: dict) -> None:
        # JSON has no NaN: a loss or norm that is not finite is null.
        line = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in line.items()
        }
        self.file.write(json.dumps(line) + "\n")


def read_log(output_dir: Path, steps: int) -> list[dict]:
    """The lines of the first `steps` steps of a run, a torn last line left out."""
    path = output_dir / LOG_FILE
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if line.get("step", -1) < steps and line.get("evaluated_after", 0) <= steps:
            lines.append(line)
    return lines


class Clock:
    """Seconds spent in training steps, and what they did; evaluation and saving do not count."""

    def __init__(self):
        self.seconds = 0.0
        self.windows = self.tokens = self.padded_tokens = 0
        self._since = time.perf_counter()

    def add(self, report: StepReport) -> None:
        """Count a step that has just ended."""
        now = time.perf_counter()
        self.seconds += now - self._since
        self._since = now
        self.windows += report.windows
        self.tokens += report.tokens
        self.padded_tokens += report.padded_tokens

    @contextmanager
    def stopped(self):
        """Time inside does not count."""
        yield
        self._since = time.perf_counter()

    @property
    def windows_per_second(self) -> float:
        return self.windows / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def padding_share(self) -> float:
        return 1 - self.tokens / self.padded_tokens if self.padded_tokens else 0.0

    def line(self, report: StepReport) -> str:
        """What the progress bar shows."""
        return (
            f"loss {report.loss:.3f} soft {report.soft:.3f} hard {report.hard:.3f} "
            f"lr {report.lr:.1e} {self.windows_per_second:.1f} windows/s"
            + (" skipped" if report.skipped else "")
        )
