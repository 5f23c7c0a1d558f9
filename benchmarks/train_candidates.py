"""Who trains: a padded loop in plain PyTorch, and kdfast. All learn from the same Problem.

Each candidate is called with the windows of one optimizer step and returns its Turn.
"""

import copy
import math
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
from kdfast.data.windows import Windows
from kdfast.models.span_model import SpanModel
from kdfast.models.window_loader import flat_positions
from kdfast.train import train_loop
from kdfast.training.assemble import TrainingData, assemble
from kdfast.training.log import Clock, TrainLog
from kdfast.training.optimizer import ScaledAdamW
from kdfast.training.step import Callback, StepReport

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
    one forward pass of a padding candidate. max_grad_norm: gradients are clipped to it.
    """

    reader: nn.Module
    windows: Windows
    teacher_logits: np.ndarray
    precision: str
    windows_at_once: int
    max_grad_norm: float = MAX_GRAD_NORM


@dataclass(frozen=True)
class Turn:
    """One optimizer step: its wall time in seconds, its windows, the tokens that went through the
    student, padding included, and for kdfast the seconds of each of PARTS.
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
        self.model = copy.deepcopy(problem.reader)
        self.scaled = ScaledAdamW(self.model, WEIGHT_DECAY)
        self.optimizer = self.scaled.adamw

    def __call__(self, indices: np.ndarray) -> Turn:
        started = time.perf_counter()
        self.model.train()
        kind = AUTOCAST[self.problem.precision]
        total, padded = 0.0, 0
        for first in range(0, len(indices), self.problem.windows_at_once):
            some = indices[first : first + self.problem.windows_at_once]
            batch = collate(self.problem, some, self.width)
            padded += batch["input_ids"].numel()
            with torch.autocast("cpu", dtype=kind, enabled=kind is not None):
                loss = padded_loss(self.model, batch) * (len(some) / len(indices))
            loss.backward()
            total += loss.item()
        norm = self.scaled.clip(self.problem.max_grad_norm)
        is_finite = torch.isfinite(norm) & math.isfinite(total)
        self.scaled.step(LEARNING_RATE, ~is_finite)
        return Turn(time.perf_counter() - started, indices, padded)


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
        return super().scale(torch.ones(()))

    def step(self, rate: float, skip: Tensor) -> None:
        super().step(rate, skip)
        self.timeline.begin("log")


class Kdfast(Callback):
    """kdfast's own loop and log line. folder: for the log.

    live_teacher: called with the step's windows before it, as a teacher that is not cached.
    """

    def __init__(self, problem: Problem, folder: Path, live_teacher=None):
        self.live_teacher = live_teacher
        self.timeline = Timeline()
        student = SpanModel(copy.deepcopy(problem.reader))
        self.training = assemble(
            settings_of(problem),
            Run(precision=problem.precision),
            student,
            TrainingData(problem.windows, problem.teacher_logits, np.arange(len(problem.windows))),
        )
        self.model = student.reader
        self.training.optimizer = timed = TimedOptimizer(student, WEIGHT_DECAY)
        timed.timeline = self.timeline
        self.optimizer = timed.adamw
        load = self.training.load

        def timed_load(*given):
            for batch in load(*given):
                yield batch
                self.timeline.begin("gather")  # of the next micro-batch, if there is one

        self.training.load = timed_load
        student.register_forward_pre_hook(lambda *_: self.timeline.begin("forward"))
        student.register_forward_hook(lambda *_: self.timeline.begin("loss"))
        folder.mkdir(parents=True, exist_ok=True)
        self.log = TrainLog(folder, 0, 0, tensorboard=False)
        self.clock = Clock(self.training.work, matmul_rate=1.0)

    def log_step(self, report: StepReport, indices: np.ndarray) -> None:
        self.log.step(report, self.clock.add(report, self.training.cuts.lengths[indices]))
        self.padded_tokens = report.padded_tokens

    def __call__(self, indices: np.ndarray) -> Turn:
        started = time.perf_counter()
        if self.live_teacher:
            self.live_teacher(indices)
        self.timeline.begin("gather")
        self.training.order = SimpleNamespace(step=lambda number: indices)
        train_loop(self.training, self, steps=1)
        ended = time.perf_counter()
        parts = self.timeline.seconds(ended)
        return Turn(ended - started, indices, self.padded_tokens, parts)


def settings_of(problem: Problem) -> TrainConfig:
    """kdfast's defaults, but for what the candidates share."""
    return TrainConfig(
        temperature=TEMPERATURE,
        distillation_loss_weight=WEIGHT,
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=problem.max_grad_norm,
        embeds_dropout_prob=0.0,
        mixed_precision=problem.precision,
        max_steps=1000,
    )
