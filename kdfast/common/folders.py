"""Folders: made exclusively, renamed when they are whole, and never written through a link.

A folder that the user names may be a link, such as one to a larger disk; a link within it is
refused, as whoever sent the folder may have put it there.
"""

import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kdfast.common.errors import UserError
from kdfast.common.files import create, listed, naming, refuse_link, spool

# Of a folder, on some network file systems and FUSE: a rename there is as safe as it gets.
NO_SYNC = {errno.EINVAL, errno.EPERM, errno.EACCES, errno.EBADF, errno.ENOSYS, errno.EOPNOTSUPP}


def make_writable(folder: Path) -> None:
    """Create `folder`, which the user named, if missing.

    Raises UserError where a link within a model's or a run's folder leads there, and OSError unless
    a file can be written there.
    """
    for each in (folder.absolute(), *folder.absolute().parents):
        if each.is_symlink() and _is_of_model(each.parent):
            refuse_link(each)
    folder.mkdir(parents=True, exist_ok=True)
    spool(folder).close()


def _is_of_model(folder: Path) -> bool:
    is_model = (folder / "config.json").exists() and any(listed(folder, "*.safetensors"))
    return is_model or (folder / "run.json").exists()


def check_no_links(folder: Path, name: str) -> None:
    """Raise UserError for a link in a folder that a program fills. name: what to call it."""
    for path in _below(folder):
        if path.is_symlink():
            raise UserError(
                f"{name} {folder} holds a link, {path.relative_to(folder)}, through which kdfast "
                "would write elsewhere: remove the link, or name another folder."
            )


def subfolder(path: Path) -> Path:
    """A folder within one that the user named, created if missing. Raises UserError for a link."""
    refuse_link(path)
    path.mkdir(parents=True, exist_ok=True)
    return path


def fresh_folder(path: Path) -> Path:
    """Make a new folder; what was at `path` is deleted."""
    remove(path)
    path.mkdir(parents=True)
    return path


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A new folder in `parent`, which is deleted at the end."""
    with tempfile.TemporaryDirectory(prefix=".", dir=parent) as path:
        yield Path(path)


def remove(path: Path) -> None:
    """Delete a folder with all in it, or a file; a link, but not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def copy_files(source: Path, folder: Path, but: str) -> None:
    """Copy all of a folder without subfolders into `folder`, but for one name."""
    for path in source.iterdir():
        if path.name != but:
            shutil.copyfile(path, folder / path.name)


def link_files(source: Path, folder: Path) -> None:
    """Give every file of `source` a second name in `folder`; a copy where there are no links."""
    folder.mkdir(exist_ok=True)
    for path in source.iterdir():
        try:
            os.link(path, folder / path.name)
        except OSError:  # some file systems have none
            shutil.copy2(path, folder / path.name)


def rename(path: Path, target: Path) -> None:
    """Give a file or folder another name, for good when this returns."""
    os.replace(path, target)
    sync(target.parent)


def even_modes(folder: Path) -> None:
    """Give every file of `folder` the mode of a new one: safetensors writes 0600 by itself."""
    new = folder / ".new"
    with create(new) as file:
        mode = os.fstat(file.fileno()).st_mode
    new.unlink()
    for path in folder.iterdir():
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def sync_folder(folder: Path) -> None:
    """fsync every file in `folder`, subfolders too, and the folder itself."""
    for path in [*_below(folder), folder]:
        sync(path)


def _below(folder: Path) -> Iterator[Path]:
    """What a folder and its subfolders hold. Raises OSError where one cannot be listed."""
    for path in listed(folder):
        yield path
        if path.is_dir() and not path.is_symlink():
            yield from _below(path)


def sync(path: Path) -> None:
    """fsync one file, or what a folder lists, where the system can do that."""
    is_folder, is_windows = path.is_dir(), sys.platform == "win32"
    if is_folder and is_windows:  # which opens none
        return
    handle = os.open(path, os.O_RDWR if is_windows else os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(handle)
    except OSError as error:
        if not is_folder or error.errno not in NO_SYNC:
            raise
    finally:
        os.close(handle)
