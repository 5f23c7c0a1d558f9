"""Who trains: a padded loop in plain PyTorch, and kdfast. All learn from the same Problem.

Each candidate is called with the windows of each optimizer step of a turn and returns its Turn.
"""

import copy
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdfast.common.precision import AUTOCAST
from kdfast.common.run import Run
from kdfast.config import TrainConfig
from kdfast.data.batches import Share
from kdfast.data.windows import Windows
from kdfast.models.span_model import SpanModel
from kdfast.models.window_loader import flat_positions
from kdfast.train import train_loop
from kdfast.training.assemble import TrainingData, assemble
from kdfast.training.log import Clock, TrainLog
from kdfast.training.optimizer import ScaledAdamW
from kdfast.training.step import Callback, StepReport

from .measure import wall

CPU = torch.device("cpu")
TEMPERATURE, WEIGHT = 2.0, 0.75
LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM = 1e-5, 0.01, 1.0
WIDTH = 384  # what Haystack pads every window to
PARTS = ("gather", "forward", "loss", "backward", "optimizer", "log")


@dataclass(frozen=True)
class Problem:
    """What every candidate starts from.

    reader: a Hugging Face question-answering model, of which each trains a copy. teacher_logits:
    fp16 (tokens, 2), flat as windows.input_ids. precision: a key of AUTOCAST. windows_at_once: in
    one forward pass of a padding candidate. max_grad_norm: gradients are clipped to it. device: on
    which all of it happens.
    """

    reader: nn.Module
    windows: Windows
    teacher_logits: np.ndarray
    precision: str
    windows_at_once: int
    max_grad_norm: float = MAX_GRAD_NORM
    device: torch.device = CPU


@dataclass(frozen=True)
class Turn:
    """One or more optimizer steps: their wall time in seconds, their windows, the tokens that went
    through the student, padding included, and for kdfast on a CPU the seconds of each of PARTS.
    """

    seconds: float
    indices: np.ndarray
    padded_tokens: int
    parts: dict[str, float] = field(default_factory=dict)


