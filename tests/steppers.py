"""A training of a tiny reader, with made-up teacher logits or a teacher's layers."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from kdfast.common.run import Run
from kdfast.config import TrainConfig, WindowSettings
from kdfast.data.batches import Share
from kdfast.data.prepare import prepare_windows
from kdfast.models import load, window_loader
from kdfast.train import train_loop
from kdfast.training.assemble import TrainingData, assemble
from kdfast.training.invariance import Recorder
from kdfast.training.step import Callback
from tests import corpora, readers


class Steps(Callback):
    """Runs steps one by one, in the loop of kdfast.train."""

    def __init__(self, training):
        self.training = training
        self.report = self.micro_batches = None

    def log_step(self, report, indices):
        self.report = report

    def check_finite(self, report, micro_batches):
        self.micro_batches = micro_batches

    def __call__(self, step, indices):
        """Step number `step` over the windows `indices`; returns its report."""
        training = self.training
        training.progress.steps, self.report = step, None
        training.order = SimpleNamespace(step=lambda number: indices)
        training.total_steps = max(training.total_steps, step + 1)
        train_loop(training, self, steps=1)
        return self.report


def gradient(run, batches, step=3):
    """The gradient of a step over these micro-batches, an fp64 vector, and the step's report."""
    training, step_of = run.training, run.step
    kept = training.optimizer, training.cuts.cut
    training.optimizer = recorder = Recorder(training.model, 0.0, training.optimizer.scaler)
    training.cuts.cut = lambda indices: batches
    report = step_of(step, np.concatenate(batches))
    training.optimizer, training.cuts.cut = kept
    return recorder.gradient, report


def make(
    path: Path,
    *,
    precision="no",
    dtype=torch.float32,
    dropout=0.0,
    teacher=True,
    teacher_name=None,
    model_type="bert",
    **changes,
):
    """Files below `path`, and what trains on them.

    changes: settings that differ from the tests' own.
    """
    name = readers.save(
        path / "student",
        model_type,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    source = corpora.write(path / "train.json")
    settings = {
        "teacher": (teacher_name or name) if teacher else None,
        "student": name,
        "train_file": source,
        "output_dir": str(path / "out"),
        "learning_rate": 1e-3,
        "embeds_dropout_prob": dropout,
        "max_seq_length": 200,
        "max_steps": 10,
        **({} if teacher else {"distillation_loss_weight": 0.0}),
        **changes,
    }
    config = TrainConfig(**settings)
    loaded = load.load_reader(
        name, "--student", embeds_dropout_prob=config.optimization.embeds_dropout_prob
    )
    windows = prepare_windows(
        source, loaded.tokenizer, WindowSettings(200), cache_dir=path / "cache"
    )
    model = loaded.model.to(dtype)
    draw = np.random.default_rng(5)
    logits = draw.normal(0, 3, (len(windows.input_ids), 2)).astype(np.float16)
    data = TrainingData(windows, logits if teacher else None, [Share(np.arange(len(windows)))])
    run = Run(precision=precision, output=path / "out")
    training = assemble(config, run, model, data)
    training.model.to(dtype)
    assert isinstance(training.loader, window_loader.HostLoader)
    if training.optimizer.scaler:
        state = training.optimizer.scaler.state_dict()
        training.optimizer.scaler.load_state_dict({**state, "scale": 2.0**10})
    return SimpleNamespace(
        training=training,
        step=Steps(training),
        model=model,
        optimizer=training.optimizer,
        windows=windows,
        loaded=loaded,
        config=config,
    )
