"""A run's model folders, written so that a kill or a full disk never leaves half of one."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from kdfast.common import heartbeat
from kdfast.common.errors import UserError, WriteError, first_line, remedy
from kdfast.common.files import (
    SUMS_FILE,
    fault_in,
    listed,
    sha256_of,
    write_sums,
    write_tensors,
)
from kdfast.common.folders import (
    copy_files,
    even_modes,
    fresh_folder,
    link_files,
    remove,
    rename,
    sync_folder,
)
from kdfast.models.checks import MODEL_FILE, nonfinite_weight, vocabulary_size
from kdfast.models.load import Loaded, load_reader
from kdfast.models.span_model import SpanModel
from kdfast.tokenizers.template import same_tokens

CONFIG_FILE = "config.json"
REHEARSAL = ".rehearsal"  # the folder of rehearse_saving, within the run's
RUN_FILE = "run.json"  # of a training run, next to its model
WEIGHTS_FILE = "student-weights.safetensors"  # of keep_weights


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns errors of a disk that cannot be written into UserErrors that name `path`."""
    try:
        yield
    except OSError as error:
        raise _write_error(path, error.errno, error.strerror or str(error)) from error
    except Exception as error:
        # safetensors and tokenizers, which raises this very class, keep the system's text alone.
        if not isinstance(error, SafetensorError) and type(error) is not Exception:
            raise
        number = errno.ENOSPC if os.strerror(errno.ENOSPC) in str(error) else None
        raise _write_error(path, number, str(error)) from error


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    found = listed(output_dir, "checkpoint-*")
    whole = (path for path in found if re.fullmatch(r"checkpoint-\d+", path.name))
    return sorted(whole, key=steps_of)


