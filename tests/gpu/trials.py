"""What must hold on a CUDA device, each a function of the card and an empty folder.

`pytest -m gpu` runs them on a real card, tests/pretended/test_trials.py on the pretended one.
"""

import json
import shutil
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from kdfast import train
from kdfast.common.ranks import Ranks
from kdfast.common.run import Run
from kdfast.config import TrainConfig
from kdfast.data.batches import Share
from kdfast.training import inputs
from kdfast.training.assemble import Training, TrainingData, assemble
from kdfast.training.invariance import Recorder
from kdfast.training.micro_batches import peak_bytes_of
from kdfast.training.train_files import TrainFiles
from tests import corpora, published, readers
from tests.gpu.card import Card
from tests.programs import World, log_of
from tests.steppers import Steps

CPU = torch.device("cpu")
LAUNCHES = Path(__file__).parents[1] / "pretended" / "launches.json"
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class Small:
    """The files of a run with a small reader without dropout, on `card` and on the CPU."""

    def __init__(self, card: Card, path: Path, name: str = "roberta", **own):
        self.path = path
        self.reader = readers.save(path / "reader", name, **{**STILL, **card.sizes, **own})
        self.data = corpora.write(path / "train.json", card.articles)

    def config(self, **changes) -> TrainConfig:
        settings = {
            "teacher": self.reader,
            "student": self.reader,
            "train_file": self.data,
            "validation_file": self.data,
            "output_dir": str(self.path / "out"),
            "cache_dir": str(self.path / "cache"),
            "embeds_dropout_prob": 0.0,
            "max_seq_length": 200,
            "learning_rate": 1e-3,
            "max_steps": 10,
        }
        return TrainConfig(**{**settings, **changes})

    @cached_property
    def windows(self):
        config = self.config()
        student = inputs.load_student(config, Ranks())
        return TrainFiles.prepare_for(config, student, Ranks()).windows

    def training(self, run: Run, dtype=torch.float32, **changes) -> Training:
        """With made-up teacher logits. Until another cut is given, a step is one micro-batch."""
        config = self.config(**{"max_tokens_per_micro_batch": 2**20, **changes})
        model = inputs.load_student(config, run.ranks).model.to(dtype)
        draw = np.random.default_rng(5)
        logits = draw.normal(0, 3, (len(self.windows.input_ids), 2)).astype(np.float16)
        data = TrainingData(self.windows, logits, [Share(np.arange(len(self.windows)))])
        return assemble(config, run, model, data)


def gradient(training: Training, step: int = 0):
    """The gradient of a step over all windows, fp64 on the CPU, and the step's report."""
    if training.optimizer.scaler:  # not so large that a small model's gradient overflows
        state = training.optimizer.scaler.state_dict()
        training.optimizer.scaler.load_state_dict({**state, "scale": 2.0**10})
    training.optimizer = Recorder(training.model, 0.0, training.optimizer.scaler)
    report = Steps(training)(step, np.arange(len(training.cuts.lengths)))
    return training.optimizer.gradient.cpu(), report


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def a_step_is_that_of_the_cpu(card: Card, path: Path, name: str, precision: str) -> None:
    """Loss and gradient are as near to fp64's as the CPU's are in this precision."""
    small = Small(card, path, name)
    true, _ = gradient(small.training(Run(CPU), torch.float64))
    theirs, expected = gradient(small.training(Run(CPU, precision)))
    ours, found = gradient(small.training(Run(card.device, precision)))
    rounding = distance(theirs, true)
    assert 0 < rounding < (1e-2 if precision == "fp16" else 1e-5)
    assert distance(ours, true) < 4 * rounding
    rtol = 1e-2 if precision == "fp16" else 1e-5
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol)
    assert found.micro_batches == 1 and not found.skipped


def the_host_reads_once_a_step(card: Card, path: Path, name: str) -> None:
    """Nothing in a step of three micro-batches waits for the device, its one read left out."""
    small = Small(card, path, name)
    training = small.training(Run(card.device, "no"), gradient_accumulation_steps=3)
    step, everything = Steps(training), np.arange(len(small.windows))
    reads = []

    def read(*totals, **more):
        reads.append(1)
        torch.cuda.set_sync_debug_mode("default")
        return real(*totals, **more)

    real = train.read_step
    step(0, everything)  # kernels are loaded, the optimizer makes its state
    with mock.patch.object(train, "read_step", read), card.refusing_reads():
        report = step(1, everything)
    assert len(reads) == 1 and report.micro_batches == 3


def a_resumed_run_ends_with_the_same_bits(card: Card, path: Path, precision: str) -> None:
    """With --deterministic. CUBLAS_WORKSPACE_CONFIG is for the process: see conftest.py."""
    world = World(path)
    flags = {"deterministic": True, "save_steps": 3, "eval_steps": 3, "mixed_precision": precision}

    def result():
        files = ("model.safetensors", "checkpoint-6/optimizer.safetensors")
        return log_of(world.output), [(world.output / each).read_bytes() for each in files]

    try:
        assert world.run(**flags) == 0
        whole = result()
        assert json.loads((world.output / "run.json").read_text())["precision"] == precision
        shutil.rmtree(world.output / "checkpoint-6")
        assert world.run(**flags, resume_from_checkpoint="last") == 0
    finally:
        torch.use_deterministic_algorithms(False)
    assert result() == whole


