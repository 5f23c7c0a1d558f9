"""Files: read without waiting for a pipe; written exclusively, whole, and never through a link.

Only this module, folders.py and locks.py make, write, rename and delete files. What is written lies
in a folder that the user named, and that folder may come from somebody else: a link in it may lead
anywhere. So `create` removes what has the name first, and what must be opened as it is (`append`,
`open_in_place`) is refused where it is a link.
"""

import errno
import hashlib
import json
import os
import re
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO, cast

from kdfast.common.errors import UserError
from kdfast.common.forms import Form

if TYPE_CHECKING:
    from torch import Tensor

SUMS_FILE = "SHA256SUMS"
# What is wrong with a file itself: it is absent, or something else. What cannot be read for another
# reason, such as a mount that fails, may be whole.
NOT_A_FILE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.ELOOP}


def is_damage(error: Exception) -> bool:
    """Whether reading failed for what a file is or holds: what cannot be read now may be whole."""
    return not isinstance(error, OSError) or error.errno in {*NOT_A_FILE, None}


def is_plain_name(name: object) -> bool:
    """Whether `name`, which stood in a file, names one in a folder of its own: it is no path."""
    is_one = isinstance(name, str) and re.fullmatch(r"[^/\\\x00-\x1f\x7f]{1,200}", name)
    return bool(is_one) and name not in (".", "..")


def refuse_link(path: Path) -> None:
    """Raise UserError where `path` is a link: what is written there would be elsewhere."""
    if path.is_symlink():
        raise UserError(
            f"{path} is a link, through which kdfast would write elsewhere: remove the link, or "
            "name another folder."
        )