def steps_of(checkpoint: Path) -> int:
    """The steps that a run had done when it wrote the checkpoint."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def kept_models(output_dir: Path) -> str:
    """The end of a sentence about a run that fails: what it leaves that is good, or nothing."""
    names = [path.name for path in list_checkpoints(output_dir)[-1:]]
    names += ["best/"] if (output_dir / "best").is_dir() else []
    if not names:
        return ""
    return f"; {' and '.join(names)} {'is' if len(names) == 1 else 'are'} kept"


def check_weights(model: SpanModel, output_dir: Path) -> None:
    """Raise UserError before weights that are not finite replace good ones in `output_dir`."""
    if name := nonfinite_weight(model.named_parameters()):
        raise UserError(
            f"The student's weights are not finite ({name}) and are not saved: lower "
            f"--learning_rate, or give a sound --student{kept_models(output_dir)}."
        )


def save_model(folder: Path, model: SpanModel, tokenizer: Any) -> None:
    """Write config, safetensors and tokenizer into a new `folder`, as AutoModel… loads them.

    Raises UserError for weights that are not finite, before they replace good ones.
    """
    heartbeat.report(f"writing {folder}", heartbeat.LONG)
    check_weights(model, folder.parent)
    with writing(folder):
        fresh_folder(folder)
        model.reader.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        even_modes(folder)


def rehearse_saving(output: Path, student: Loaded, name: str) -> None:
    """Save the student, `name`, into a folder of `output` that is deleted again, and load it back.

    So that saving cannot fail only after training. Raises UserError if it does not come back the
    same.
    """
    check_weights(student.model, output)
    folder = output / REHEARSAL
    model = student.model
    ids = torch.arange(min(32, vocabulary_size(model.reader)))[None]
    was_training = model.training
    fault = None
    try:
        save_model(folder, model, student.tokenizer)
        again = load_reader(str(folder), "The saved copy of")
        with torch.inference_mode():
            logits, others = model.eval()(ids), again.model.eval()(ids)
        if not torch.equal(logits.nan_to_num(), others.nan_to_num()):
            fault = "it comes back with other logits"
        elif not same_tokens(again.tokenizer, student.tokenizer):
            fault = "it comes back with another tokenizer"
    except Exception as error:
        if isinstance(error, WriteError):
            raise
        fault = first_line(error)
    finally:
        with suppress(OSError):
            remove(folder)
        model.train(was_training)
    if fault:
        raise UserError(
            f"{name} cannot be saved and read again, so that its training would be lost ({fault}): "
            "take out of its config.json what an encoder does not need, or name another model."
        )


def keep_weights(folder: Path, model: SpanModel) -> Path:
    """Write the bare weights of a model that cannot be saved as one; returns the file."""
    path = folder / WEIGHTS_FILE
    tensors = {name: each.detach().cpu() for name, each in model.reader.state_dict().items()}
    with writing(path):
        write_tensors(path, {name: each.clone() for name, each in tensors.items()})
    return path


def replace_model(folder: Path, model: SpanModel, tokenizer: Any) -> str:
    """As save_model, with SHA256SUMS; returns the digest that fault_of_model takes."""
    with _replacing(folder) as new:
        save_model(new, model, tokenizer)
        return _write_digest(new)


def link_model(source: Path, folder: Path) -> str:
    """As replace_model, with links to the files of `source`, or copies of them."""
    with _replacing(folder) as new:
        link_files(source, new)
        return _write_digest(new)


def fault_of_model(folder: Path, digest: str) -> str | None:
    """Why `folder` is not the model that was written with `digest`; None: it is."""
    heartbeat.report(f"the sums of {folder}", heartbeat.LONG)
    fault = fault_in(folder, (CONFIG_FILE, MODEL_FILE))
    if fault is None and sha256_of(folder / SUMS_FILE) != digest:
        fault = "it is the model of another run or step"
    return fault


def _write_digest(folder: Path) -> str:
    """The sha256 of a model's SHA256SUMS, which is written unless it is there."""
    if not (folder / SUMS_FILE).exists():
        write_sums(folder, sorted(path.name for path in folder.iterdir()))
    return sha256_of(folder / SUMS_FILE)


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A folder to write, which takes the place of `folder` once it is durable."""
    new, old = folder.with_name(folder.name + ".new"), _old(folder)
    with writing(folder):
        yield fresh_folder(new)
        sync_folder(new)
        if folder.exists():
            remove(old)
            rename(folder, old)
        rename(new, folder)
        remove(old)


def set_aside(folder: Path) -> None:
    """Rename `folder`, so that no run takes it for its own; remove_leftovers deletes it."""
    with writing(folder):
        remove(_old(folder))
        rename(folder, _old(folder))


def place_model(folder: Path, model: SpanModel, tokenizer: Any) -> None:
    """As save_model, into a folder that holds other things too: each file is the old or the new."""
    new = folder / "model.new"
    save_model(new, model, tokenizer)
    move_files(new, folder)


def place_copy(source: Path, folder: Path) -> None:
    """Copy the model in `source`, as replace_model wrote it, into `folder` as place_model does."""
    new = folder / "model.new"
    heartbeat.report(f"copying {source}", heartbeat.LONG)
    with writing(folder):
        copy_files(source, fresh_folder(new), but=SUMS_FILE)
    move_files(new, folder)


def move_files(new: Path, folder: Path) -> None:
    """Make the files of `new` durable and move them into `folder`."""
    with writing(folder):
        sync_folder(new)
        for path in new.iterdir():
            rename(path, folder / path.name)
        remove(new)


def _old(folder: Path) -> Path:
    return folder.with_name(folder.name + ".old")


def _write_error(path: Path, number: int | None, reason: str) -> WriteError:
    if number in (errno.ENOSPC, errno.EDQUOT):
        # path is the run's folder, or something in it.
        checkpoints = [*list_checkpoints(path), *list_checkpoints(path.parent)]
        is_finished = (path / RUN_FILE).exists()  # its card is written
        advice = ""
        if checkpoints and not is_finished and path.name != REHEARSAL:  # before the first step
            name = checkpoints[-1].name
            advice = f" and go on with --resume_from_checkpoint last, which is {name}"
        return WriteError(f"The disk is full while {path} is written: free some space{advice}.")
    advice = remedy(number) or "see to its rights, or choose another folder"
    return WriteError(f"{path} cannot be written ({reason}): {advice}.")
