"""One optimizer step: micro-batches in, one update and one read out."""

import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from kdfast.common.errors import UserError
from kdfast.common.ranks import Ranks
from kdfast.common.signals import StopSignals
from kdfast.config import TrainConfig
from kdfast.data.batches import MicroBatchPolicy, shard
from kdfast.fused_kd_loss import kd_loss_rows
from kdfast.models.load import SpanModel
from kdfast.models.loader import MicroBatch, WindowLoader, padded_width
from kdfast.models.precision import AUTOCAST
from kdfast.training.optimizer import Updater, learning_rate

STOPS = 5  # its place among the facts of a step


@dataclass(frozen=True)
class StepReport:
    """What one step did. loss and its parts are means over the step's windows.

    parts: by the names in Stepper.PARTS. Soft and hard part are not weighted: loss = w * soft +
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


class Stepper:
    """Runs steps of a training run; what a step does depends on its number and the weights alone.

    forward: the model, or what torch.compile made of it; what a micro-batch's losses come from.
    lengths: int (W,), tokens of every window that the loader has. policy: how a step is cut; it
    changes where memory does not suffice.
    multiple: of which the loader makes every width one. ranks: the processes that share each step;
    None: this one alone. stop: what may ask for an end after a step, or amid a long one.
    `batches`: this rank's micro-batches in the last step.
    """

    PARTS = ("soft", "hard")  # what the row parts of losses() are
    INITIAL_SCALE = 2.0**16  # of the loss, under fp16; the scaler halves one that is too large

    def __init__(
        self,
        config: TrainConfig,
        model: SpanModel,
        forward: nn.Module,
        updater: Updater,
        loader: WindowLoader,
        lengths: np.ndarray,
        policy: MicroBatchPolicy,
        device: torch.device,
        precision: str,
        total_steps: int,
        multiple: int = 1,
        ranks: Ranks | None = None,
        stop: StopSignals | None = None,
    ):
        self.config = config
        self.model = model
        self.forward = forward
        self.updater = updater
        self.loader = loader
        self.lengths = lengths
        self.policy = policy
        self.device = device
        self.precision = precision
        self.autocast = AUTOCAST[precision]
        self.total_steps = total_steps
        self.multiple = multiple
        self.ranks = ranks or Ranks()
        self.stop = stop or StopSignals()
        self.batches: list[np.ndarray] = []
        self._dropped = False

    def run(
        self, step: int, indices: np.ndarray, upcoming: np.ndarray | None = None
    ) -> StepReport | None:
        """Optimizer step number `step` over the windows `indices`.

        upcoming: the windows of the next step, if there is one, to be made ready meanwhile.
        None: a rank that is to stop dropped the step, and nothing has changed. stop.agreed says
        whether this step, dropped or not, is the last one.
        Raises UserError where memory does not suffice for a window alone.
        """
        self.model.train()
        rate = learning_rate(
            self.config.learning_rate,
            self.updater.updates,
            self.total_steps,
            self.config.warmup_ratio,
        )
        sums = None
        while sums is None:
            batches = self.cut(indices)
            try:
                sums = self.accumulate(step, batches, len(indices), upcoming)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                error.__traceback__ = None  # its frames hold the step's tensors
            if sums is None:
                self.updater.drop()
                self.policy = self.smaller(batches)
        self.batches = batches
        padded_tokens = sum(map(self.padded_tokens, batches))
        facts = self._facts(sums, padded_tokens, len(batches))
        facts = self.ranks.sum_gradients(self.updater.parameters, facts)
        update = self.updater.update(rate, facts[0], facts[STOPS] > self.ranks.count)
        norm, skipped, scale, *facts = read_step(torch.cat([torch.stack(update), facts]))
        loss, *parts, padded_tokens, micro_batches, stops = facts[: STOPS + 1]
        rooms = facts[STOPS + 1 :]
        self._take_smallest(rooms)
        self.stop.agreed = stops > 0
        if stops > self.ranks.count:
            return None
        self.updater.finish(loss, norm, scale)
        return StepReport(
            step=step,
            loss=loss,
            parts=dict(zip(self.PARTS, parts, strict=True)),
            grad_norm=norm,
            lr=rate,
            windows=len(indices),
            tokens=int(self.lengths[indices].sum()),
            padded_tokens=int(padded_tokens),
            micro_batches=int(micro_batches),
            max_tokens=self.policy.max_tokens,
            skipped=bool(skipped),
            loss_scale=None if self.updater.scaler is None else scale,
        )

    def _facts(self, sums: torch.Tensor, padded_tokens: int, micro_batches: int) -> torch.Tensor:
        """What this rank adds to the step's report, summed with the gradients.

        In place STOPS: 1 from a rank that is to stop, and more than all those from one that has
        dropped the step. Behind it stands a place for each rank's room, so that all can take the
        smallest.
        """
        rooms = [0] * self.ranks.count
        rooms[self.ranks.rank] = self.policy.parts or self.policy.max_tokens
        stops = self.ranks.count + 1 if self._dropped else int(self.stop.is_asked)
        facts = torch.tensor([padded_tokens, micro_batches, stops, *rooms], dtype=sums.dtype)
        return torch.cat([sums, facts.to(sums.device, non_blocking=True)])

    def _take_smallest(self, rooms: list[float]) -> None:
        """The policy of the rank with the least memory becomes everyone's."""
        if self.policy.parts is not None:
            self.policy = replace(self.policy, parts=int(max(rooms)))
        else:
            self.policy = replace(self.policy, max_tokens=int(min(rooms)))

    def cut(self, indices: np.ndarray) -> list[np.ndarray]:
        """The micro-batches of this rank in a step over the windows `indices`."""
        if self.ranks.count > 1:
            shares = shard(indices, self.lengths[indices], self.ranks.count, self.policy)
            indices = shares[self.ranks.rank]
        return self.policy.cut(indices, self.lengths[indices])

    def padded_tokens(self, batch: np.ndarray) -> int:
        return len(batch) * padded_width(self.lengths[batch], self.multiple)

    def smaller(self, batches: list[np.ndarray]) -> MicroBatchPolicy:
        """The policy with half the room of what did not fit."""
        if max(map(len, batches)) == 1:
            remedy = "a smaller --max_seq_length"
            # Stage layers excludes it.
            if not self.config.gradient_checkpointing and self.config.stage != "layers":
                remedy += ", --gradient_checkpointing,"
            raise UserError(
                f"There is not enough memory for a single window: give {remedy} or a smaller "
                "student."
            )
        if self.policy.parts is not None:
            return replace(self.policy, parts=2 * len(batches))
        return replace(self.policy, max_tokens=max(map(self.padded_tokens, batches)) // 2)

    def accumulate(
        self,
        step: int,
        batches: list[np.ndarray],
        count: int,
        upcoming: np.ndarray | None = None,
    ) -> torch.Tensor:
        """Accumulate the gradients of the micro-batches of a step of `count` windows.

        Returns the step's loss and its two parts, each already divided by count, on the device.
        """
        sums = torch.zeros(3, device=self.device)
        started, self._dropped = time.monotonic(), False
        ready = self.loader.micro_batches(batches)
        if upcoming is not None:
            self.loader.expect(self.cut(upcoming))
        # Around all of them: autocast forgets its half-precision weights at its end.
        with self.autocast_to(self.autocast):
            for number, batch in enumerate(ready):
                if self.stop.must_drop(started, number, len(batches)):
                    self._dropped = True
                    break
                _, row_loss, row_parts = self.rows(step, number, batch)
                with self.autocast_to(None):
                    loss = row_loss.sum() / count
                    self.updater.backward(loss)
                parts = row_parts.flatten(0, -2).sum(0) / count
                sums += torch.cat([loss.detach()[None], parts]).float()
        return sums

    def rows(
        self, step: int, number: int, batch: MicroBatch
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What forward() gives, and losses() of it, for micro-batch `number` of this rank.

        To be called under autocast_to(self.autocast).
        """
        seed_generators(self.config.seed, step, self.ranks.rank, number)
        output = self.forward(**batch.inputs)
        with self.autocast_to(None):
            return output, *self.losses(output, batch)

    def losses(self, logits: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses (B, ...) and their parts (B, ..., 2): kd_loss_rows, masked to the real tokens."""
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

    def autocast_to(self, dtype: torch.dtype | None) -> torch.autocast:
        """Autocast to `dtype`; None: none."""
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the host under a limit, refused memory."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        "DefaultCPUAllocator" in str(error)
    )


def seed_generators(*key: int) -> None:
    """Seed torch's generators from `key`, so that a step replays whatever ran before it."""
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))


def read_step(values: torch.Tensor) -> list[float]:
    """The one place of an optimizer step where the host waits for the device."""
    return values.tolist()
