"""Checkpoints: a model folder plus what the next step needs. safetensors and JSON, no pickle.

Each stands at the boundary of two steps and holds all that decides what follows. SHA256SUMS in it
tells a whole one from one that is torn or was changed.
"""

import re
from contextlib import suppress
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from kdfast.common import heartbeat
from kdfast.common.errors import UserError
from kdfast.common.files import fault_in, read_json_object, write_json, write_sums, write_tensors
from kdfast.common.folders import even_modes, link_files, remove, rename, sync_folder
from kdfast.common.forms import boolean, list_of, number, optional, record, text, where, whole
from kdfast.data.batches import MicroBatchPolicy
from kdfast.models.checks import MODEL_FILE
from kdfast.models.save import (
    fault_of_model,
    list_checkpoints,
    save_model,
    set_aside,
    writing,
)
from kdfast.models.span_model import SpanModel
from kdfast.training.assemble import Progress, Restored, Training
from kdfast.training.log import LOG_FILE
from kdfast.training.optimizer import ScaledAdamW

FORMAT = 4  # of trainer_state.json
STATE_FILE = "trainer_state.json"
BEST = "best"  # the best model so far, in the run's folder and in each checkpoint
OPTIMIZER_FILE = "optimizer.safetensors"
# What torch's AdamW keeps of each parameter.
ADAM = ("step", "exp_avg", "exp_avg_sq")
VALUE = "value"  # of a parameter that trains and is not the reader's


def save_checkpoint(
    training: Training, tokenizer: Any, identity: dict[str, Any], limit: int
) -> Path:
    """Write run.output/checkpoint-STEPS under another name, sync, rename; keep the last `limit`.

    best/ in it is the best model so far, by links to its files, so that going on from any
    checkpoint finds the one of its own steps.
    identity: what a resumed run must share, see training/resume.py.
    """
    output_dir, optimizer = training.run.output, training.optimizer
    target = output_dir / f"checkpoint-{training.progress.steps}"
    partial = output_dir / f"{target.name}.new"
    with writing(partial):
        save_model(partial, training.student, tokenizer)
        write_tensors(partial / OPTIMIZER_FILE, _trained_tensors(training.student, optimizer))
        even_modes(partial)
        state = {
            "format": FORMAT,
            "updates": optimizer.updates,
            "overflows": optimizer.overflows,
            "scaler": None if optimizer.scaler is None else optimizer.scaler.state_dict(),
            # `rule` is what files of every version call the policy.
            "progress": {**asdict(training.progress), "rule": asdict(training.cuts.policy)},
            "identity": identity,
        }
        write_json(partial / STATE_FILE, state)
        write_sums(partial, sorted(path.name for path in partial.iterdir()))
        if training.progress.best_digest and (output_dir / BEST).is_dir():
            link_files(output_dir / BEST, partial / BEST)
        sync_folder(partial)
        remove(target)
        rename(partial, target)  # for good, before others are deleted
    keep_last(output_dir, limit)
    return target


def keep_last(output_dir: Path, limit: int) -> None:
    """Delete all checkpoints but the last `limit`, and what a kill has left."""
    with writing(output_dir):
        for old in list_checkpoints(output_dir)[:-limit]:
            set_aside(old)  # or a kill could leave a part of it under its own name
    remove_leftovers(output_dir)


def remove_leftovers(output_dir: Path) -> None:
    """Delete what a kill during a write has left, and what set_aside has renamed."""
    for path in output_dir.iterdir():
        if re.fullmatch(r"(checkpoint-\d+|best|last|model)\.(new|old)|\.rehearsal", path.name):
            with suppress(OSError):
                remove(path)


def read_state(folder: Path) -> dict[str, Any]:
    """The state file of a checkpoint. Raises UserError where there is none of this format."""
    state = read_json_object(folder / STATE_FILE)
    if fault := STATE(state):
        raise UserError(
            f"--resume_from_checkpoint {folder} holds no {STATE_FILE} of format {FORMAT} "
            f"(see its {fault}): name a checkpoint-STEP folder of this program."
        )
    return state


def load_checkpoint(folder: Path, model: SpanModel, optimizer: ScaledAdamW) -> Restored:
    """Put weights, optimizer and scaler back. Raises UserError where they do not fit."""
    heartbeat.report(f"loading {folder}", heartbeat.LONG)
    state = read_state(folder)
    try:
        model.reader.load_state_dict(load_file(folder / MODEL_FILE))
        tensors = load_file(folder / OPTIMIZER_FILE)
        if state["updates"] and not any(name.endswith("|step") for name in tensors):
            raise ValueError(f"{OPTIMIZER_FILE} holds no state")
        _restore_trained(model, optimizer, tensors)
        if optimizer.scaler is not None and state["scaler"]:
            optimizer.scaler.load_state_dict(state["scaler"])
        optimizer.updates = state["updates"]
        optimizer.overflows = state["overflows"]
        saved = state["progress"]
        rule = saved.pop("rule")
        return Restored(Progress(**saved), MicroBatchPolicy(**rule) if rule else None)
    except Exception as error:  # safetensors has its own error type for a torn file
        raise UserError(
            f"--resume_from_checkpoint {folder} cannot be read ({error}): {_other_than(folder)}."
        ) from error


