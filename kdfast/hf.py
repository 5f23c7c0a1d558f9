"""Distillation in the Hugging Face Trainer, for those whose training lives there.

Needs accelerate, as the Trainer does. The loss is kdfast's, the teacher's logits come from kdfast's
cache, and a step has the same gradient however it is accumulated or spread over devices.
"""

import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers import Trainer

from kdfast.distill import inputs, models
from kdfast.distill.config import TrainConfig
from kdfast.distill.config_checks import check_teachers
from kdfast.distill.precision import pick_device, resolve
from kdfast.distill.ranks import Ranks
from kdfast.errors import UserError
from kdfast.fused_kd_loss import fused_kd_loss
from kdfast.squad.features import Windows
from kdfast.squad.tokenizer import FolderTokenizer, load_tokenizer

TEACHER_COLUMNS = ("teacher_logits", "teacher_window")


class KDDataset(torch.utils.data.Dataset):
    """The training windows of a run as rows, read from the mapped files one by one.

    A row: input_ids int64 (L,), token_type_ids int64 (L,) where the model has them,
    start_positions and end_positions ints, teacher_logits fp16 (L, 2), and teacher_window, a
    checksum of the input_ids that the logits belong to. pad_token_id: of the tokenizer.
    temperature: the only one at which the logits mean something, or None for a teacher's own.
    """

    def __init__(
        self,
        windows: Windows,
        chosen: np.ndarray,
        teacher_logits: np.ndarray,
        temperature: float | None = None,
    ):
        self.windows = windows
        self.chosen = chosen
        self.teacher_logits = teacher_logits
        self.pad_token_id = windows.pad_token_id
        self.temperature = temperature

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, number: int) -> dict[str, Any]:
        windows, index = self.windows, self.chosen[number]
        padded = windows.padded([index])
        begin = windows.window_start[index]
        row = {
            "input_ids": padded["input_ids"][0],
            "start_positions": int(windows.start_positions[index]),
            "end_positions": int(windows.end_positions[index]),
            "teacher_logits": np.array(self.teacher_logits[begin : begin + windows.lengths[index]]),
            "teacher_window": window_checksum(padded["input_ids"][0]),
        }
        if windows.uses_token_types:
            row["token_type_ids"] = padded["token_type_ids"][0]
        return row


def kd_dataset(config: TrainConfig) -> KDDataset:
    """The rows of config.train_file, with the logits of config.teacher for config.student.

    What is not in config.cache_dir yet is computed: features, and one pass of the teacher. Raises
    UserError as `python -m kdfast.train` does, and for a weight of 0, which needs no teacher.
    Several teachers, or one with another tokenizer, are averaged or carried at config.temperature,
    which the trainer's must be then.
    """
    if not config.teacher or config.distillation_loss_weight == 0:
        raise UserError("kd_dataset needs a teacher and a distillation_loss_weight above 0.")
    check_teachers(config)
    alone = Ranks()
    device = pick_device()
    student = models.Loaded(None, kd_tokenizer(config))
    windows = inputs.prepare(config, student, config.train_file, "train", alone)
    precision = resolve(config.mixed_precision, device)
    lesson = inputs.teacher_lesson(config, windows, student, device, precision, alone)
    logits = inputs.teacher_logits(config, lesson, windows, device, alone)
    chosen = inputs.trained_windows(config, windows, alone)
    return KDDataset(windows, chosen, logits, config.temperature if lesson.is_derived else None)


def kd_tokenizer(config: TrainConfig) -> FolderTokenizer:
    """The tokenizer of config.student, for the Trainer, which writes it as it was read.

    (AutoTokenizer of transformers 5 may make another one of the same files.)
    """
    return load_tokenizer(models.local_folder(config.student, "--student"), "--student")


class KDCollator:
    """Pads rows of a KDDataset to the longest of them: tensors (B, L), teacher_logits (B, L, 2).

    Raises UserError where the teacher's columns are missing or belong to other rows.
    """

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        for row in rows:
            check_row(row)
        ids = [torch.as_tensor(row["input_ids"]) for row in rows]
        pad = torch.nn.utils.rnn.pad_sequence
        batch = {
            "input_ids": pad(ids, True, self.pad_token_id),
            "attention_mask": pad([torch.ones_like(each) for each in ids], True),
            "start_positions": torch.tensor([row["start_positions"] for row in rows]),
            "end_positions": torch.tensor([row["end_positions"] for row in rows]),
            "teacher_logits": pad(
                [torch.as_tensor(np.asarray(row["teacher_logits"], np.float16)) for row in rows],
                True,
            ),
        }
        if "token_type_ids" in rows[0]:
            types = [torch.as_tensor(row["token_type_ids"]) for row in rows]
            batch["token_type_ids"] = pad(types, True)
        return batch


