"""The windows of a run as rows and batches of the Hugging Face Trainer."""

import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any

import numpy as np
import torch
from transformers import default_data_collator

from kdfast.common.device import pick_device
from kdfast.common.errors import UserError
from kdfast.common.run import Run
from kdfast.config import TrainConfig
from kdfast.config_checks import check_teachers
from kdfast.data.cache import PickledByPath
from kdfast.data.windows import Windows
from kdfast.models.hub import local_folder
from kdfast.tokenizers.load import FolderTokenizer, load_tokenizer
from kdfast.training.train_files import TrainFiles

TEACHER_COLUMNS = ("teacher_logits", "teacher_window")
Row = dict[str, Any]
Batch = dict[str, torch.Tensor]


class KDDataset(PickledByPath, torch.utils.data.Dataset):
    """The training windows of a run as rows, read from the mapped files one by one.

    Pickled, for the workers of a DataLoader, it holds the files' paths.

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

    def __getstate__(self) -> dict[str, Any]:
        begins = np.flatnonzero(np.diff(self.chosen, prepend=-2) != 1)
        runs = self.chosen[begins], np.diff(begins, append=len(self.chosen))
        return super().__getstate__() | {"chosen": runs}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        runs = [np.arange(first, first + count) for first, count in zip(*self.chosen, strict=True)]
        self.chosen = np.concatenate(runs) if runs else np.empty(0, np.int64)

    def __getitem__(self, number: int) -> Row:
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
    """The rows of --train_file, with the logits of --teacher for --student.

    What is not in --cache_dir yet is computed: features, and one pass of the teacher. Several
    teachers are averaged at --temperature, and one with another tokenizer is aligned at it: the
    trainer's temperature must be the same then.

    Raises:
        UserError: As `python -m kdfast.train` does, and for a weight of 0, which needs no teacher.
    """
    if not config.model.teacher or not config.learns_answers:
        raise UserError(
            "kd_dataset needs a teacher, a distillation_loss_weight above 0 and stage predictions."
        )
    if not config.data.train_file:
        raise UserError("kd_dataset needs a train_file: name one.")
    if config.mixture.train_weights:
        raise UserError("kd_dataset leaves the order to the Trainer: leave train_weights out.")
    check_teachers(config)
    run = Run(pick_device(int(os.environ.get("LOCAL_RANK", "0"))))  # as the Trainer chooses
    tokenizer = kd_tokenizer(config)
    files = TrainFiles.prepare(config, tokenizer, run.ranks)
    targets = files.find_targets(config, tokenizer, run)
    assert targets is not None
    logits = files.teacher_logits(config, targets, run)
    chosen = np.concatenate([share.windows for share in files.shares(config, run.ranks)])
    temperature = config.loss.temperature if targets.is_derived else None
    return KDDataset(files.windows, chosen, logits, temperature)


def kd_tokenizer(config: TrainConfig) -> FolderTokenizer:
    """The tokenizer of --student, for the Trainer, which writes it as it was read.

    (AutoTokenizer of transformers 5 may make another one of the same files.)
    """
    if not config.model.student:
        raise UserError("kd_tokenizer and kd_dataset need a student: name one.")
    return load_tokenizer(local_folder(config.model.student, "--student"), "--student")


class KDCollator:
    """Makes a batch of rows: tensors (B, L), teacher_logits (B, L, 2) where the rows have them.

    collate: pads the other columns, on the right; by default to the longest row, with an
    attention_mask where there is none, and stacks what is not padded.

    Raises UserError where teacher's columns are missing in some rows or belong to other rows, and
    where `collate` does not keep every row's tokens in their places.
    """

    def __init__(self, pad_token_id: int, collate: Callable[[list[Row]], Batch] | None = None):
        self.pad_token_id = pad_token_id
        self.collate = self.pad if collate is None else collate

    def __call__(self, rows: list[Row]) -> Batch:
        if not any(name in row for row in rows for name in TEACHER_COLUMNS):
            return self.collate(rows)
        for row in rows:
            check_row(row)
        students = [{k: v for k, v in row.items() if k not in TEACHER_COLUMNS} for row in rows]
        try:
            batch = self.collate(students)
        except KeyError as missing:
            if missing.args[0] not in TEACHER_COLUMNS:
                raise
            batch = self.collate(rows)  # a collator that was written for them
        ids = torch.as_tensor(batch["input_ids"])
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        places = torch.arange(ids.shape[1]) < lengths[:, None] if ids.dim() == 2 else ids.bool()
        given = torch.cat([torch.as_tensor(row["input_ids"]) for row in rows])
        if len(ids) != len(rows) or not torch.equal(ids[places], given.to(ids.dtype)):
            raise UserError(
                "The data_collator moves, cuts or changes input_ids, to which teacher_logits "
                "belong position by position: pad on the right alone, or leave data_collator out."
            )
        logits = [torch.as_tensor(np.asarray(row["teacher_logits"], np.float16)) for row in rows]
        batch["teacher_logits"] = torch.zeros((*ids.shape, 2), dtype=torch.float16)
        batch["teacher_logits"][places] = torch.cat(logits)
        return batch

    def pad(self, rows: list[Row]) -> Batch:
        """The default `collate`."""
        if any("input_ids" not in row for row in rows):
            raise UserError(
                "A row has no input_ids: give remove_unused_columns=False where the model's "
                "forward does not name its arguments."
            )
        ones = [{"attention_mask": np.ones(len(row["input_ids"]), np.int64)} for row in rows]
        rows = [one | row for one, row in zip(ones, rows, strict=True)]
        pads = {"input_ids": self.pad_token_id, "attention_mask": 0, "token_type_ids": 0}
        batch = default_data_collator([{k: row[k] for k in row if k not in pads} for row in rows])
        for name in pads.keys() & rows[0].keys():
            columns = [torch.as_tensor(row[name]) for row in rows]
            batch[name] = torch.nn.utils.rnn.pad_sequence(columns, True, pads[name])
        return batch


def kd_parts(dataset: Any) -> Iterator[KDDataset]:
    """Every KDDataset of which a dataset, or a dict of datasets, is made."""
    if isinstance(dataset, KDDataset):
        yield dataset
    elif isinstance(dataset, Mapping):
        yield from chain.from_iterable(map(kd_parts, dataset.values()))
    elif isinstance(dataset, torch.utils.data.Dataset):  # Subset, ConcatDataset, wrappers
        inside = [getattr(dataset, "dataset", None), *getattr(dataset, "datasets", ())]
        yield from chain.from_iterable(map(kd_parts, inside))


def window_checksum(input_ids: Any) -> int:
    """A checksum of a row's tokens, which tells whose teacher logits a row holds."""
    return zlib.crc32(np.ascontiguousarray(input_ids, dtype=np.int64).tobytes())


def check_row(row: Row) -> None:
    """Raise UserError unless the row has teacher logits, and its own."""
    missing = [name for name in TEACHER_COLUMNS if name not in row]
    if missing:
        raise UserError(
            f"A row has no {' and no '.join(missing)}, which others have: train on "
            "kdfast.hf.kd_dataset, and evaluate rows without a teacher apart."
        )
    if len(row["teacher_logits"]) != len(row["input_ids"]) or (
        window_checksum(row["input_ids"]) != row["teacher_window"]
    ):
        raise UserError(
            "A row's teacher_logits belong to other input_ids: shuffle and select whole rows, and "
            "never columns."
        )