def open_file(path: Path) -> BinaryIO:
    """Open a file to read, also through a link. Raises OSError for a pipe or a device."""
    return open(os.fspath(path), "rb", opener=_regular)  # numpy takes no Path for its name


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError inside that names no file, as those of a read or fsync, names `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def read_bytes(path: Path) -> bytes:
    """All of a file. Raises OSError, also for a pipe or a device."""
    with naming(path), open_file(path) as file:
        return file.read()


def listed(folder: Path, pattern: str = "*") -> list[Path]:
    """What is in a folder under names that match a shell pattern, sorted; nothing without a folder.

    Raises OSError where it cannot be listed, for which Path.glob would return nothing.
    """
    try:
        return sorted(path for path in folder.iterdir() if fnmatchcase(path.name, pattern))
    except (FileNotFoundError, NotADirectoryError):
        return []


def open_in_place(path: Path) -> BinaryIO:
    """Open a file that is there, to change parts of it. Raises UserError for a link."""
    refuse_link(path.parent)
    refuse_link(path)
    return open(os.fspath(path), "r+b", opener=_regular)


def append(path: Path) -> TextIO:
    """Open a text file at its end. Raises UserError for a link."""
    refuse_link(path)
    return open(path, "a", encoding="utf-8", opener=_regular)


def cut(path: Path, size: int) -> None:
    """Drop what a file holds behind its first `size` bytes. Raises UserError for a link."""
    with open_in_place(path) as file:
        file.truncate(size)


def create(path: Path) -> BinaryIO:
    """Open a new file in place of the file, link or pipe that is there."""
    path.unlink(missing_ok=True)
    return path.open("xb")


def open_device(path: Path) -> TextIO:
    """Open the pipe or the device that the user named to write text to."""
    return path.open("w", encoding="utf-8")


@contextmanager
def new_file(path: Path, aside: str = "new") -> Iterator[BinaryIO]:
    """A file that takes the name `path` at the end: readers see the old one or the new one.

    aside: the end of its name until then; several that write the same file have one each.
    Raises UserError where `path` is a link.
    """
    refuse_link(path)
    temporary = path.with_name(f".{path.name}.{aside}")
    is_ours = True
    try:
        with naming(path), create(temporary) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            is_ours = _is_at(temporary, file)
        if not is_ours:
            raise UserError(
                f"{path} is being written by another process too: run one after the other."
            )
        os.replace(temporary, path)
    except BaseException:
        if is_ours:
            with suppress(OSError):
                temporary.unlink()
        raise


def _is_at(path: Path, file: BinaryIO) -> bool:
    """Whether an open file still has this name, which another process may have taken."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.lstat(path), os.fstat(file.fileno()))
    return False


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file; a reader sees the old one or the new one, never a part."""
    with new_file(path) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """As write_bytes, in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, content: Any) -> None:
    """As write_bytes, in JSON."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_tensors(
    path: Path, tensors: Mapping[str, "Tensor"], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file in place of what is there; a kill may leave a part of it."""
    from safetensors.torch import save_file

    create(path).close()
    save_file(dict(tensors), path, metadata)


def spool(folder: Path) -> BinaryIO:
    """A file without a name, on the disk of `folder`."""
    return cast(BinaryIO, tempfile.TemporaryFile(dir=folder))


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; an empty one where the file is absent or holds something else.

    Raises OSError where it cannot be read.
    """
    try:
        content = json.loads(read_bytes(path).decode())
    except (OSError, ValueError, RecursionError) as error:
        if not is_damage(error):
            raise
        return {}
    return content if isinstance(content, dict) else {}


def read_record(path: Path, form: Form) -> dict[str, Any]:
    """As read_json_object, but raises UserError where the file is there and has not this form."""
    found = read_json_object(path)
    is_there = bool(found) or os.path.lexists(path)
    if is_there and (fault := form(found) if found else "") is not None:
        see = f" (see its {fault})" if fault else ""
        raise UserError(
            f"{path} is damaged, or not of kdfast{see}: put back the one that was there, or delete "
            "it to go on without what it says."
        )
    return found


def sha256_of(path: Path) -> str:
    """sha256 of a file's bytes, in hex. Raises OSError."""
    digest = hashlib.sha256()
    with naming(path), open_file(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_sums(folder: Path, names: Iterable[str]) -> None:
    """Write SHA256SUMS over these files of `folder`, as `sha256sum --check` reads it."""
    lines = (f"{sha256_of(folder / name)}  {name}\n" for name in names)
    write_text(folder / SUMS_FILE, "".join(lines))


def fault_in(folder: Path, needed: tuple[str, ...], most_bytes: int | None = None) -> str | None:
    """Why the files of `folder` are not those that write_sums saw, in a few words; None: they are.

    needed: names that must be among them. most_bytes: where the needed files are larger together,
    they are taken as they are. Raises OSError where they cannot be read.
    """
    try:
        size = sum((folder / name).stat().st_size for name in needed)
        if most_bytes is not None and size > most_bytes:
            return None
        sums = {}
        for line in read_bytes(folder / SUMS_FILE).decode().splitlines():
            match = re.fullmatch(r"([0-9a-f]{64})  (.+)", line)
            if match is None or not is_plain_name(match[2]):
                return f"{SUMS_FILE} is damaged"
            sums[match[2]] = match[1]
        for name in needed:
            if name not in sums:
                return f"{SUMS_FILE} lacks {name}"
        for name, digest in sums.items():
            if sha256_of(folder / name) != digest:
                return f"{name} is not what was written"
    except OSError as error:
        if not is_damage(error):
            raise
        return f"{Path(error.filename or folder).name}: {error.strerror}"
    except ValueError:
        return f"{SUMS_FILE} is damaged"
    return None


def reserve(path: Path, size: int, start: bytes = b"") -> None:
    """Create a file of `size` bytes, `start` and zeros, whose room on the disk is taken.

    Raises OSError where the disk is too small: a mapped write would end in a bus error instead.
    """
    with naming(path), create(path) as file:
        _take_room(file, size)
        file.seek(0)
        file.write(start)
        file.flush()
        os.fsync(file.fileno())


def _take_room(file: BinaryIO, size: int) -> None:
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except (AttributeError, OSError) as error:  # macOS has none, nor have some file systems
        if getattr(error, "errno", errno.EINVAL) not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        block = bytes(1 << 20)
        for start in range(0, size, len(block)):
            file.write(block[: size - start])


def _regular(path: str, flags: int) -> int:
    """Opens for `open`. O_NONBLOCK: a pipe would be waited for. For writing no link is followed."""
    flags |= getattr(os, "O_NONBLOCK", 0)  # Windows has neither
    if flags & (os.O_WRONLY | os.O_RDWR):
        flags |= getattr(os, "O_NOFOLLOW", 0)
    handle = os.open(path, flags, 0o666)
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):  # `open` itself refuses a folder
        return handle
    os.close(handle)
    raise OSError(errno.EINVAL, "it is a pipe or a device", path)