class KDMixin:
    """Put before a Trainer class: `class KDTrainer(KDMixin, Trainer)`.

    kd: the settings of the loss: temperature, distillation_loss_weight, distillation_loss and
    convention. train_dataset: a KDDataset, or rows with its columns.

    The Trainer divides a loss by the number of accumulated batches, of which the last may be
    short, and averages over devices: a mean of means. Here each loss is the sum over its windows,
    divided by the windows of the whole step on all devices.
    """

    # What compute_loss returns is divided already: the Trainer must not divide it again.
    loss_is_scaled_for_ga = True

    def __init__(self, *args, kd: TrainConfig, **kwargs):
        super().__init__(*args, **kwargs)
        self.kd = kd
        self.args.remove_unused_columns = False  # the model's forward has no teacher_logits
        self.model_accepts_loss_kwargs = True  # versions without the attribute above ask this
        if isinstance(self.train_dataset, KDDataset):
            check_temperature(self.train_dataset.temperature, kd)
            self.data_collator = KDCollator(self.train_dataset.pad_token_id)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor]:
        """The batches of one optimizer step, and the number of its windows on all devices."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = sum(len(batch["start_positions"]) for batch in batches)
        count = self.accelerator.gather(torch.tensor([count], device=device)).sum()
        return batches, count

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The batch's part of the step's loss, or its own mean where there is no step."""
        inputs = dict(inputs)
        teacher = inputs.pop("teacher_logits", None)
        if teacher is None:
            raise UserError(
                "KDTrainer got a batch without teacher_logits: train on kdfast.hf.kd_dataset, or "
                "keep that column in your collator."
            )
        positions = inputs.pop("start_positions"), inputs.pop("end_positions")
        outputs = model(**inputs)
        loss = fused_kd_loss(
            (outputs["start_logits"], outputs["end_logits"]),
            teacher,
            *positions,
            temperature=self.kd.temperature,
            distillation_loss_weight=self.kd.distillation_loss_weight,
            distillation_loss=self.kd.distillation_loss,
            convention=self.kd.convention,
            mask=inputs["attention_mask"].bool(),
            reduction="mean" if num_items_in_batch is None else "sum",
        )
        if num_items_in_batch is not None:
            # DistributedDataParallel averages gradients over the processes.
            loss = loss / num_items_in_batch * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss


class KDTrainer(KDMixin, Trainer):
    """The Hugging Face Trainer with kdfast's loss."""


def window_checksum(input_ids: Any) -> int:
    """A checksum of a row's tokens, which tells whose teacher logits a row holds."""
    return zlib.crc32(np.ascontiguousarray(input_ids, dtype=np.int64).tobytes())


def check_temperature(temperature: float | None, kd: TrainConfig) -> None:
    """Raise UserError where logits that hold at `temperature` alone would be used otherwise."""
    if temperature is not None and (kd.temperature, kd.distillation_loss) != (
        temperature,
        "kl_div",
    ):
        raise UserError(
            f"The rows hold distributions of teachers at temperature {temperature:g}: give "
            "KDTrainer that temperature and kl_div, or make the rows anew."
        )


def check_row(row: dict[str, Any]) -> None:
    """Raise UserError unless the row has teacher logits, and its own."""
    missing = [name for name in TEACHER_COLUMNS if name not in row]
    if missing:
        raise UserError(
            f"A row has no {' and no '.join(missing)}: train on kdfast.hf.kd_dataset, with "
            "remove_unused_columns=False where a collator is given."
        )
    if len(row["teacher_logits"]) != len(row["input_ids"]) or (
        window_checksum(row["input_ids"]) != row["teacher_window"]
    ):
        raise UserError(
            "A row's teacher_logits belong to other input_ids: shuffle and select whole rows, and "
            "never columns."
        )
