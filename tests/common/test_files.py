"""What is written is whole and nowhere else, whatever stands where it is to be."""

import errno
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kdfast.common import files, folders
from kdfast.common.errors import UserError
from kdfast.models.save import list_checkpoints
from kdfast.teachers.cache import weights_key


@pytest.fixture
def mine(tmp_path):
    """A file outside of the folder that is written into."""
    path = tmp_path / "mine"
    path.write_text("mine")
    yield path
    assert path.read_text() == "mine"


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    return path


PLANTED = {
    "link": lambda path, mine: path.symlink_to(mine),
    "dangling link": lambda path, mine: path.symlink_to(mine.with_name("absent")),
    "pipe": lambda path, mine: os.mkfifo(path),
    "file": lambda path, mine: path.write_text("earlier"),
}
planted = pytest.mark.parametrize("plant", PLANTED.values(), ids=PLANTED)
WRITERS = {
    "create": lambda path: files.create(path).close(),
    "reserve": lambda path: files.reserve(path, 10),
    "write_tensors": lambda path: files.write_tensors(path, {"a": torch.ones(2)}),
}


@planted
def test_a_planted_temporary_is_not_written_through(folder, mine, plant):
    plant(folder / ".run.json.new", mine)
    files.write_json(folder / "run.json", {"a": 1})
    assert files.read_json_object(folder / "run.json") == {"a": 1}
    assert sorted(folder.parent.rglob("*")) == [folder, folder / "run.json", mine]


@planted
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_new_file_is_in_the_place_of_what_was_there(folder, mine, plant, write):
    plant(folder / "new", mine)
    write(folder / "new")
    assert (folder / "new").is_file() and not (folder / "new").is_symlink()
    assert sorted(folder.parent.rglob("*")) == [folder, folder / "new", mine]


@pytest.mark.parametrize("write", [files.write_bytes, files.append, files.open_in_place])
def test_a_link_in_place_of_a_file_is_refused(folder, mine, write):
    (folder / "log").symlink_to(mine)
    with pytest.raises(UserError, match="log is a link, through which"):
        write(folder / "log", b"x") if write is files.write_bytes else write(folder / "log")


@pytest.mark.parametrize("open_", [files.open_file, files.append, files.open_in_place])
def test_a_pipe_is_not_waited_for(folder, open_):
    os.mkfifo(folder / "pipe")
    with pytest.raises(OSError):
        open_(folder / "pipe")


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null"])
def test_a_device_is_no_file(folder, path):
    (folder / "header.json").symlink_to(path)
    assert files.read_json_object(folder / "header.json") == {}
    with pytest.raises(OSError, match="a pipe or a device"):
        files.sha256_of(folder / "header.json")


def test_a_write_that_fails_leaves_the_old_file_alone(folder):
    files.write_text(folder / "a", "old")
    with pytest.raises(KeyboardInterrupt), files.new_file(folder / "a") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [("a", "old")]


def test_two_that_write_one_file(folder):
    """The first to end finds that the other has taken its name, and leaves that one alone."""
    with (
        pytest.raises(UserError, match="a is being written by another process too"),
        files.new_file(folder / "a") as mine,
    ):
        mine.write(b"mine")
        with files.create(folder / ".a.new") as other:
            other.write(b"other")
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [(".a.new", "other")]


@pytest.mark.parametrize(
    "lists",
    [
        files.listed,
        folders.sync_folder,
        lambda folder: folders.check_no_links(folder, "--output_dir"),
        list_checkpoints,
        weights_key,
    ],
)
def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(folder, monkeypatch, lists):
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text("weights")
    (folder / "checkpoint-1").mkdir()
    lists(folder)

    def refused(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "listdir", refused)
    with pytest.raises(PermissionError, match=str(folder)):
        lists(folder)
    monkeypatch.undo()
    assert files.listed(folder / "absent") == files.listed(folder / "config.json") == []
    assert [path.name for path in files.listed(folder, "*.s*")] == ["model.safetensors"]


def test_what_is_written_is_read(folder):
    files.write_tensors(folder / "t", {"a": torch.arange(3)})
    assert load_file(folder / "t")["a"].tolist() == [0, 1, 2]
    files.reserve(folder / "r", 2**20 + 3, b"abc")
    assert (folder / "r").read_bytes() == b"abc" + bytes(2**20)
    with files.open_in_place(folder / "r") as file:
        np.memmap(file, np.uint8, "r+", shape=(5,))[4] = 1
    assert (folder / "r").read_bytes()[:6] == b"abc\0\1\0"
    with files.append(folder / "log") as log, files.append(folder / "log") as other:
        log.write("a\n")
        log.flush()
        other.write("b\n")
    assert (folder / "log").read_text() == "a\nb\n"