def a_micro_batch_launches_what_was_recorded(card: Card, path: Path) -> None:
    """Kernels of a micro-batch, by difference, against tests/pretended/launches.json.

    A card runs more than one kernel for some operations, such as the backward of a layer norm.
    """
    small = Small(card, path, hidden_size=16, intermediate_size=32, layers=2)
    counts = []
    for parts in (1, 4):
        training = small.training(Run(card.device, "fp16"), gradient_accumulation_steps=parts)
        gradient(training)
        with card.launches() as found:
            gradient(training)
        counts.append(sum(found.values()))
    a_micro_batch = (counts[1] - counts[0]) / 3
    recorded = json.loads(LAUNCHES.read_text())["roberta"]["auto"]
    assert 0.5 * recorded < a_micro_batch <= 1.25 * recorded, found


def memory_grows_in_a_line(card: Card, path: Path) -> None:
    """The line through 4 and 16 windows, which chooses the cut, meets 48 and a real step.

    As in a large model, the gradient of the vocabulary takes more than a window's activations.
    """
    small, run = Small(card, path, vocab_size=5_000), Run(card.device)
    training = small.training(run)
    model, packs = training.model, training.cuts.policy.packed
    width = 64  # tokens count, and not how many windows they are in
    peak = {n: peak_bytes_of(model, model, run, n, width, packs) for n in (4, 4, 16, 48)}
    a_window = (peak[16] - peak[4]) / 12
    np.testing.assert_allclose(peak[48], peak[4] + 44 * a_window, rtol=0.1)
    tokens = int(small.windows.lengths.sum())
    parts, everything = 2, np.arange(len(small.windows))
    step = Steps(small.training(run, gradient_accumulation_steps=parts))
    step(0, everything)  # loads kernels, and Adam makes its moments
    step_peak = card.peak_bytes(lambda: step(1, everything))
    on_the_line = peak[4] + (tokens / parts / width - 4) * a_window
    np.testing.assert_allclose(step_peak, on_the_line, rtol=0.1)


def memory_runs_out_in_a_step(card: Card, path: Path) -> None:
    """The step is cut smaller, and has the gradient of one that was cut so from the start."""
    small = Small(card, path)
    training = small.training(Run(card.device))
    gradient(training)  # loads kernels
    peak = card.peak_bytes(lambda: gradient(training))
    before = card.times_run_out()
    with card.limited_to(int(0.6 * peak)):
        found, report = gradient(training)
    assert card.times_run_out() > before and report.micro_batches > 1
    cut = small.training(Run(card.device), max_tokens_per_micro_batch=report.max_tokens)
    expected, like = gradient(cut)
    assert like.micro_batches == report.micro_batches
    assert distance(found, expected) < 1e-6
    np.testing.assert_allclose(report.loss, like.loss, 1e-6)


def memory_runs_out_in_the_teachers_pass(card: Card, path: Path) -> None:
    """The pass goes on with fewer windows at a time, to the same logits."""
    small, run = Small(card, path), Run(card.device)
    tokenizer = inputs.load_student(small.config(), Ranks()).tokenizer

    def logits(cache: str) -> np.ndarray:
        config = small.config(cache_dir=str(path / cache))
        targets = inputs.find_targets(config, small.data, small.windows, tokenizer, run)
        return np.array(inputs.teacher_logits(config, targets, small.windows, run))

    whole = logits("whole")
    peak = card.peak_bytes(lambda: logits("another"))
    before = card.times_run_out()
    with card.limited_to(int(0.6 * peak)):
        found = logits("limited")
    assert card.times_run_out() > before
    np.testing.assert_allclose(found, whole, rtol=2e-3, atol=2e-3)


def memory_runs_out_in_evaluation(card: Card, path: Path) -> None:
    """The evaluation goes on with fewer windows at a time, to the same answers."""
    small, run = Small(card, path), Run(card.device)
    config = small.config()
    student = inputs.load_student(config, Ranks())
    validation = inputs.load_validation(config, student, Ranks())
    student.model.to(card.device)
    whole = validation.score(student.model, run)
    peak = card.peak_bytes(lambda: validation.score(student.model, run))
    before = card.times_run_out()
    with card.limited_to(int(0.6 * peak)):
        found = validation.score(student.model, run)
    assert card.times_run_out() > before
    assert found.metrics == whole.metrics and found.answers.never_null == whole.answers.never_null


TRIALS: dict[str, Callable[[Card, Path], None]] = {
    **{
        f"step {name} {precision}": partial(
            a_step_is_that_of_the_cpu, name=name, precision=precision
        )
        for name in published.TYPES
        for precision in ("no", "fp16")
        if (name, precision) != ("deberta", "fp16")
    },
    **{f"reads {name}": partial(the_host_reads_once_a_step, name=name) for name in published.TYPES},
    **{
        f"resume {precision}": partial(a_resumed_run_ends_with_the_same_bits, precision=precision)
        for precision in ("no", "fp16")
    },
    "launches": a_micro_batch_launches_what_was_recorded,
    "memory line": memory_grows_in_a_line,
    "memory step": memory_runs_out_in_a_step,
    "memory teacher": memory_runs_out_in_the_teachers_pass,
    "memory evaluation": memory_runs_out_in_evaluation,
}


def draws_dropout_once(device: torch.device, p: float) -> bool:
    """Whether torch's kernel for packed windows has one dropout in forward and backward.

    Its result is linear in the values: <result, g> is <values, gradient of the values> if so.
    """
    torch.manual_seed(0)
    query, key, value, grad = torch.randn(4, 1, 96, 2, 8, device=device).unbind()
    value.requires_grad_()
    bounds = torch.tensor([0, 40, 96], dtype=torch.int32, device=device)
    mixed = torch.ops.aten._efficient_attention_forward(
        query, key, value, None, bounds, bounds, 56, 56, p, 0, True
    )[0]
    (found,) = torch.autograd.grad(mixed, value, grad)
    with torch.no_grad():
        return torch.allclose((mixed * grad).sum(), (value * found).sum(), rtol=1e-3)
