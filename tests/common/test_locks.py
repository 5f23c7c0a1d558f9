"""Lock files: who holds one, what stands in their place, and where there are no locks."""

import errno
import fcntl
import os
import threading
from pathlib import Path

import pytest

from kdfast.common import locks
from kdfast.common.errors import UserError
from kdfast.common.locks import lock, locked
from kdfast.data.prepare import prepare_windows
from tests.data.made_up import SMALL, random_examples, write_source
from tests.small_tokenizers import of_family


def test_one_holds_it_and_it_goes_with_its_holder(tmp_path):
    path = tmp_path / ".lock"
    with locked(path) as first:
        assert first
        with locked(path) as second:
            assert not second
        with path.open() as other, pytest.raises(BlockingIOError):  # as earlier versions lock it
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert not path.exists()


def test_a_lock_of_a_deleted_file_is_none(tmp_path, monkeypatch):
    """The last holder deletes the file after another process has opened it."""
    path, take = tmp_path / ".lock", locks.lock_descriptor
    replaced = []

    def late(handle, blocking):
        if not replaced:
            replaced.append(path.unlink())
            path.touch()
        return take(handle, blocking=blocking)

    monkeypatch.setattr(locks, "lock_descriptor", late)
    with locked(path) as is_ours, locked(path) as is_too:
        assert is_ours and not is_too


def test_a_waiting_process_gets_the_lock(tmp_path):
    got = threading.Event()

    def wait():
        with lock(tmp_path / "lock"):
            got.set()

    with lock(tmp_path / "lock"):
        waiting = threading.Thread(target=wait)
        waiting.start()
        assert not got.wait(0.3)
    waiting.join(60)
    assert got.is_set() and (tmp_path / "lock").exists()


def link(path, target):
    target.write_text("mine")
    path.symlink_to(target)


def dangling(path, target):
    path.symlink_to(target)


def pipe(path, target):
    os.mkfifo(path)


def folder(path, target):
    path.mkdir()


@pytest.mark.parametrize("plant", [link, dangling, pipe, folder])
def test_what_is_no_plain_file_is_refused_and_left_alone(tmp_path, plant):
    target, path = tmp_path / "bashrc", tmp_path / "key.lock"
    plant(path, target)
    before = target.read_text() if target.exists() else None
    for take in lock, locked:
        with (
            pytest.raises(UserError, match=r"key\.lock is not a plain file: remove it"),
            take(path),
        ):
            pass
    assert (target.read_text() if target.exists() else None) == before


def test_a_link_that_comes_after_the_look_is_not_followed(tmp_path, monkeypatch):
    target, path, opens = tmp_path / "bashrc", tmp_path / "key.lock", os.open

    def open_late(name, flags, *mode):
        link(path, target)
        return opens(name, flags, *mode)

    monkeypatch.setattr(os, "open", open_late)
    with pytest.raises(OSError) as refused, lock(path):
        pass
    assert refused.value.errno == errno.ELOOP and target.read_text() == "mine"


def make_windows(cache_dir: Path):
    source = write_source(cache_dir / "source.json", random_examples(3))
    return prepare_windows(source, of_family("bert"), cache_dir=cache_dir, settings=SMALL)


def test_a_cache_whose_lock_is_a_link_is_not_made(tmp_path):
    key = make_windows(tmp_path).key
    made = next(tmp_path.glob(f"features/{key}-*.lock"))
    made.unlink()
    made.with_suffix("").rename(tmp_path / "features" / "away")
    link(made, tmp_path / "bashrc")
    with pytest.raises(UserError, match=f"{made.name} is not a plain file"):
        make_windows(tmp_path)
    assert (tmp_path / "bashrc").read_text() == "mine"


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_there_are_no_locks_work_goes_on_and_says_so_once(
    tmp_path, monkeypatch, capsys, code
):
    def none(handle, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", none)
    for _ in range(2):
        with lock(tmp_path / "key.lock"), locked(tmp_path / ".lock") as is_ours:
            assert is_ours
    said = capsys.readouterr().err
    assert said.count("cannot be locked") == 1 and os.strerror(code) in said
    assert len(make_windows(tmp_path)) > 0


def test_another_fault_of_the_lock_names_the_file(tmp_path, monkeypatch):
    def stale(handle, operation):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(fcntl, "flock", stale)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match=r"Stale.*key\.lock"), lock(tmp_path / "key.lock"):
        pass
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(UserError, match=r"features cannot be written there \(Stale"):
        make_windows(tmp_path)


@pytest.mark.parametrize("code", [errno.EPERM, errno.EBUSY, errno.ENOENT, errno.EACCES])
def test_a_lock_file_that_cannot_be_deleted_stays(tmp_path, monkeypatch, code):
    def refused(path, missing_ok=False):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refused)
        with locked(tmp_path / ".lock") as is_ours:
            assert is_ours
    with locked(tmp_path / ".lock") as is_ours:
        assert is_ours
