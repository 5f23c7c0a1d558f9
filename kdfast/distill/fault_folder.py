"""What a step that was not finite leaves behind: its windows, weights and settings, to be replayed.

A folder `OUTPUT/fault-STEP`: the student as the step found it (config, safetensors, tokenizer);
`batch.safetensors` with the micro-batches of one rank, padded as they ran, and the student's
logits, or terms, of them; `fault.json` with the rest: settings, seeds' keys, window numbers,
question ids, findings.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kdfast.distill import models
from kdfast.distill.checkpoint import beside_reader
from kdfast.distill.config import TrainConfig
from kdfast.distill.feed import MicroBatch, map_tensors
from kdfast.distill.model_folders import save_model
from kdfast.distill.optim import Updater
from kdfast.distill.precision import AUTOCAST
from kdfast.distill.step import Stepper
from kdfast.errors import UserError
from kdfast.files import even_modes, read_json_object, sync_folder, write_json
from kdfast.squad.features import Windows

FORMAT = 1
FACTS_FILE = "fault.json"
BATCH_FILE = "batch.safetensors"
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OTHERS = ("start_positions", "end_positions", "teacher_logits")
# What working with JSON of another shape than expected raises.
MALFORMED = (ValueError, TypeError, LookupError, AttributeError, OverflowError)
NEEDED = ("input_ids", "start_positions", "end_positions")
# name -> type, and how many of the dimensions (windows, width, 2) it has.
TENSORS = {
    "input_ids": (torch.int64, 2),
    "attention_mask": (torch.bool, 2),
    "token_type_ids": (torch.int64, 2),
    "start_positions": (torch.int64, 1),
    "end_positions": (torch.int64, 1),
    "teacher_logits": (torch.float16, 3),
}


@dataclass(frozen=True)
class Replayed:
    """A micro-batch, its windows' numbers, and what Stepper.forward made of it: in stage
    predictions the student's logits (n, L, 2), in stage layers the windows' terms (n, 2)."""

    indices: np.ndarray
    batch: MicroBatch
    output: torch.Tensor


@dataclass(frozen=True)
class Kept:
    """What `read` found. step, rank: whose dropout is drawn again; count: windows of the step.

    loss_scale: of the step, None without a scaler. cuts: the micro-batches' window numbers;
    batches: the same micro-batches, on the host. questions: id of each window's question. beside:
    what trained beside the student, by its name in Updater.named.
    """

    config: TrainConfig
    step: int
    rank: int
    count: int
    loss_scale: float | None
    precision: str
    questions: dict[int, str]
    cuts: list[np.ndarray]
    batches: list[MicroBatch]
    beside: dict[str, torch.Tensor]


class KeptFeed:
    """The Feed of a folder's micro-batches, which were cut when they first ran."""

    def __init__(self, batches: list[MicroBatch], device: torch.device):
        self.batches = batches
        self.device = device

    def micro_batches(self, cuts: list[np.ndarray]) -> Iterator[MicroBatch]:
        for each in self.batches:
            yield map_tensors(each, lambda tensor: tensor.to(self.device))

    def expect(self, cuts: list[np.ndarray]) -> None:
        """All is there already."""


def write(
    output: Path,
    stepper: Stepper,
    windows: Windows,
    tokenizer,
    facts: dict[str, Any],
    replayed: list[Replayed],
) -> Path:
    """Write output/fault-STEP beside, sync, rename. Raises OSError or UserError where it cannot."""
    folder = output / f"fault-{facts['step']}"
    beside = folder.with_name(folder.name + ".new")
    shutil.rmtree(beside, ignore_errors=True)
    save_model(beside, stepper.model, tokenizer)
    tensors = {}
    for number, each in enumerate(replayed):
        kind = "student_logits" if each.output.dim() == 3 else "terms"
        found = {**each.batch.inputs, kind: each.output}
        found |= {name: getattr(each.batch, name) for name in OTHERS}
        tensors |= {f"{number}.{name}": t for name, t in found.items() if t is not None}
    tensors |= beside_reader(stepper.model, stepper.updater)
    save_file({name: t.contiguous() for name, t in tensors.items()}, beside / BATCH_FILE)
    even_modes(beside)
    ids = windows.question_ids
    cuts = [each.indices.tolist() for each in replayed]
    content = {
        "format": FORMAT,
        **facts,
        "precision": stepper.precision,
        "windows": cuts,
        "questions": {w: ids[int(windows.question[w])] for cut in cuts for w in cut},
        "settings": asdict(stepper.config),
    }
    write_json(beside / FACTS_FILE, _without_nan(content))
    sync_folder(beside)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(beside, folder)
    return folder


