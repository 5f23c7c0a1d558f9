"""Faults injected into whole runs: each ends in one sentence or in the right result."""

import contextlib
import ctypes
import errno
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from kdfast.common import files
from kdfast.common.locks import locked
from kdfast.evaluation import scoring
from kdfast.teachers import cache
from kdfast.training import checkpoint, step
from tests import forks
from tests.corpora import write
from tests.programs import log_of

FLAGS = {"save_steps": 2, "eval_steps": 3, "save_total_limit": 5}


def said(capsys):
    """The one sentence of a run that failed."""
    text = capsys.readouterr().err
    assert "Traceback" not in text
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    return line


def flip(path, place=-3):
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


@pytest.fixture
def whole(world):
    """A whole run's log; its folder and its cache stand."""
    assert world.run(**FLAGS) == 0
    return log_of(world.output)


def cut_to(output, steps):
    for path in checkpoint.list_checkpoints(output):
        if int(path.name.split("-")[1]) > steps:
            shutil.rmtree(path)


FILES = ("model.safetensors", "optimizer.safetensors", "trainer_state.json", "SHA256SUMS")


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(world, whole, capsys):
    kept = world.path / "kept"
    world.output.rename(kept)
    faults = dict.fromkeys((*FILES, "config.json"), flip)
    faults["model.safetensors "] = lambda path: os.truncate(path, 100)
    faults["optimizer.safetensors "] = os.unlink
    for name, spoil in faults.items():
        shutil.rmtree(world.output, ignore_errors=True)
        shutil.copytree(kept, world.output)
        cut_to(world.output, 4)
        spoil(world.output / "checkpoint-4" / name.strip())
        assert world.run(**FLAGS, resume_from_checkpoint=world.output / "checkpoint-4") == 2
        assert "checkpoint-4 is damaged (" in said(capsys)
        assert world.run(**FLAGS, resume_from_checkpoint="last") == 0, name
        out = capsys.readouterr().out
        assert "checkpoint-4 is damaged (" in out and "after step 2" in out
        assert log_of(world.output) == whole


def test_without_a_whole_checkpoint_there_is_one_sentence(world, whole, capsys):
    for path in checkpoint.list_checkpoints(world.output):
        flip(path / "model.safetensors")
    assert world.run(**FLAGS, resume_from_checkpoint="last") == 2
    assert "every checkpoint" in said(capsys)


def test_equal_content_under_other_names_is_the_same_run(world, whole, monkeypatch):
    cut_to(world.output, 2)
    moved = {}
    for name in ("teacher", "student", "train_file"):
        old = Path(getattr(world, name))
        new = old.with_name(f"moved-{old.name}")
        old.rename(new)
        moved[name] = new
    other = write(world.path / "other.json", 21)
    monkeypatch.chdir(world.path)
    moved["train_file"] = f"./{moved['train_file'].name}"
    assert world.run(**FLAGS, **moved, resume_from_checkpoint="last") == 0
    assert log_of(world.output) == whole
    assert world.run(**FLAGS, **{**moved, "train_file": other}, resume_from_checkpoint="last") == 2


def test_what_may_change_changes_when_allowed(world, whole, capsys):
    cut_to(world.output, 4)
    changes = {"learning_rate": 1e-3, "max_steps": 8, "resume_from_checkpoint": "last"}
    assert world.run(**FLAGS, **changes) == 2
    line = said(capsys)
    assert "max_steps (6 -> 8), learning_rate (0.01 -> 0.001)" in line
    assert "--allow_changes max_steps,learning_rate" in line
    allowed = {"allow_changes": "learning_rate,max_steps"}
    assert world.run(**FLAGS, **changes, **allowed, temperature=3.0) == 2
    assert "these differ: temperature (1.5 -> 3.0). Start" in said(capsys)
    assert world.run(**FLAGS, **changes, allow_changes="max_steps") == 2
    assert "Give --allow_changes max_steps,learning_rate if" in said(capsys)
    assert world.run(**FLAGS, **changes, allow_changes="temperature") == 2
    assert "temperature, which may not change" in said(capsys)
    assert world.run(**FLAGS, **changes, **allowed) == 0
    assert "Changed, as allowed: " in capsys.readouterr().out
    steps = [line["step"] for line in log_of(world.output) if "step" in line]
    assert steps == list(range(8))
    record = json.loads((world.output / "run.json").read_text())
    assert record["starts"] == [0, 4] and record["steps"] == 8


def test_a_teacher_or_student_that_differs_is_refused_before_the_teachers_pass(
    world, whole, capsys
):
    shutil.rmtree(world.path / "cache")
    (world.path / "other").mkdir()
    for changes, words in (
        ({"student": world.teacher}, "differ: student."),
        ({"teacher": world.student}, "differ: teacher, teacher's logits."),
    ):
        assert world.run(**FLAGS, **changes, resume_from_checkpoint="last") == 2
        assert words in said(capsys)
    assert not (world.path / "cache" / "teacher").exists()


def test_best_f1_is_not_compared_over_two_sets(world, whole):
    cut_to(world.output, 4)
    folder = world.output / "checkpoint-4"
    state = checkpoint.read_state(folder)
    state["progress"]["best_f1"] = 99.0
    (folder / checkpoint.STATE_FILE).write_text(json.dumps(state))
    files.write_sums(folder, FILES[:3])
    other = write(world.path / "other.json", 4)
    for name, best in ((world.validation_file, 99.0), (other, None)):
        cut_to(world.output, 4)
        flags = {"validation_file": name, "resume_from_checkpoint": "last"}
        assert world.run(**FLAGS, **flags) == 0
        record = json.loads((world.output / "run.json").read_text())
        assert record["best_f1"] == (best or record["metrics"]["f1"])


