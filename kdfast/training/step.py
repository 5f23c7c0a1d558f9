"""The parts of an optimizer step: its objective, its sums, its report."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from kdfast.common.run import Run
from kdfast.config import LossSettings
from kdfast.fused_kd_loss import kd_loss_rows
from kdfast.models.window_loader import MicroBatch


@dataclass(frozen=True)
class Objective:
    """What is minimized.

    Attributes:
        parts: Names of the two parts of the loss, for log and messages.
        loss: (the model's output, micro-batch of B windows) -> row losses (B, ...), whose sum over
            all windows is divided by their number, and their parts (B, ..., 2).
        initial_scale: Of the loss, under fp16; the scaler halves one that is too large.
    """

    parts: tuple[str, str]
    loss: Callable[[torch.Tensor, MicroBatch], tuple[torch.Tensor, torch.Tensor]]
    initial_scale: float = 2.0**16


def span_objective(settings: LossSettings) -> Objective:
    """The teacher's distributions and the gold spans, over the logits (B, L, 2) of a span model."""

    def loss(logits: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        return kd_loss_rows(
            logits,
            batch.teacher_logits,
            batch.start_positions,
            batch.end_positions,
            temperature=settings.temperature,
            distillation_loss_weight=settings.distillation_loss_weight,
            distillation_loss=settings.distillation_loss,
            convention=settings.convention,
            mask=batch.mask,
            backend=None,
        )

    return Objective(("soft", "hard"), loss)


def layer_objective() -> Objective:
    """The sum of the two terms (B, 2) that `teachers.layers.LayerLosses` returns.

    The gradients of attention are small: at a scale of 2**16 a third of them would be 0 in fp16.
    """
    return Objective(
        ("hidden", "attention"), lambda terms, batch: (terms.sum(1), terms), initial_scale=2.0**20
    )


class StepSums:
    """Sums of one rank over the micro-batches of a step of `windows` windows."""

    def __init__(self, run: Run, windows: int):
        self.run = run
        self.windows = windows
        self.loss_and_parts = torch.zeros(3, device=run.device)
        self.dropped = False
        self._started = time.monotonic()

    def add(self, loss: torch.Tensor, row_parts: torch.Tensor) -> None:
        """Add a micro-batch. loss: scalar, divided by the windows of the step already."""
        parts = row_parts.detach().flatten(0, -2).sum(0) / self.windows
        self.loss_and_parts += torch.cat([loss.detach()[None], parts]).float()

    def must_drop(self, done: int, of: int) -> bool:
        """Whether this rank was told to stop and the step would end too late, `done` of its
        micro-batches being done. It is dropped then: no rank uses its gradients."""
        self.dropped = self.dropped or self.run.stop.must_drop(self._started, done, of)
        return self.dropped


class Totals:
    """Named numbers of a step in one fp32 tensor on the device: ranks add them up in one reduction,
    and the host reads them at once."""

    def __init__(self, on_device: Mapping[str, torch.Tensor], on_host: Mapping[str, float]):
        self.names = [*on_device, *on_host]
        values = torch.stack([each.float() for each in on_device.values()])
        host = torch.tensor(list(on_host.values()), dtype=torch.float32)
        self.values = torch.cat([values, host.to(values.device, non_blocking=True)])

    def __getitem__(self, name: str) -> torch.Tensor:
        """A scalar on the device."""
        return self.values[self.names.index(name)]


def read_step(totals: Totals, **more: torch.Tensor) -> dict[str, float]:
    """All numbers by name: the one place of a step where the host waits for the device."""
    values = torch.cat([totals.values, torch.stack([each.float() for each in more.values()])])
    return dict(zip([*totals.names, *more], values.tolist(), strict=True))


@dataclass(frozen=True)
class StepReport:
    """What one step did. loss and its parts are means over the step's windows.

    parts: by the names of the objective's. Soft and hard part are not weighted: loss = w * soft +
    (1 - w) * hard. skipped: loss or gradient was not finite, and the weights stayed as they were.
    max_tokens: what the micro-batches were cut by. loss_scale: the scaler's in this step, None
    without one.
    """

    step: int
    loss: float
    parts: dict[str, float]
    grad_norm: float
    lr: float
    windows: int
    tokens: int
    padded_tokens: int
    micro_batches: int
    max_tokens: int
    skipped: bool
    loss_scale: float | None = None


def seed_generators(device: torch.device, *key: int) -> None:
    """Seed torch's generators of the host and of `device` from `key`, so that a step replays
    whatever ran before it. torch.manual_seed would draw the same, but it goes through all devices.
    """
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)


class Callback:
    """What happens around the steps of the loop, which calls each of these after every step, in
    this order, and the last three before the first one too. Here they do nothing."""

    def log_step(self, report: StepReport, indices: np.ndarray) -> None:
        """A step over the windows `indices` has ended."""

    def check_finite(self, report: StepReport, micro_batches: list[np.ndarray]) -> None:
        """Raise UserError for a step after which the run must not go on."""

    def place_student_if_last(self) -> None:
        """Put the trained model into its place after the last step."""

    def evaluate_if_due(self) -> None:
        """Evaluate every so many steps."""

    def save_if_due(self) -> None:
        """Write a checkpoint every so many steps."""
