"""What the training loop works with, assembled from settings, model and data."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from kdfast.common import heartbeat
from kdfast.common.device import place
from kdfast.common.run import Run
from kdfast.config import OptimizationSettings, TrainConfig
from kdfast.data.batches import MicroBatchPolicy, Share, TrainingOrder
from kdfast.data.windows import Windows
from kdfast.models.dropout import speed_up_dropout
from kdfast.models.packing import wants_packing
from kdfast.models.span_model import SpanModel
from kdfast.models.window_loader import Layout, MicroBatch, WindowLoader, make_loader
from kdfast.teachers.layers import LayerLosses, load_layer_teacher
from kdfast.training.flops import Work, count_work
from kdfast.training.micro_batches import MicroBatches, bytes_to_come, choose_policy, peak_bytes_of
from kdfast.training.optimizer import ScaledAdamW
from kdfast.training.step import (
    Objective,
    StepReport,
    StepSums,
    Totals,
    layer_objective,
    span_objective,
)


@dataclass
class Progress:
    """Where a run stands.

    steps: attempted so far. evaluated: the step count at the last evaluation. best_f1: of the best
    evaluation so far on `validation` (Validation.key), or None; best_exact, best_steps: its exact
    match and the step count there, and best_digest: of the model that best/ then held
    (models/save.py), on the first rank. patience_counter: evaluations since the last gain. clock:
    Clock.sums of all steps. starts: the step count at each start.
    """

    steps: int = 0
    evaluated: int = 0
    best_f1: float | None = None
    best_exact: float | None = None
    best_steps: int | None = None
    best_digest: str | None = None
    patience_counter: int = 0
    validation: str | None = None
    clock: list[float] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)


class Restored(NamedTuple):
    """What a checkpoint says beyond weights. policy: None if a new one must be chosen."""

    progress: Progress
    policy: MicroBatchPolicy | None


@dataclass(frozen=True)
class TrainingData:
    """The windows that are trained on.

    Attributes:
        windows: All that were prepared.
        teacher_logits: fp16 (tokens, 2), flat as windows.input_ids, or None.
        shares: The windows that take part, of each file.
    """

    windows: Windows
    teacher_logits: np.ndarray | None
    shares: list[Share]


@dataclass
class Training:
    """What the loop in train.py works with.

    Attributes:
        run: Device, precision, ranks, stop signals, output.
        settings: Rates, norms, seed.
        student: The model that is saved in the end.
        model: What trains: the student, or `LayerLosses` around it.
        forward: The model, or what torch.compile made of it.
        objective: What is minimized.
        optimizer: AdamW and the loss scaler.
        loader: Gives micro-batches on the device.
        cuts: Cuts steps into micro-batches.
        order: Which windows a step takes.
        progress: Where the run stands.
        total_steps: Optimizer steps of the whole run.
        work: Operations of the model.
        patience: Evaluations in a row without a gain that end the run, or None.
    """

    run: Run
    settings: OptimizationSettings
    student: SpanModel
    model: nn.Module
    forward: Callable[..., torch.Tensor]
    objective: Objective
    optimizer: ScaledAdamW
    loader: WindowLoader
    cuts: MicroBatches
    order: TrainingOrder
    progress: Progress
    total_steps: int
    work: Work
    patience: int | None = None

    @property
    def stopped_early(self) -> bool:
        """Whether evaluations have shown no gain for as long as the run has patience."""
        return self.patience is not None and self.progress.patience_counter >= self.patience

    @property
    def is_over(self) -> bool:
        """Whether no step is left: none of the schedule, or the run has stopped early."""
        return self.progress.steps >= self.total_steps or self.stopped_early

    def load(self, step: int, micro_batches: list[np.ndarray]) -> Iterator[MicroBatch]:
        """The micro-batches of a step. After the last one, while the device computes, the next step
        is cut and its micro-batches are prepared; a loop that stops early skips this."""
        for number, batch in enumerate(self.loader.micro_batches(micro_batches), 1):
            heartbeat.report(f"micro-batch {number} of step {step + 1}")
            yield batch
        if step + 1 < self.total_steps:
            self.loader.expect(self.cuts.cut(self.order.step(step + 1)))

    def totals(self, sums: StepSums, micro_batches: list[np.ndarray]) -> Totals:
        """This rank's numbers of a step, to be summed over the ranks."""
        ranks, parts = self.run.ranks, self.objective.parts
        rooms = {_room(rank): self.cuts.room * (rank == ranks.rank) for rank in range(ranks.count)}
        return Totals(
            dict(zip(("loss", *parts), sums.loss_and_parts, strict=True)),
            {
                "padded_tokens": sum(map(self.cuts.padded_tokens, micro_batches)),
                "micro_batches": len(micro_batches),
                "stops": sums.dropped or self.run.stop.is_asked,
                "drops": sums.dropped,
                **rooms,
            },
        )

    def finish_step(
        self, numbers: dict[str, float], indices: np.ndarray, lr: float
    ) -> StepReport | None:
        """Apply the summed numbers of a step: cuts, an agreed stop, the optimizer's counts.

        Returns None for a step that was dropped: nothing has changed.
        """
        ranks = self.run.ranks
        heartbeat.report(f"the end of step {self.progress.steps + 1}")
        self.cuts.take_smallest([numbers[_room(rank)] for rank in range(ranks.count)])
        self.run.stop.agreed = numbers["stops"] > 0
        if numbers["drops"] > 0:
            return None
        scale = numbers["loss_scale"]
        self.optimizer.count(numbers["loss"], numbers["grad_norm"], scale)
        report = StepReport(
            step=self.progress.steps,
            loss=numbers["loss"],
            parts={name: numbers[name] for name in self.objective.parts},
            grad_norm=numbers["grad_norm"],
            lr=lr,
            windows=len(indices),
            tokens=int(self.cuts.lengths[indices].sum()),
            padded_tokens=int(numbers["padded_tokens"]),
            micro_batches=int(numbers["micro_batches"]),
            max_tokens=self.cuts.policy.max_tokens,
            skipped=bool(numbers["skipped"]),
            loss_scale=None if self.optimizer.scaler is None else scale,
        )
        self.progress.steps += 1
        return report


