"""Ways to damage a file, and how a program ends that then reads it. `test_damage.py` has the table.

Each cell works on a copy of a run's folder and caches. The program runs in a fork, where root's
rights do not help it, and where it may hang.
"""

import ctypes
import errno
import hashlib
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from kdfast import card, evaluate, predict, prepare
from kdfast.common.files import SUMS_FILE, write_sums
from kdfast.config import WindowSettings
from kdfast.data.cache import FORMAT, cache_folder
from kdfast.data.chunks import WHOLE, ChunkFolder
from kdfast.data.features import Features
from kdfast.teachers import teacher_pass
from kdfast.tokenizers.load import load_tokenizer
from tests import corpora, forks
from tests.programs import World, edit, log_of

SECONDS_AT_MOST = 60
SAME, NOTICED, REFUSED, READ = "same bits", "noticed", "refused", "read as it is"
STEPS = {"save_steps": 2, "eval_steps": 2, "save_total_limit": 5, "license": "mit"}
STEPS |= {"load_best_model_at_end": True}


# The programs. Each gets the world and the place of `out` and the caches, and returns its status.


def _flags(**values) -> list[str]:
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


def _train(world: World, place: Path, cache: str = "cache", output: str = "new", **more) -> int:
    return world.run(**STEPS, output_dir=place / output, cache_dir=place / cache, **more)


def _evaluate(world: World, place: Path) -> int:
    flags = _flags(model=place / "done", cache_dir=place / "cache", output_dir=place / "new")
    return evaluate.main([*flags, "--data", world.validation_file])


def _predict(world: World, place: Path) -> int:
    flags = _flags(model=place / "done", data=world.validation_file, output=place / "new.jsonl")
    return predict.main(flags)


def _card(world: World, place: Path) -> int:
    return card.main(_flags(model_dir=place / "done"))


PROGRAMS: dict[str, Callable[..., int]] = {
    "resume": partial(_train, output="out", resume_from_checkpoint="last"),
    "train": _train,
    "train halfway": partial(_train, cache="halfway"),
    "train shards": partial(_train, cache="shards"),
    "evaluate": _evaluate,
    "predict": _predict,
    "card": _card,
}


READERS = ("evaluate", "predict")  # of a finished model


def _result(program: str, place: Path) -> object:
    """What a program has made: equal bits, or not."""
    if program in READERS:
        return None
    if program == "card":
        return (place / "done" / "README.md").read_text().replace(str(place), "")
    output = place / ("out" if program == "resume" else "new")
    record = json.loads((output / "run.json").read_text())
    models = [_digest(output / name / "model.safetensors") for name in (".", "best", "last")]
    return [log_of(output), models, record["metrics"], record["best_f1"]]


# What is damaged.


def make_ground(home: Path, questions: int, seed: int) -> None:
    """A run's folder and caches, and what runs that were killed have left.

    out: as a kill after checkpoint-4 of 6 steps leaves it, but for what a run ends with. done: the
    whole run's folder, evaluated. cache: of that run. halfway: a cache with chunks of the features,
    and with a teacher's pass that was killed. shards: one with the first of two parts of that pass.
    """
    home.mkdir(parents=True)
    world = World(home)
    world.train_file = corpora.write(home / "train.json", questions)
    (home / "world").write_bytes(pickle.dumps(world))
    assert world.run(**STEPS, seed=seed) == 0
    done = shutil.copytree(home / "out", home / "done")
    for checkpoint in done.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    flags = _flags(model=done, cache_dir=home / "cache", output_dir=done / "eval")
    assert evaluate.main([*flags, "--data", world.validation_file]) == 0
    shutil.rmtree(home / "out" / "checkpoint-6")

    tokenizer = load_tokenizer(Path(world.student), "--student")
    settings = WindowSettings(max_seq_length=200)
    features = Features.of(world.train_file, tokenizer, settings, "train")
    (teacher,) = (path.parent.name for path in home.glob("cache/teacher/*/header.json"))
    folders = {"TRAIN": f"{features.key}-{FORMAT}", "PASS": teacher}
    (home / "folders.json").write_text(json.dumps(folders))

    shutil.copytree(home / "cache", home / "shards")
    shutil.rmtree(home / "shards" / "teacher")
    shutil.copytree(home / "shards", home / "halfway")
    given = {name: getattr(world, name) for name in ("teacher", "student", "train_file")}
    shards = _flags(**given, cache_dir=home / "shards", max_seq_length=200, shard="0/2")
    assert prepare.main(shards) == 0
    _kill_pass(world, home / "halfway")
    halfway = cache_folder(home / "halfway", features.key)
    shutil.rmtree(halfway)
    features.encode(ChunkFolder.of(halfway), WHOLE, None)


