"""A run's model folders, written so that a kill or a full disk never leaves half of one."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from kdfast.common import heartbeat
from kdfast.common.errors import UserError
from kdfast.common.folders import even_modes, sync_folder
from kdfast.models.checks import vocabulary_size
from kdfast.models.load import Loaded, first_line, load_reader
from kdfast.models.span_model import SpanModel
from kdfast.tokenizers.template import same_tokens

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
    found = (
        (int(match[1]), path)
        for path in output_dir.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    )
    return [path for _, path in sorted(found)]


def kept_models(output_dir: Path) -> str:
    """The end of a sentence about a run that fails: what it leaves that is good, or nothing."""
    names = [path.name for path in list_checkpoints(output_dir)[-1:]]
    names += ["best/"] if (output_dir / "best").is_dir() else []
    if not names:
        return ""
    return f"; {' and '.join(names)} {'is' if len(names) == 1 else 'are'} whole"


def save_model(folder: Path, model: SpanModel, tokenizer: Any) -> None:
    """Write config, safetensors and tokenizer into `folder`, as AutoModel… loads them."""
    heartbeat.report(f"writing {folder}", heartbeat.LONG)
    with writing(folder):
        model.reader.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        even_modes(folder)


def rehearse_saving(output: Path, student: Loaded, name: str) -> None:
    """Save the student, `name`, into a folder of `output` that is deleted again, and load it back.

    So that saving cannot fail only after training. Raises UserError if it does not come back the
    same.
    """
    folder = output / REHEARSAL
    shutil.rmtree(folder, ignore_errors=True)
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
        if isinstance(error, UserError) and "--output_dir" in str(error):
            raise  # of the disk, not of the model
        fault = first_line(error)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        model.train(was_training)
    if fault:
        raise UserError(
            f"{name} cannot be saved and read again, so that its training would be lost ({fault}): "
            "take out of its config.json what an encoder does not need, or name another model."
        )


def keep_weights(folder: Path, model: SpanModel) -> Path:
    """Write the bare weights of a model that cannot be saved as one; returns the file."""
    path = folder / WEIGHTS_FILE
    with writing(path):
        tensors = model.reader.state_dict()
        save_file({name: each.detach().cpu().clone() for name, each in tensors.items()}, path)
    return path


def replace_model(folder: Path, model: SpanModel, tokenizer: Any) -> None:
    """As save_model. Should it be killed, mend_model finds the old folder or the new one."""
    new, old = folder.with_name(folder.name + ".new"), _old(folder)
    with writing(folder):
        shutil.rmtree(new, ignore_errors=True)
        save_model(new, model, tokenizer)
        sync_folder(new)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


def mend_model(folder: Path) -> None:
    """Bring back the old folder where a kill came between replace_model's renames."""
    if _old(folder).is_dir() and not folder.exists():
        _old(folder).rename(folder)


def place_model(folder: Path, model: SpanModel, tokenizer: Any) -> None:
    """As save_model, into a folder that holds other things too: each file is the old or the new."""
    new = folder / "model.new"
    shutil.rmtree(new, ignore_errors=True)
    save_model(new, model, tokenizer)
    move_files(new, folder)


def place_copy(source: Path, folder: Path) -> None:
    """Copy the files of model folder `source` into `folder`, as place_model does."""
    new = folder / "model.new"
    heartbeat.report(f"copying {source}", heartbeat.LONG)
    with writing(folder):
        shutil.rmtree(new, ignore_errors=True)
        shutil.copytree(source, new)
    move_files(new, folder)


def move_files(new: Path, folder: Path) -> None:
    """Make the files of `new` durable and move them into `folder`."""
    with writing(folder):
        sync_folder(new)
        for path in new.iterdir():
            os.replace(path, folder / path.name)
        new.rmdir()


def _old(folder: Path) -> Path:
    return folder.with_name(folder.name + ".old")


def _write_error(path: Path, number: int | None, reason: str) -> UserError:
    if number in (errno.ENOSPC, errno.EDQUOT):
        # path is the run's folder, or something in it.
        checkpoints = [*list_checkpoints(path), *list_checkpoints(path.parent)]
        advice = ""
        if checkpoints:
            name = checkpoints[-1].name
            advice = f" and go on with --resume_from_checkpoint last, which is {name}"
        return UserError(f"The disk is full while {path} is written: free some space{advice}.")
    return UserError(f"{path} cannot be written ({reason}): choose another --output_dir.")