def _room(rank: int) -> str:
    return f"room of rank {rank}"


def assemble(
    config: TrainConfig,
    run: Run,
    student: SpanModel,
    data: TrainingData,
    restore: Callable[[SpanModel, ScaledAdamW], Restored] | None = None,
) -> Training:
    """Everything that a run trains with, on its device.

    Args:
        config: All settings.
        run: What its parts share.
        student: The model that learns; in stage layers its teacher is loaded too.
        data: What it learns from.
        restore: Loads a checkpoint into student and optimizer, and says where the run stood.

    Raises:
        UserError: For a teacher of stage layers that does not fit the student, and a student that
            cannot pack.
    """
    speed, compiles = config.speed, config.speed.torch_compile
    packs = (
        config.model.stage != "layers"
        and not compiles
        and wants_packing(speed.packing, student.reader.config, run.device, run.ranks.log)
    )
    place(student, run.device)
    if run.device.type == "cpu" and not compiles:  # it compiles its own dropout
        speed_up_dropout(student)
    if packs:
        student.enable_packing()
    model: nn.Module = student
    objective = span_objective(config.loss)
    if config.model.stage == "layers":
        model = load_layer_teacher(config, student, run)
        objective = layer_objective()
    scaler = None
    if run.precision == "fp16":
        scaler = torch.amp.GradScaler(run.device.type, objective.initial_scale)
    optimizer = ScaledAdamW(model, config.optimization.weight_decay, scaler)
    progress, policy = restore(student, optimizer) if restore else Restored(Progress(), None)

    forward = student.compiled() if compiles else model
    layout = Layout(student.width_multiple(compiles), packs)
    if speed.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    work = count_work(student)
    if isinstance(model, LayerLosses):
        work = work.with_teacher(count_work(model.teacher))
    # Before the memory of a micro-batch is measured: what it uploads is taken then.
    reserved = bytes_to_come(optimizer)
    loader = make_loader(data.windows, data.teacher_logits, run.device, layout, reserved)
    if policy is None or policy.packed != packs:
        text = ""
        if run.ranks.is_first:  # what memory it finds holds for all
            width = config.windows.max_seq_length

            def peak_bytes(count: int) -> int:
                return peak_bytes_of(model, forward, run, count, width, packs)

            chosen = choose_policy(speed, work, run.device, width, peak_bytes, reserved)
            text = json.dumps(asdict(replace(chosen, packed=packs)))
        policy = MicroBatchPolicy(**json.loads(run.ranks.share(text)))
    remedies = "a smaller --max_seq_length"
    if not speed.gradient_checkpointing and config.model.stage != "layers":  # which excludes it
        remedies += ", --gradient_checkpointing,"
    order = TrainingOrder(
        data.shares, config.optimization.train_batch_size, config.optimization.seed
    )
    return Training(
        run=run,
        settings=config.optimization,
        student=student,
        model=model,
        forward=forward,
        objective=objective,
        optimizer=optimizer,
        loader=loader,
        cuts=MicroBatches(policy, data.windows.lengths, layout, run, remedies),
        order=order,
        progress=progress,
        total_steps=total_steps(config.optimization, order.steps_per_epoch),
        work=work,
        patience=config.evaluation.early_stopping_patience,
    )


def total_steps(settings: OptimizationSettings, steps_per_epoch: int) -> int:
    """Optimizer steps of the whole run."""
    if settings.max_steps > 0:
        return settings.max_steps
    return max(1, round(settings.num_train_epochs * steps_per_epoch))