def _kill_pass(world: World, cache: Path) -> None:
    """Begin a teacher's pass that ends after one of its micro-batches, as on a full disk."""
    save, saved = teacher_pass.save_progress, []

    def full(*arguments):
        if saved:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        saved.append(save(*arguments))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher_pass, "SECONDS_BETWEEN_SAVES", 0.0)
        patch.setattr(teacher_pass, "save_progress", full)
        assert world.run(cache_dir=cache, output_dir=world.path / "unused") == 2
    shutil.rmtree(world.path / "unused")


# The ways. Each gets the file, and the one of that name which another run has left; a link leads
# to the file itself, which is elsewhere now.


def _write(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def _flip(path: Path, other: Path) -> None:
    content = bytearray(path.read_bytes())
    if content:  # of JSON the last brace, or the end would depend on where a value stands
        content[-2 if path.suffix in (".json", ".jsonl") else len(content) * 2 // 3] ^= 1
    _write(path, bytes(content))


def _replace(path: Path, make: Callable[[], object]) -> None:
    path.unlink()
    make()


def _older(path: Path, other: Path) -> None:
    """What an earlier version would have left in the file's folder, with sums if it wrote them."""
    folder, has_sums = path.parent, (path.parent / SUMS_FILE).is_file()
    if folder.parent.name == "features":
        folder.rename(folder.with_name(f"{folder.name.partition('-')[0]}-{FORMAT - 1}"))
        return
    if path.name == "sums.bin":  # of a version that had a byte for each micro-batch
        path.with_name("done.bin").write_bytes(b"\1" * (path.stat().st_size // 4))
        path.unlink()
        return
    versioned = path
    if folder.name.startswith("checkpoint-"):
        versioned = folder / "trainer_state.json"
    if path.name == "logits.npy":  # of a version that had its values without a header
        (folder / "logits.bin").write_bytes(path.read_bytes()[128:])
        path.unlink()
    elif versioned.suffix == ".json" and "format" in (content := json.loads(versioned.read_text())):
        edit(folder, versioned.name, format=content["format"] - 1)
    if folder.name in ("done", "best"):
        (folder / SUMS_FILE).unlink(missing_ok=True)
    elif has_sums:
        files = {each.name for each in folder.iterdir() if each.is_file()} - {SUMS_FILE}
        write_sums(folder, sorted(files))


WAYS: dict[str, Callable[[Path, Path], object]] = {
    "truncated": lambda path, other: _write(path, path.read_bytes()[: path.stat().st_size // 2]),
    "flipped": _flip,
    "zeros": lambda path, other: _write(path, bytes(path.stat().st_size)),
    "swapped": lambda path, other: _write(path, other.read_bytes()),
    "empty": lambda path, other: _write(path, b""),
    "folder": lambda path, other: _replace(path, path.mkdir),
    "link": lambda path, other: _replace(path, partial(path.symlink_to, other)),
    "pipe": lambda path, other: _replace(path, partial(os.mkfifo, path)),
    "unreadable": lambda path, other: path.chmod(0),
    "older": _older,
    "deleted": lambda path, other: path.unlink(),
}


# The ends.


def end_of(ground: Path, home: Path, program: str, name: str = "", way: str = "") -> str:
    """How a program ends on a copy, in `home`, of the ground with one file damaged.

    One of the ends of the table, or what is wrong.
    """
    place, outside = home / "place", home / "outside"
    outside.mkdir()
    for folder in ("out", "done", "cache", "halfway", "shards"):
        shutil.copytree(ground / "first" / folder, place / folder)
    path = place
    if name:
        path, other = (_in(each, name) for each in (ground / "first", ground / "other"))
        path = place / path.relative_to(ground / "first")
        for each in (path, other):
            if not each.exists():  # a lock, which is there only while a run is
                each.write_bytes(b"of another program")
        shutil.copy(path if way == "link" else other, outside / path.name)
        WAYS[way](path, outside / path.name)
    before, kept = _contents(place), _contents(outside)
    status, printed, said = _run(ground / "first", home, program)
    if status is None:
        return f"hang: {said[-300:]}"
    if status not in (0, 2) or "Traceback" in said or "panicked" in said:
        return f"traceback, status {status}: {said[-1500:]}"
    if _contents(outside) != kept:
        return "a write outside"
    lines = (printed + said).splitlines()
    names = [each for each in (path.name, path.parent.name) if len(each) > 1]
    if status == 2:
        errors = [line for line in lines if line.startswith("error: ")]
        if len(errors) != 1 or not any(each in errors[0] for each in names):
            return f"refused without the name: {errors}"
        after = _contents(place)
        lost = [each for each in before if each != path and after.get(each) != before[each]]
        # A lock is there while a run is, and chunks are there until they are joined.
        lost = [e for e in lost if e.name != ".lock" and e.parent.suffix != ".chunks"]
        return f"refused, with a loss: {lost}: {errors}" if lost else REFUSED
    result = json.loads(json.dumps(_result(program, place)))
    if not name:
        (ground / f"{program}.json").write_text(json.dumps([result, lines]))
        return SAME
    usual, usual_lines = json.loads((ground / f"{program}.json").read_text())
    added = [line for line in lines if line not in usual_lines]
    is_told = any(each in line for each in names for line in added)
    if program in READERS or (program == "card" and result != usual):
        return NOTICED if is_told else READ
    if result != usual:
        return f"wrong: {result} instead of {usual}; {added}"
    return NOTICED if is_told else SAME


def _in(home: Path, name: str) -> Path:
    """The path that a name of the table stands for."""
    for short, folder in json.loads((home / "folders.json").read_text()).items():
        name = name.replace(short, folder)
    return home / name


def _contents(folder: Path) -> dict[Path, str]:
    return {
        path: _digest(path)
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink() and path.stat().st_mode & 0o400
    }


def _digest(path: Path) -> str:
    """ "" of what is no file, such as a pipe, in which a read would hang."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def _run(home: Path, scratch: Path, program: str) -> tuple[int | None, str, str]:
    """Status of a program, None where it hangs, and what it wrote to stdout and to stderr."""
    files = [scratch / name for name in ("stdout", "stderr")]

    def child() -> None:
        for number, path in enumerate(files, 1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        os.environ["HF_HUB_OFFLINE"] = "1"
        torch.set_num_threads(1)  # the parent's threads did not fork
        card.find_spec = lambda name: None  # without pictures, which take longer than a run
        _drop_rights()
        world = pickle.loads((home / "world").read_bytes())
        forks.leave(PROGRAMS[program](world, scratch / "place"))

    process = forks.FORK.Process(target=child)
    process.start()
    process.join(SECONDS_AT_MOST)
    process.kill()
    process.join()
    place = str(scratch / "place")
    texts = [path.read_text(errors="replace").replace(place, "") for path in files]
    return None if process.exitcode == -9 else process.exitcode, *texts


def _drop_rights() -> None:
    """Let modes of files hold for root too: no capabilities any more, in this process."""
    if os.geteuid() == 0:
        version = (ctypes.c_uint32 * 2)(0x20080522, 0)
        if ctypes.CDLL(None, use_errno=True).capset(version, (ctypes.c_uint32 * 6)()):
            raise OSError(ctypes.get_errno(), "capset")
