"""Checkpoints: a model folder plus what the next step needs. safetensors and JSON, no pickle."""

import errno
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from kdfast.distill.models import SpanModel
from kdfast.distill.optim import Updater
from kdfast.errors import UserError
from kdfast.files import read_json_object, sync_folder, write_json
from kdfast.squad.batches import CutRule

FORMAT = 2
STATE_FILE = "trainer_state.json"
OPTIMIZER_FILE = "optimizer.safetensors"


@dataclass
class Progress:
    """Where a run stands. steps: attempted so far; best_f1: of the evaluations so far, or None.

    rule: how its steps are cut, None before the first.
    """

    steps: int = 0
    best_f1: float | None = None
    rule: CutRule | None = None


def save_model(folder: Path, model: SpanModel, tokenizer) -> None:
    """Write config, safetensors and tokenizer into `folder`, as AutoModel… loads them."""
    try:
        model.reader.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except OSError as error:
        raise _write_error(folder, error) from error


def replace_model(folder: Path, model: SpanModel, tokenizer) -> None:
    """As save_model, but `folder` is the old one or the new one at every instant but a rename."""
    beside = folder.with_name(folder.name + ".new")
    shutil.rmtree(beside, ignore_errors=True)
    save_model(beside, model, tokenizer)
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)


def save_checkpoint(
    output_dir: Path,
    model: SpanModel,
    tokenizer,
    updater: Updater,
    progress: Progress,
    identity: dict[str, Any],
    limit: int,
) -> Path:
    """Write output_dir/checkpoint-STEPS beside, sync, rename, and keep the last `limit` up to it.

    Later ones, of a run that was resumed from before them, are deleted: this run passes them anew.
    identity: the config and the keys of data and teacher, which a resumed run must share.
    """
    target = output_dir / f"checkpoint-{progress.steps}"
    beside = output_dir / f"{target.name}.new"
    shutil.rmtree(beside, ignore_errors=True)
    try:
        save_model(beside, model, tokenizer)
        save_file(_optimizer_tensors(model, updater), beside / OPTIMIZER_FILE)
        state = {
            "format": FORMAT,
            "steps": progress.steps,
            "updates": updater.updates,
            "best_f1": progress.best_f1,
            "cuts": None if progress.rule is None else asdict(progress.rule),
            "scaler": None if updater.scaler is None else updater.scaler.state_dict(),
            "identity": identity,
        }
        write_json(beside / STATE_FILE, state)
        sync_folder(beside)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(beside, target)
    except OSError as error:
        raise _write_error(beside, error) from error
    checkpoints = list_checkpoints(output_dir)
    passed = checkpoints.index(target) + 1
    for old in [*checkpoints[passed:], *checkpoints[:passed][:-limit]]:
        shutil.rmtree(old)
    return target


def load_checkpoint(
    folder: Path, model: SpanModel, updater: Updater, identity: dict[str, Any]
) -> Progress:
    """Put weights, optimizer and scaler back. Raises UserError if it is of another run, or torn."""
    state = read_json_object(folder / STATE_FILE)
    parts = ("identity", "steps", "updates", "best_f1", "cuts", "scaler")
    if state.get("format") != FORMAT or any(part not in state for part in parts):
        raise UserError(
            f"--resume_from_checkpoint {folder} holds no {STATE_FILE} of format {FORMAT}: "
            "name a checkpoint-STEP folder of this program."
        )
    saved = state["identity"]
    different = [name for name in identity if identity[name] != saved.get(name)]
    if different:
        told = ", ".join(f"{name} ({saved.get(name)} -> {identity[name]})" for name in different)
        raise UserError(
            f"--resume_from_checkpoint {folder} belongs to another run; these differ: {told}. "
            "Start with the same settings and data, or start anew in another --output_dir."
        )
    try:
        weights = load_file(folder / "model.safetensors")
        tensors = load_file(folder / OPTIMIZER_FILE)
        model.reader.load_state_dict(weights)
        if state["updates"] and not tensors:
            raise ValueError(f"{OPTIMIZER_FILE} is empty")
        _restore_optimizer(model, updater, tensors)
    except Exception as error:  # safetensors has its own error type for a torn file
        raise UserError(
            f"--resume_from_checkpoint {folder} cannot be read ({error}): name an earlier one."
        ) from error
    if updater.scaler is not None:
        updater.scaler.load_state_dict(state["scaler"])
    updater.updates = state["updates"]
    rule = None if state["cuts"] is None else CutRule(**state["cuts"])
    return Progress(steps=state["steps"], best_f1=state["best_f1"], rule=rule)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    found = (
        (int(match[1]), path)
        for path in output_dir.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    )
    return [path for _, path in sorted(found)]


def find_checkpoint(name: str, output_dir: Path) -> Path:
    """The folder that --resume_from_checkpoint names: `last`, or a path."""
    if name != "last":
        return Path(name).expanduser()
    checkpoints = list_checkpoints(output_dir)
    if not checkpoints:
        raise UserError(
            f"--resume_from_checkpoint last: {output_dir} holds no checkpoint; leave the flag out "
            "to start anew."
        )
    return checkpoints[-1]


def _optimizer_tensors(model: SpanModel, updater: Updater) -> dict[str, torch.Tensor]:
    return {
        f"{name}|{key}": value
        for name, parameter in model.reader.named_parameters()
        for key, value in updater.optimizer.state.get(parameter, {}).items()
    }


def _restore_optimizer(
    model: SpanModel, updater: Updater, tensors: dict[str, torch.Tensor]
) -> None:
    parameters = dict(model.reader.named_parameters())
    if tensors and {name.rsplit("|", 1)[0] for name in tensors} != set(parameters):
        raise ValueError(f"{OPTIMIZER_FILE} lacks some of the model's parameters")
    for full_name, value in tensors.items():
        name, key = full_name.rsplit("|", 1)
        parameter = parameters[name]
        updater.optimizer.state[parameter][key] = value.to(parameter.device)


def _write_error(folder: Path, error: OSError) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"The disk is full while {folder} is written: free some space and go on with "
            "--resume_from_checkpoint last; earlier checkpoints are whole."
        )
    return UserError(f"{folder} cannot be written ({error.strerror}): choose another --output_dir.")
