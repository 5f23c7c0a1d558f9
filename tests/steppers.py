"""A Stepper on a tiny reader and corpus, with made-up teacher logits, or a teacher's layers."""

import types
from pathlib import Path

import numpy as np
import torch

from kdfast.config import TrainConfig
from kdfast.data.prepare import prepare_windows
from kdfast.data.windows import WindowSettings
from kdfast.models import load, loader
from kdfast.models.dropout import speed_up_dropout
from kdfast.models.precision import AUTOCAST
from kdfast.teachers import layers
from kdfast.training import micro_batches
from kdfast.training.optimizer import Updater, make_optimizer
from tests import corpora, readers


def make(
    path: Path,
    *,
    precision="no",
    dtype=torch.float32,
    dropout=0.0,
    teacher=True,
    teacher_name=None,
    **changes,
):
    """Files below `path`, and what trains on them.

    changes: settings that differ from the tests' own.
    """
    name = readers.save(
        path / "student",
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
        **({} if teacher else {"distillation_loss_weight": 0.0}),
        **changes,
    }
    config = TrainConfig(**settings)
    loaded = load.load_reader(name, "--student", embeds_dropout_prob=config.embeds_dropout_prob)
    windows = prepare_windows(
        source, loaded.tokenizer, WindowSettings(200), cache_dir=path / "cache"
    )
    model = loaded.model.to(dtype)
    if not config.torch_compile:
        speed_up_dropout(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if precision == "fp16" else None
    device = torch.device("cpu")
    learner, kind = layers.make_learner(config, model, device, precision)
    learner.to(dtype)
    optimizer = make_optimizer(learner, config.weight_decay)
    updater = Updater(learner, optimizer, scaler, config.max_grad_norm)
    draw = np.random.default_rng(5)
    logits = draw.normal(0, 3, (len(windows.input_ids), 2)).astype(np.float16)
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    probe = micro_batches.MemoryProbe(learner, learner, device, AUTOCAST[precision])
    stepper = kind(
        config,
        model,
        learner,
        updater,
        loader.HostLoader(windows, logits if teacher else None),
        windows.lengths,
        micro_batches.choose_policy(config, micro_batches.count_work(model), probe),
        device,
        precision,
        total_steps=10,
    )
    return types.SimpleNamespace(
        stepper=stepper, model=model, updater=updater, windows=windows, loaded=loaded
    )