def test_a_large_cache_is_taken_as_it_is(world, whole, monkeypatch):
    monkeypatch.setattr(cache, "VERIFIED_BYTES", 10)
    flip(next((world.path / "cache").rglob("logits.npy")))
    assert world.run(overwrite=True) == 0


def test_two_runs_do_not_share_a_folder(world, capsys):
    world.output.mkdir()
    with locked(world.output / ".lock") as is_ours:
        assert is_ours and world.run() == 2
        assert "is in use by a run that has not ended" in said(capsys)
    assert world.run() == 0
    assert not (world.output / ".lock").exists()


def test_two_runs_share_a_cache(world):
    def run(number):
        torch.set_num_threads(1)  # the parent's threads did not fork
        forks.leave(world.run(output_dir=world.path / f"out{number}"))

    processes = [forks.FORK.Process(target=run, args=(number,)) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    logs = [log_of(world.path / f"out{number}") for number in range(3)]
    assert logs[0] == logs[1] == logs[2]


def test_an_evaluation_that_fails_at_the_end_loses_no_student(world, monkeypatch, capsys):
    def fails(*arguments, **named):
        raise MemoryError

    monkeypatch.setattr(scoring.answers, "best_spans", fails)
    assert world.run() == 2
    assert f"MemoryError. The trained student is in {world.output}." in capsys.readouterr().err
    monkeypatch.undo()
    assert (world.output / "model.safetensors").is_file()


def test_a_write_that_fails_is_one_sentence(world, whole, monkeypatch, capsys):
    """Disk full at every file that is moved into place, and earlier work intact."""

    def fails_at(patch, number):
        replace, seen = os.replace, []

        def full(*arguments):
            seen.append(arguments)
            if len(seen) == number:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return replace(*arguments)

        patch.setattr(os, "replace", full)

    number = 1
    while True:
        with monkeypatch.context() as patch:
            fails_at(patch, number)
            status = world.run(**FLAGS, overwrite=True)
        if status == 0:
            break
        line = said(capsys)
        assert "The disk is full while" in line and str(world.output) in line
        for path in checkpoint.list_checkpoints(world.output):
            assert checkpoint.torn(path) is None
        number += 3
    assert number > 10
    assert log_of(world.output) == whole


def mounted(folder, size):
    """A small disk of its own at `folder`; skips where this user may mount none."""
    libc = ctypes.CDLL(None, use_errno=True)
    folder.mkdir()
    options = f"size={size}".encode()
    if libc.mount(b"none", str(folder).encode(), b"tmpfs", 0, options):
        pytest.skip(f"mount: {os.strerror(ctypes.get_errno())}")
    return libc


@pytest.fixture
def disk(tmp_path):
    """disk(size): a folder on a disk of that many bytes."""
    with contextlib.ExitStack() as stack:

        def make(size):
            folder = tmp_path / f"disk{size}"
            libc = mounted(folder, size)
            stack.callback(libc.umount2, str(folder).encode(), 2)
            return folder

        yield make


def test_a_disk_that_really_is_full(world, whole, disk, capsys):
    """Output and cache on disks from too small for anything to almost large enough."""
    lines = set()
    for size in range(40_000, 700_000, 80_000):
        folder = disk(size)
        place = {"output_dir": folder / "out", "cache_dir": folder / "cache"}
        status = world.run(**FLAGS, **place)
        if status == 0:
            assert log_of(folder / "out") == whole
            continue
        lines.add(said(capsys).split(str(folder))[0])
        for path in checkpoint.list_checkpoints(folder / "out"):
            assert checkpoint.torn(path) is None
    assert len(lines) >= 2 and all("disk is full" in line or "cache_dir" in line for line in lines)


def test_a_read_only_folder(world, disk, capsys):
    folder = disk(50_000)
    libc = ctypes.CDLL(None)
    assert libc.mount(b"none", str(folder).encode(), b"tmpfs", 32 | 1, None) == 0  # REMOUNT, RDONLY
    assert world.run(output_dir=folder) == 2
    assert "cannot be written (Read-only file system)" in said(capsys)
    assert world.run(cache_dir=folder) == 2
    assert "Read-only file system" in said(capsys)


def test_a_rank_that_is_killed_ends_the_others_with_a_sentence(world, monkeypatch):
    losses = step.kd_loss_rows

    def rank(number):
        seen = []

        def dies(*arguments, **named):
            seen.append(1)
            if number == 1 and len(seen) == 7:
                os.kill(os.getpid(), signal.SIGKILL)
            return losses(*arguments, **named)

        monkeypatch.setattr(step, "kd_loss_rows", dies)
        with (world.path / "said").open("w") as file, contextlib.redirect_stderr(file):
            status = world.run(**FLAGS, max_tokens_per_micro_batch=250)
        forks.leave(status)

    assert forks.exit_codes(2, rank) == [2, -signal.SIGKILL]
    assert "another rank died without a word" in (world.path / "said").read_text()
    assert checkpoint.list_checkpoints(world.output)


def test_room_is_reserved_where_the_system_has_no_call_for_it(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    files.reserve(tmp_path / "a", 3_000_000)
    assert (tmp_path / "a").stat().st_size == 3_000_000
    assert (tmp_path / "a").stat().st_blocks * 512 >= 3_000_000