def find_checkpoint(name: str, output_dir: Path) -> tuple[Path, list[str]]:
    """The folder that --resume_from_checkpoint names, and what a user should hear about it.

    `last` is the last one that is whole. Raises UserError for a path to one that is not, and where
    there is none.
    """
    if name != "last":
        folder = Path(name).expanduser()
        if (folder / STATE_FILE).is_file() and (fault := torn(folder)):
            raise UserError(
                f"--resume_from_checkpoint {folder} is damaged ({fault}): "
                f"{_other_than(folder)}{_without_best(folder, fault)}."
            )
        read_state(folder)
        return folder, []
    notes: list[str] = []
    remedy = ""
    for folder in reversed(list_checkpoints(output_dir)):
        if (fault := torn(folder)) is None:
            read_state(folder)
            return folder, notes
        notes.append(f"{folder} is damaged ({fault}): the checkpoint before it is used.")
        remedy = remedy or _without_best(folder, fault)
    if notes:
        raise UserError(
            f"--resume_from_checkpoint last: every checkpoint in {output_dir} is damaged: give "
            f"--overwrite instead to start again, or another --output_dir{remedy}."
        )
    remedy = "name the folder of the earlier run"
    if (output_dir / LOG_FILE).is_file():
        remedy = "give --overwrite instead to start again"
    elif all(path.name.startswith(".") for path in output_dir.iterdir()):
        remedy = "leave the flag out to start"
    raise UserError(f"--resume_from_checkpoint last: {output_dir} holds no checkpoint: {remedy}.")


def _other_than(folder: Path) -> str:
    """The remedy for a checkpoint that is no good."""
    others = [path for path in list_checkpoints(folder.parent) if path != folder]
    return f"name another, such as {others[-1]}" if others else "start again without the flag"


def torn(folder: Path) -> str | None:
    """What is damaged in a checkpoint, or None."""
    heartbeat.report(f"the sums of {folder}", heartbeat.LONG)
    fault = fault_in(folder, (MODEL_FILE, OPTIMIZER_FILE, STATE_FILE))
    if fault is None and (folder / BEST).exists():
        digest = read_state(folder)["progress"].get("best_digest")
        best = fault_of_model(folder / BEST, digest or "")
        fault = f"{BEST}/: {best}" if best else None
    return fault


def _without_best(folder: Path, fault: str) -> str:
    """One more remedy, where nothing but the best model of a checkpoint is damaged."""
    if not fault.startswith(f"{BEST}/: "):
        return ""
    return f", or delete {folder / BEST} to go on without the best model so far"


def _trained_tensors(model: SpanModel, optimizer: ScaledAdamW) -> dict[str, torch.Tensor]:
    """Adam's state by parameter, and the parameters that the model's own file does not hold."""
    tensors = {
        f"{name}|{key}": value
        for name, parameter in optimizer.named.items()
        for key, value in optimizer.adamw.state.get(parameter, {}).items()
    }
    others = {f"{name}|{VALUE}": each for name, each in extra_parameters(model, optimizer).items()}
    return tensors | others


def extra_parameters(model: SpanModel, optimizer: ScaledAdamW) -> dict[str, torch.Tensor]:
    """What trains and is not in the model's own file (the projection), by name."""
    own = {id(each) for each in model.reader.parameters()}
    return {name: each.detach() for name, each in optimizer.named.items() if id(each) not in own}


def _restore_trained(
    model: SpanModel, optimizer: ScaledAdamW, tensors: dict[str, torch.Tensor]
) -> None:
    parameters = optimizer.named
    values = {f"{name}|{VALUE}" for name in extra_parameters(model, optimizer)}
    states = {f"{name}|{key}" for name in parameters for key in ADAM}
    if not values <= set(tensors) or set(tensors) - values not in (set(), states):
        raise ValueError(f"{OPTIMIZER_FILE} lacks some of the model's parameters")
    for full_name, value in tensors.items():
        name, key = full_name.rsplit("|", 1)
        parameter = parameters[name]
        shape = () if key == "step" else parameter.shape
        if value.shape != shape or value.dtype not in (torch.float32, parameter.dtype):
            raise ValueError(f"{OPTIMIZER_FILE} does not fit {name}")
        if key == VALUE:
            parameter.data.copy_(value)
        else:
            optimizer.adamw.state[parameter][key] = value.to(parameter.device, copy=True)


_closed = partial(record, others=False)
CUTS = dict.fromkeys((each.name for each in fields(MicroBatchPolicy)), number(0))
CUTS |= {"max_tokens": whole(1, 2**24), "parts": optional(whole(1, 2**24)), "packed": boolean}
# torch's names of a GradScaler's state.
SCALER = {
    "scale": where(lambda value: number(0)(value) is None and value > 0),
    "growth_factor": where(lambda value: number(1)(value) is None and value > 1),
    "backoff_factor": where(lambda value: number(0)(value) is None and 0 < value < 1),
    "growth_interval": whole(1, 2**31),
    "_growth_tracker": whole(0, 2**31),
}
PROGRESS = {
    "steps": whole(),
    "evaluated": whole(),
    "best_f1": optional(number(0)),
    "best_exact": optional(number(0)),
    "best_steps": optional(whole()),
    "best_digest": optional(text),
    "patience_counter": whole(),
    "validation": optional(text),
    "rule": optional(_closed(CUTS, "packed")),
    "clock": where(lambda value: list_of(number(0))(value) is None and len(value) in (0, 5)),
    "starts": list_of(whole()),
}
LATER = ("best_exact", "best_steps", "best_digest", "patience_counter")  # some versions lack them
# Of trainer_state.json, as save_checkpoint writes it.
STATE = record(
    {
        "format": where(lambda value: type(value) is int and value == FORMAT),
        "identity": record({"circumstances": record({})}, "circumstances"),
        "progress": _closed(PROGRESS, *LATER),
        "updates": whole(),
        "overflows": whole(),
        "scaler": optional(_closed(SCALER)),
    }
)
