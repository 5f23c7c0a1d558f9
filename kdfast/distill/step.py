"""One optimizer step: micro-batches in, one update and one read out."""

from dataclasses import dataclass

import numpy as np
import torch

from kdfast.distill.config import TrainConfig
from kdfast.distill.feed import micro_batch, train_tokens
from kdfast.distill.models import SpanModel
from kdfast.distill.optim import Updater, learning_rate
from kdfast.distill.precision import AUTOCAST
from kdfast.fused_kd_loss import kd_loss_rows
from kdfast.squad.batches import cut_by_tokens, cut_evenly
from kdfast.squad.features import Windows


@dataclass(frozen=True)
class StepReport:
    """What one step did. loss, soft and hard are means over the step's windows.

    soft and hard are not weighted: loss = w * soft + (1 - w) * hard. skipped: a gradient was not
    finite, and the weights stayed as they were.
    """

    step: int
    loss: float
    soft: float
    hard: float
    grad_norm: float
    lr: float
    windows: int
    tokens: int
    padded_tokens: int
    skipped: bool


class Stepper:
    """Runs steps of a training run; what a step does depends on its number and the weights alone.

    teacher_logits: fp16 (tokens, 2), flat as windows.input_ids, or None without a teacher.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: SpanModel,
        updater: Updater,
        windows: Windows,
        teacher_logits: np.ndarray | None,
        device: torch.device,
        precision: str,
        total_steps: int,
    ):
        self.config = config
        self.model = model
        self.updater = updater
        self.windows = windows
        self.teacher_logits = teacher_logits
        self.device = device
        self.autocast = AUTOCAST[precision]
        self.total_steps = total_steps
        self.max_tokens = config.max_tokens_per_micro_batch or train_tokens(device)

    def run(self, step: int, indices: np.ndarray) -> StepReport:
        """Optimizer step number `step` over the windows `indices`."""
        self.model.train()
        rate = learning_rate(
            self.config.learning_rate,
            self.updater.updates,
            self.total_steps,
            self.config.warmup_ratio,
        )
        batches = self.cut(indices)
        sums = self.accumulate(step, batches, len(indices))
        norm, skipped = self.updater.update(rate)
        loss, soft, hard, norm, skipped = read_step(torch.cat([sums, torch.stack([norm, skipped])]))
        self.updater.updates += 1 - int(skipped)
        lengths = self.windows.lengths
        return StepReport(
            step=step,
            loss=loss,
            soft=soft,
            hard=hard,
            grad_norm=norm,
            lr=rate,
            windows=len(indices),
            tokens=int(lengths[indices].sum()),
            padded_tokens=sum(len(batch) * int(lengths[batch].max()) for batch in batches),
            skipped=bool(skipped),
        )

    def cut(self, indices: np.ndarray) -> list[np.ndarray]:
        """The step's micro-batches: by tokens, or evenly where the config says how many."""
        lengths = self.windows.lengths[indices]
        if self.config.gradient_accumulation_steps is not None:
            return cut_evenly(indices, lengths, self.config.gradient_accumulation_steps)
        return cut_by_tokens(indices, lengths, self.max_tokens)

    def accumulate(self, step: int, batches: list[np.ndarray], count: int) -> torch.Tensor:
        """Accumulate the gradients of the micro-batches of a step of `count` windows.

        Returns (loss, soft, hard) of the step, each already divided by count, on the device.
        """
        sums = torch.zeros(3, device=self.device)
        for number, indices in enumerate(batches):
            seed_generators(self.config.seed, step, 0, number)
            row_loss, row_parts = self.losses(indices)
            loss = row_loss.sum() / count
            self.updater.backward(loss)
            parts = row_parts.sum(dim=(0, 1)) / count
            sums += torch.cat([loss.detach()[None], parts]).float()
        return sums

    def losses(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """kd_loss_rows of one micro-batch; the mask is the real tokens."""
        batch = micro_batch(self.windows, indices, self.device, self.teacher_logits)
        with torch.autocast(
            self.device.type, dtype=self.autocast, enabled=self.autocast is not None
        ):
            logits = self.model(**batch.inputs)
        return kd_loss_rows(
            logits,
            batch.teacher_logits,
            batch.start_positions,
            batch.end_positions,
            temperature=self.config.temperature,
            distillation_loss_weight=self.config.distillation_loss_weight,
            distillation_loss=self.config.distillation_loss,
            convention=self.config.convention,
            mask=batch.mask,
            backend=None,
        )


def seed_generators(*key: int) -> None:
    """Seed torch's generators from `key`, so that a step replays whatever ran before it."""
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))


def read_step(values: torch.Tensor) -> list[float]:
    """The one place of an optimizer step where the host waits for the device."""
    return values.tolist()
