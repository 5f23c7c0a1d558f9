"""Who trains: a padded loop in plain PyTorch, and kdfast. All learn from the same Problem.

Each contender is called with the windows of one optimizer step and returns its Turn.
"""

import copy
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdfast.config import TrainConfig
from kdfast.data.windows import Windows
from kdfast.models.dropout import speed_up_dropout
from kdfast.models.load import SpanModel
from kdfast.models.loader import flat_positions, make_loader
from kdfast.models.precision import AUTOCAST
from kdfast.training import micro_batches
from kdfast.training.log import Clock, TrainLog
from kdfast.training.optimizer import Updater, make_optimizer
from kdfast.training.step import Stepper

CPU = torch.device("cpu")
TEMPERATURE, WEIGHT = 2.0, 0.75
LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM = 1e-5, 0.01, 1.0
WIDTH = 384  # what Haystack pads every window to
PARTS = ("gather", "forward", "loss", "backward", "optimizer", "log")


@dataclass(frozen=True)
class Problem:
    """What every contender starts from.

    reader: a Hugging Face question-answering model, of which each trains a copy. teacher_logits:
    fp16 (tokens, 2), flat as windows.input_ids. precision: a key of AUTOCAST. windows_at_once: in
    one forward pass of a padding contender. max_grad_norm: gradients are clipped to it.
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
        self.optimizer = make_optimizer(self.model, WEIGHT_DECAY)
        self.updater = Updater(self.model, self.optimizer, None, problem.max_grad_norm)

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
            self.updater.backward(loss)
            total += loss.item()
        self.updater.update(LEARNING_RATE, torch.tensor(total))
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


class TimedUpdater(Updater):
    """Says when backward and the update begin and end."""

    timeline: Timeline

    def backward(self, loss: Tensor) -> None:
        self.timeline.begin("backward")
        super().backward(loss)
        self.timeline.begin("gather")  # of the next micro-batch, if there is one

    def update(
        self, rate: float, loss: Tensor, dropped: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        self.timeline.begin("optimizer")
        done = super().update(rate, loss, dropped)
        self.timeline.begin("log")
        return done


class Kdfast:
    """kdfast's own step and log line. folder: for the log.

    live_teacher: called with the step's windows before it, as a teacher that is not cached.
    """

    def __init__(self, problem: Problem, folder: Path, live_teacher=None):
        self.live_teacher = live_teacher
        self.model = copy.deepcopy(problem.reader)
        self.optimizer = make_optimizer(self.model, WEIGHT_DECAY)
        self.lengths = problem.windows.lengths
        self.timeline = Timeline()
        span_model = SpanModel(self.model)
        speed_up_dropout(span_model)
        updater = TimedUpdater(span_model, self.optimizer, None, problem.max_grad_norm)
        updater.timeline = self.timeline
        work = micro_batches.count_work(span_model)
        self.stepper = make_stepper(problem, span_model, updater, work)
        span_model.register_forward_pre_hook(lambda *_: self.timeline.begin("forward"))
        span_model.register_forward_hook(lambda *_: self.timeline.begin("loss"))
        folder.mkdir(parents=True, exist_ok=True)
        self.log = TrainLog(folder, 0, 0, tensorboard=False)
        self.clock = Clock(work, matmul_rate=1.0)
        self.steps = 0

    def __call__(self, indices: np.ndarray) -> Turn:
        started = time.perf_counter()
        if self.live_teacher:
            self.live_teacher(indices)
        self.timeline.begin("gather")
        report = self.stepper.run(self.steps, indices)
        self.log.step(report, self.clock.add(report, self.lengths[indices]))
        ended = time.perf_counter()
        self.steps += 1
        parts = self.timeline.seconds(ended)
        return Turn(ended - started, indices, report.padded_tokens, parts)


def make_stepper(
    problem: Problem, model: SpanModel, updater: Updater, work: micro_batches.Work
) -> Stepper:
    """As kdfast.train makes it with the default settings."""
    config = TrainConfig(
        temperature=TEMPERATURE,
        distillation_loss_weight=WEIGHT,
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=problem.max_grad_norm,
        embeds_dropout_prob=0.0,
        mixed_precision=problem.precision,
    )
    probe = micro_batches.MemoryProbe(model, model, CPU, AUTOCAST[problem.precision])
    return Stepper(
        config,
        model,
        model,
        updater,
        make_loader(problem.windows, problem.teacher_logits, CPU),
        problem.windows.lengths,
        micro_batches.choose_policy(config, work, probe),
        CPU,
        problem.precision,
        total_steps=1000,
    )
