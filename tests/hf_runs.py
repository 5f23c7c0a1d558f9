"""What the tests of the Hugging Face Trainer run: settings, rows, a student without dropout."""

import torch
from transformers import AutoModelForQuestionAnswering, TrainingArguments

from kdfast.config import TrainConfig
from kdfast.hf import KDDataset, kd_dataset


def settings_and_rows(world):
    """The settings, and the rows of 12 windows."""
    config = TrainConfig(
        teacher=world.teacher,
        student=world.student,
        train_file=world.train_file,
        cache_dir=str(world.path / "cache"),
        max_seq_length=200,
        temperature=2.0,
        distillation_loss_weight=0.6,
    )
    rows = kd_dataset(config)
    return config, KDDataset(rows.windows, rows.chosen[:12], rows.teacher_logits)


def student(world, **changes):
    model = AutoModelForQuestionAnswering.from_pretrained(world.student, **changes)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.config.attention_probs_dropout_prob = 0.0
    return model.eval()


def arguments(world, **changes):
    return TrainingArguments(
        **{
            "output_dir": str(world.path / "hf"),
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 5,
            "max_steps": 2,
            "learning_rate": 1e-2,
            "optim": "sgd",  # Adam makes steps of what is only rounding
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            **changes,
        }
    )