@pytest.mark.parametrize("name", ["a", "a.b-c", "ä", "x" * 200, "..."])
def test_plain_names(name):
    assert files.is_plain_name(name)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../a", "/a", "a/b", "a\\b", "a\0", "a\n", "\x1b[2J", "x" * 201, None, 3],
)
def test_what_is_no_plain_name(name):
    assert not files.is_plain_name(name)


def test_sums_name_no_path(folder, mine):
    (folder / files.SUMS_FILE).write_text(f"{files.sha256_of(mine)}  ../mine\n")
    assert files.fault_in(folder, ()) == "SHA256SUMS is damaged"


@planted
def test_a_fresh_folder(folder, mine, plant):
    plant(folder / "best.new", mine)
    folders.fresh_folder(folder / "best.new")
    (folder / "best.new" / "a").touch()
    folders.fresh_folder(folder / "best.new")
    assert sorted(folder.parent.rglob("*")) == [folder, folder / "best.new", mine]


def test_a_link_to_a_folder_is_removed_and_not_what_it_leads_to(folder, mine):
    (folder / "best.new").symlink_to(mine.parent)
    folders.remove(folder / "best.new")
    assert not any(folder.iterdir())


def test_a_subfolder_is_no_link(folder, mine):
    (folder / "eval").symlink_to(mine.parent)
    with pytest.raises(UserError, match="eval is a link, through which"):
        folders.subfolder(folder / "eval")
    assert folders.subfolder(folder / "new" / "eval").is_dir()


def test_a_link_that_the_user_names_is_followed(folder, tmp_path):
    (tmp_path / "big").symlink_to(folder)
    folders.make_writable(tmp_path / "big")
    folders.make_writable(tmp_path / "big" / "run")
    assert (folder / "run").is_dir()


@pytest.mark.parametrize("held", [["run.json"], ["config.json", "model.safetensors"]])
def test_a_link_that_came_with_a_model_is_not_followed(folder, mine, monkeypatch, held):
    for name in held:
        (folder / name).touch()
    (folder / "eval").symlink_to(mine.parent)
    monkeypatch.chdir(folder)
    for name in (folder / "eval", folder / "eval" / "deep", "eval"):
        with pytest.raises(UserError, match="eval is a link, through which"):
            folders.make_writable(folder / name)
    assert sorted(mine.parent.iterdir()) == [folder, mine]


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.EACCES])
def test_what_cannot_be_read_now_is_neither_absent_nor_damaged(folder, monkeypatch, code):
    """Else a resume would go back to an earlier checkpoint, and a pass begin again."""
    files.write_json(folder / "a.json", {"a": 1})
    files.write_sums(folder, ["a.json"])

    def refused(path, flags, mode=0):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(os, "open", refused)
    for read in (
        lambda: files.read_json_object(folder / "a.json"),
        lambda: files.fault_in(folder, ("a.json",)),
    ):
        with pytest.raises(OSError, match=r"a\.json|SHA256SUMS"):
            read()


def test_what_is_absent_or_no_file_is_a_fault(folder):
    files.write_json(folder / "a.json", {"a": 1})
    files.write_sums(folder, ["a.json"])
    (folder / "a.json").unlink()
    for plant in (lambda path: None, os.mkfifo, os.mkdir):
        folders.remove(folder / "a.json")
        plant(folder / "a.json")
        assert files.read_json_object(folder / "a.json") == {}
        assert files.fault_in(folder, ("a.json",))


def test_an_error_of_reading_or_syncing_names_its_file(folder, monkeypatch):
    """The system gives a name where it opens a file, and none afterwards."""
    (folder / "there").write_text("{}")

    def refused(*given):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", refused)
    for fails, path in (
        (lambda: files.write_text(folder / "new", ""), folder / "new"),
        (lambda: files.reserve(folder / "new", 1), folder / "new"),
        (lambda: folders.sync(folder / "there"), folder / "there"),
    ):
        with pytest.raises(OSError) as caught:
            fails()
        assert caught.value.filename == str(path)
    monkeypatch.setattr(files, "open_file", refused)
    for read in (files.read_bytes, files.read_json_object, files.sha256_of):
        with pytest.raises(OSError) as caught:
            read(folder / "there")
        assert caught.value.filename == str(folder / "there")


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EACCES, errno.EPERM, errno.EIO])
def test_a_folder_that_cannot_be_synced(folder, monkeypatch, code):
    (folder / "file").touch()

    def refused(handle):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refused)
    if code == errno.EIO:  # this one is no lack of the file system
        with pytest.raises(OSError):
            folders.sync(folder)
    else:
        folders.sync(folder)
    with pytest.raises(OSError):
        folders.sync(folder / "file")
