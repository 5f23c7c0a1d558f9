"""The output folder of a run: taken at the start, and run.json at the end."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kdfast.common import heartbeat
from kdfast.common.errors import UserError
from kdfast.common.files import create, write_json
from kdfast.common.folders import check_no_links, make_writable, remove
from kdfast.common.locks import locked
from kdfast.common.ranks import Ranks
from kdfast.config import TrainConfig
from kdfast.models.save import RUN_FILE, WEIGHTS_FILE, writing
from kdfast.training.checkpoint import list_checkpoints, remove_leftovers
from kdfast.training.log import LOG_FILE, TENSORBOARD_FOLDER

CARD_SETTINGS = "card.json"  # what kdfast.card was given, for the next card
LOCK_FILE = ".lock"
FOLDERS = ("best", "last", TENSORBOARD_FOLDER, "figures", ".eval_results")


def open_output(config: TrainConfig) -> Path:
    """The run's folder, created if missing; under --overwrite it may hold an earlier run.

    Raises UserError for a folder that holds anything else, or that cannot be written.
    """
    output = config.output.folder
    if output.exists() and not output.is_dir():
        raise UserError(f"--output_dir {output} is a file: name a folder.")
    data, model = config.data, config.model
    sources = [("teacher", each) for each in model.teacher]
    sources += [("student", model.student), *(("train_file", each) for each in data.train_file)]
    sources += [("unlabelled_file", each) for each in data.unlabelled_file]
    sources += [("validation_file", each) for each in data.validation_file]
    for name, given in sources:
        read = Path(given).expanduser().resolve() if given else None
        if read and read.exists() and output.resolve() in (read, *read.parents):
            raise UserError(
                f"--output_dir {output} holds --{name} {given}, which the run would overwrite: "
                "name another folder."
            )
    if config.output.resume_from_checkpoint:
        if not output.is_dir():
            raise UserError(
                f"--output_dir {output} does not exist, so there is nothing to resume there: "
                "name the folder of the earlier run."
            )
    elif output.is_dir() and any(not path.name.startswith(".") for path in output.iterdir()):
        if not config.output.overwrite:
            remedy = "name another"
            remedy += ", or add --overwrite" if is_run(output) else ""
            remedy += ", or --resume_from_checkpoint last" if list_checkpoints(output) else ""
            raise UserError(f"--output_dir {output} is not empty: {remedy}.")
        check_is_run(output)
    check_no_links(output, "--output_dir")
    try:
        make_writable(output)
    except OSError as error:
        raise UserError(
            f"--output_dir {output} cannot be written ({error.strerror}): name another."
        ) from error
    return output


@contextmanager
def sole_run(output: Path, ranks: Ranks) -> Iterator[None]:
    """Hold `output`, which is there, for this run. Raises UserError where another run has it."""
    if not ranks.is_first:
        yield
        return
    with locked(output / LOCK_FILE) as is_ours:
        if not is_ours:
            raise UserError(
                f"--output_dir {output} is in use by a run that has not ended: name another folder."
            )
        yield


def is_run(output: Path) -> bool:
    """Whether `output` is the folder of an earlier run."""
    return (output / RUN_FILE).is_file() or (output / LOG_FILE).is_file()


def check_is_run(output: Path) -> None:
    """Raise UserError unless `output` is the folder of an earlier run."""
    if not is_run(output):
        raise UserError(
            f"--output_dir {output} holds something else than a run of this program, which "
            "--overwrite does not delete: name another folder."
        )


def remove_run(output: Path) -> None:
    """Delete what an earlier run wrote next to its model and its log, and nothing else."""
    heartbeat.report(f"deleting the earlier run in {output}", heartbeat.LONG)
    remove_leftovers(output)
    for path in list_checkpoints(output):
        remove(path)
    for name in (*FOLDERS, RUN_FILE, CARD_SETTINGS, "README.md", "report.html", WEIGHTS_FILE):
        remove(output / name)


def check_shared(folder: Path, ranks: Ranks, role: str) -> None:
    """Raise UserError unless `folder` can be written and is the same one for every rank."""
    if ranks.count == 1:
        return
    mark = folder / f".seen-by-all-{ranks.share(str(os.getpid()))}"
    if ranks.is_first:
        try:
            make_writable(folder)
            create(mark).close()
        except OSError as error:
            raise UserError(
                f"{role} {folder} cannot be written ({error.strerror}): name another."
            ) from error
    ranks.barrier()
    seen = mark.exists()
    ranks.barrier()
    if ranks.is_first:
        remove(mark)
    if not seen:
        raise UserError(
            f"{role} {folder} is not the same folder on the node of rank {ranks.rank}: name one "
            "on storage that all nodes share."
        )


def write_run(output: Path, content: dict[str, Any]) -> None:
    """Write run.json: everything about the run that a reader of its figures needs."""
    with writing(output / RUN_FILE):
        write_json(output / RUN_FILE, content)


def local_paths(config: TrainConfig) -> list[str]:
    """What flags named that is on this machine: read elsewhere, `models/small` looks like an id."""
    model, data = config.model, config.data
    named = [model.student, *model.teacher, *data.train_file]
    named += data.unlabelled_file + data.validation_file
    return [name for name in named if name and Path(name).expanduser().exists()]