def collate(problem: Problem, indices: np.ndarray, width: int | None) -> dict[str, Tensor]:
    """The windows padded to `width`, or to the longest of them: inputs, labels, teacher_logits."""
    windows = problem.windows
    padded = windows.padded(indices, width)
    logits = np.zeros((*padded["input_ids"].shape, 2), dtype=np.float16)
    logits[padded["attention_mask"]] = problem.teacher_logits[flat_positions(windows, indices)]
    arrays = {
        **padded,
        "start_positions": windows.start_positions[indices].astype(np.int64),
        "end_positions": windows.end_positions[indices].astype(np.int64),
        "teacher_logits": logits,
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def padded_loss(reader: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Haystack's formula in torch's functions, padding masked in both softmaxes: the mean over the
    windows. Softmax and sums in fp32 (fp64 for an fp64 reader).
    """
    names = ("input_ids", "attention_mask", "token_type_ids")
    outputs = reader(**{name: batch[name] for name in names})
    padding = ~batch["attention_mask"].bool()
    soft = hard = 0.0
    heads = (outputs.start_logits, outputs.end_logits)
    places = (batch["start_positions"], batch["end_positions"])
    for head, (student, place) in enumerate(zip(heads, places, strict=True)):
        kind = torch.promote_types(student.dtype, torch.float32)
        # Not -inf: 0 times the difference of two of them would be NaN.
        s = student.to(kind).masked_fill(padding, -1e4)
        c = batch["teacher_logits"][..., head].to(kind).masked_fill(padding, -1e4)
        soft = soft + F.kl_div(
            torch.log_softmax(s / TEMPERATURE, 1),
            torch.softmax(c / TEMPERATURE, 1),
            reduction="batchmean",
        )
        hard = hard + F.cross_entropy(s, place)
    return WEIGHT * TEMPERATURE**2 * soft + (1 - WEIGHT) * hard / 2


class Padded:
    """A plain loop: eager loss, kdfast's optimizer. width: None pads to the batch's longest."""

    def __init__(self, problem: Problem, width: int | None):
        self.problem = problem
        self.width = width
        self.model = copy.deepcopy(problem.reader).to(problem.device)
        scaler = torch.amp.GradScaler(problem.device.type) if problem.precision == "fp16" else None
        self.scaled = ScaledAdamW(self.model, WEIGHT_DECAY, scaler)
        self.optimizer = self.scaled.adamw

    def __call__(self, *steps: np.ndarray) -> Turn:
        started = wall(self.problem.device)
        self.model.train()
        padded = sum(map(self._step, steps))
        return Turn(wall(self.problem.device) - started, np.concatenate(steps), padded)

    def _step(self, indices: np.ndarray) -> int:
        problem, device = self.problem, self.problem.device
        kind = AUTOCAST[problem.precision]
        total, padded = torch.zeros((), device=device), 0
        for first in range(0, len(indices), problem.windows_at_once):
            some = indices[first : first + problem.windows_at_once]
            batch = collate(problem, some, self.width)
            padded += batch["input_ids"].numel()
            if device.type == "cuda":
                batch = {
                    name: each.pin_memory().to(device, non_blocking=True)
                    for name, each in batch.items()
                }
            with torch.autocast(device.type, dtype=kind, enabled=kind is not None):
                loss = padded_loss(self.model, batch) * (len(some) / len(indices))
            self.scaled.scale(loss).backward()
            total += loss.detach()
        scale = self.scaled.loss_scale()
        self.scaled.unscale()
        norm = self.scaled.clip(problem.max_grad_norm)
        self.scaled.step(LEARNING_RATE, ~(torch.isfinite(norm) & torch.isfinite(total)))
        self.scaled.count(*torch.stack([total, norm, scale]).tolist())
        return padded


class Timeline:
    """Moments at which the parts of a step begin."""

    def __init__(self):
        self.moments: list[tuple[str, float]] = []

    def begin(self, part: str) -> None:
        self.moments.append((part, time.perf_counter()))

    def seconds(self, end: float) -> dict[str, float]:
        """Seconds by part, the last one ending at `end`; forgets the moments."""
        taken = dict.fromkeys(PARTS, 0.0)
        ends = [moment for _, moment in self.moments[1:]] + [end]
        for (part, moment), until in zip(self.moments, ends, strict=True):
            taken[part] += until - moment
        self.moments = []
        return taken


class TimedOptimizer(ScaledAdamW):
    """Says when backward and the update begin and end."""

    timeline: Timeline

    def scale(self, loss: Tensor) -> Tensor:
        self.timeline.begin("backward")
        return super().scale(loss)

    def loss_scale(self) -> Tensor:
        self.timeline.begin("optimizer")
        return super().scale(torch.ones(()))  # its own loss_scale would call scale above

    def step(self, rate: float, skip: Tensor) -> None:
        super().step(rate, skip)
        self.timeline.begin("log")


class Kdfast(Callback):
    """kdfast's own loop and log line. folder: for the log. packing: the setting of that name.

    live_teacher: called with the step's windows before it, as a teacher that is not cached.
    On a CPU, where the host waits for everything, it also says how long the parts of a step take.
    """

    def __init__(self, problem: Problem, folder: Path, packing: str = "auto", live_teacher=None):
        self.problem = problem
        self.live_teacher = live_teacher
        student = SpanModel(copy.deepcopy(problem.reader))
        self.training = assemble(
            settings_of(problem, packing),
            Run(device=problem.device, precision=problem.precision),
            student,
            TrainingData(
                problem.windows, problem.teacher_logits, [Share(np.arange(len(problem.windows)))]
            ),
        )
        self.model = student.reader
        self.timeline = Timeline() if problem.device.type == "cpu" else None
        if self.timeline:
            self._time_parts(student, self.timeline)
        self.optimizer = self.training.optimizer.adamw
        folder.mkdir(parents=True, exist_ok=True)
        self.log = TrainLog(folder, 0, 0, tensorboard=False)
        self.clock = Clock(self.training.work, matmul_rate=1.0)

    def _time_parts(self, student: SpanModel, timeline: Timeline) -> None:
        self.training.optimizer = TimedOptimizer(
            student, WEIGHT_DECAY, self.training.optimizer.scaler
        )
        self.training.optimizer.timeline = timeline
        load = self.training.load

        def timed_load(*given):
            for batch in load(*given):
                yield batch
                timeline.begin("gather")  # of the next micro-batch, if there is one

        self.training.load = timed_load
        student.register_forward_pre_hook(lambda *_: timeline.begin("forward"))
        student.register_forward_hook(lambda *_: timeline.begin("loss"))

    def log_step(self, report: StepReport, indices: np.ndarray) -> None:
        self.log.step(report, self.clock.add(report, self.training.cuts.lengths[indices]))
        self.padded_tokens += report.padded_tokens

    def __call__(self, *steps: np.ndarray) -> Turn:
        self.padded_tokens, first = 0, self.training.progress.steps

        def windows_of_step(number: int) -> np.ndarray:  # of one that is not to come, too
            return steps[min(number - first, len(steps) - 1)]

        started = wall(self.problem.device)
        if self.live_teacher:
            self.live_teacher(*steps)
        if self.timeline:
            self.timeline.begin("gather")
        self.training.order = SimpleNamespace(step=windows_of_step)
        train_loop(self.training, self, steps=len(steps))
        ended = wall(self.problem.device)
        parts = self.timeline.seconds(ended) if self.timeline else {}
        return Turn(ended - started, np.concatenate(steps), self.padded_tokens, parts)


def settings_of(problem: Problem, packing: str) -> TrainConfig:
    """kdfast's defaults, but for what the candidates share."""
    return TrainConfig(
        temperature=TEMPERATURE,
        distillation_loss_weight=WEIGHT,
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=problem.max_grad_norm,
        embeds_dropout_prob=0.0,
        mixed_precision=problem.precision,
        packing=packing,
        max_steps=1000,
    )