def read(folder: Path) -> Kept:
    """What `write` left. Raises UserError for a folder that holds something else."""
    facts = read_json_object(folder / FACTS_FILE)
    try:
        if facts.get("format") != FORMAT:
            raise ValueError(f"no {FACTS_FILE} of format {FORMAT}")
        known = {each.name for each in fields(TrainConfig)}
        if set(facts["settings"]) != known:
            raise ValueError("its settings are of another version of this program")
        config = TrainConfig(**facts["settings"])
        config.check()
        tensors = load_file(folder / BATCH_FILE)
        cuts = [np.array(cut, dtype=np.int64) for cut in facts["windows"]]
        report = facts["report"]
        loss_scale = report["loss_scale"]
        return Kept(
            config,
            step=_natural(facts["step"]),
            rank=_natural(facts["rank"]),
            count=max(1, _natural(report["windows"])),
            loss_scale=None if loss_scale is None else float(loss_scale),
            precision=_one_of(facts["precision"], AUTOCAST),
            questions={int(window): str(each) for window, each in facts["questions"].items()},
            cuts=cuts,
            batches=[_batch(tensors, number, len(cut), config) for number, cut in enumerate(cuts)],
            beside={name: each for name, each in tensors.items() if "." not in name},
        )
    except (*MALFORMED, OSError, SafetensorError) as error:
        raise UserError(
            f"{folder} cannot be replayed ({error}): name a fault-STEP folder of a run."
        ) from error


def check_fits(kept: Kept, loaded: models.Loaded, folder: Path) -> None:
    """Raise UserError for windows that the folder's own model cannot read."""
    reader = loaded.model.reader
    known = {"input_ids": reader.get_input_embeddings().num_embeddings}
    if loaded.model.takes_token_types:
        known["token_type_ids"] = reader.config.type_vocab_size
    for batch in kept.batches:
        models.check_fits(loaded, batch.inputs["input_ids"].shape[1], str(folder))
        for name, count in known.items():
            ids = batch.inputs[name]
            if ids is not None and not 0 <= int(ids.min()) <= int(ids.max()) < count:
                raise UserError(f"{folder} holds {name} that its own model lacks: leave it.")


def restore_beside(kept: Kept, model: models.SpanModel, updater: Updater, folder: Path) -> None:
    """Put back what trained beside the student. Raises UserError where the folder has not all."""
    for name, each in beside_reader(model, updater).items():
        found = kept.beside.get(name)
        if found is None or found.shape != each.shape:
            raise UserError(f"{folder} holds no {name} that fits its model and teacher: leave it.")
        each.copy_(found)


def _natural(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{value!r} stands for a number")
    return value


def _one_of(value: Any, known: Any) -> Any:
    if value not in known:
        raise ValueError(f"{value!r} is not one of {', '.join(known)}")
    return value


def _batch(
    tensors: dict[str, torch.Tensor], number: int, windows: int, config: TrainConfig
) -> MicroBatch:
    """Micro-batch `number`. Raises ValueError unless its tensors are what `write` writes."""
    width = tensors[f"{number}.input_ids"].shape[-1]
    needed = (*NEEDED, "teacher_logits") if config.learns_answers else NEEDED
    if windows * width == 0:
        raise ValueError(f"micro-batch {number} is empty")
    found = {}
    for name, (dtype, dimensions) in TENSORS.items():
        tensor = found[name] = tensors.get(f"{number}.{name}")
        wanted = (windows, width, 2)[:dimensions]
        if tensor is None and name not in needed:
            continue
        if tensor is None or tensor.dtype != dtype or tensor.shape != wanted:
            raise ValueError(f"{BATCH_FILE} holds no {name} of micro-batch {number}")
        found[name] = tensor.clone()  # in a file that something else wrote it may be unaligned
    return MicroBatch(
        inputs={name: found[name] for name in INPUTS},
        mask=found["attention_mask"],
        **{name: found[name] for name in OTHERS},
    )


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: such a number becomes its name."""
    if isinstance(value, dict):
        return {name: _without_nan(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(each) for each in value]
    if isinstance(value, float) and not np.isfinite(value):
        return str(value)
    return value
