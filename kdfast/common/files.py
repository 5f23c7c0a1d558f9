"""Files that are never half written, because a temporary file is renamed; sums, room."""

import errno
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SUMS_FILE = "SHA256SUMS"


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON so that a reader sees the old file or the new one, never a part."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_text(path, text)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8; a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; an empty one where the file is absent or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def sha256_of(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
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
    they are taken as they are.
    """
    try:
        size = sum((folder / name).stat().st_size for name in needed)
        if most_bytes is not None and size > most_bytes:
            return None
        lines = (folder / SUMS_FILE).read_text(encoding="utf-8").splitlines()
        sums = {}
        for line in lines:
            if (match := re.fullmatch(r"([0-9a-f]{64})  ([^/\0]+)", line)) is None:
                return f"{SUMS_FILE} is damaged"
            sums[match[2]] = match[1]
        for name in needed:
            if name not in sums:
                return f"{SUMS_FILE} lacks {name}"
        for name, digest in sums.items():
            if sha256_of(folder / name) != digest:
                return f"{name} is not what was written"
    except OSError as error:
        return f"{Path(error.filename or folder).name}: {error.strerror}"
    except ValueError:
        return f"{SUMS_FILE} is damaged"
    return None


def make_writable(folder: Path) -> None:
    """Create `folder` if missing. Raises OSError unless a file can be written there."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def reserve(path: Path, size: int) -> None:
    """Create a file of `size` zero bytes whose room on the disk is taken.

    Raises OSError where the disk is too small: a mapped write would end in a bus error instead.
    """
    with path.open("wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
            return
        except AttributeError:  # macOS has none
            pass
        except OSError as error:  # nor have some file systems
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
        block = bytes(1 << 20)
        for start in range(0, size, len(block)):
            file.write(block[: size - start])
        file.flush()
        os.fsync(file.fileno())


def even_modes(folder: Path) -> None:
    """Give every file of `folder` the mode of a new one: safetensors writes 0600 by itself."""
    new = folder / ".new"
    new.touch()
    mode = new.stat().st_mode
    new.unlink()
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(mode)


def sync_folder(folder: Path) -> None:
    """fsync every file in `folder`, subfolders too, and the folder itself."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def sync(path: Path) -> None:
    """fsync one file, or what a folder lists."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
