"""The files of windows: one flat array each, mapped; a header that says what they hold."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kdfast.common.errors import UserError

HEADER = "header.json"


class MappedFile(NamedTuple):
    """A file that is mapped whole as an array, the way an array is pickled."""

    path: str
    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, value: Any) -> Any:
        """The file of an array that is a whole mapped file; any other value itself."""
        root = value
        while isinstance(root, np.ndarray) and isinstance(root.base, np.ndarray):
            root = root.base
        if not isinstance(root, np.memmap) or root.offset:
            return value
        is_whole = value.flags.c_contiguous and value.nbytes == root.nbytes
        if not is_whole or value.__array_interface__["data"] != root.__array_interface__["data"]:
            return value
        return cls(str(root.filename), value.dtype.str, value.shape)

    def open(self) -> np.ndarray:
        return np.memmap(self.path, self.dtype, "r", shape=self.shape).view(np.ndarray)


class PickledByPath:
    """Pickles as the paths of the files that its arrays are mapped from."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: MappedFile.of(value) for name, value in vars(self).items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value.open() if isinstance(value, MappedFile) else value)

    def __copy__(self):
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        return other


# name -> types, the first of which that holds every value is used. One file each, raw values in
# this machine's byte order. What there is for every token is what a cache's size is made of.
ARRAYS = {
    "input_ids": (np.uint16, np.int32),
    "window_start": (np.int64,),
    "lengths": (np.int32,),
    "question": (np.int32,),
    "context": (np.int32,),
    "first_token": (np.int32,),
    "count": (np.int32,),
    "prefix": (np.int32,),
    "start_positions": (np.int32,),
    "end_positions": (np.int32,),
    "trainable": (np.bool_,),
    "question_token_start": (np.int64,),
    "question_char_start": (np.uint16, np.int32),
    "question_char_count": (np.uint8, np.uint16, np.int32),
    "context_token_start": (np.int64,),
    "context_char_start": (np.uint16, np.int32),
    "context_char_count": (np.uint8, np.uint16, np.int32),
    "question_id_start": (np.int64,),
    "question_id_bytes": (np.uint8,),
}


def narrowest(values: np.ndarray, kinds: tuple[type, ...]) -> type:
    """The first of `kinds`, or the last one, that holds all of `values`."""
    if len(kinds) > 1 and values.size:
        low, high = values.min(), values.max()
        for kind in kinds[:-1]:
            if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
                return kind
        return kinds[-1]
    return kinds[0]


class ArrayFile:
    """A file in which an array grows, in the narrowest of `kinds` for all that it holds so far."""

    def __init__(self, path: Path, kinds: tuple[type, ...]):
        self.path = path
        self.kinds = kinds
        self.file = path.open("wb")

    def append(self, values: np.ndarray) -> None:
        kind = narrowest(values, self.kinds)
        if kind is not self.kinds[0]:
            self._widen(kind)
        self.file.write(values.astype(self.kinds[0], order="C").tobytes())

    def _widen(self, kind: type) -> None:
        """Writes anew, as `kind`, what is there. Rare: once or twice for a file, if at all."""
        self.file.close()
        narrow = self.path.with_suffix(".narrow")
        self.path.rename(narrow)
        self.file = self.path.open("wb")
        with narrow.open("rb") as old:
            while chunk := old.read(1 << 20):
                self.file.write(np.frombuffer(chunk, self.kinds[0]).astype(kind).tobytes())
        narrow.unlink()
        self.kinds = self.kinds[self.kinds.index(kind) :]

    def close(self) -> None:
        """Closes the file, once it is durable."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()

    def abandon(self) -> None:
        """Closes the file, if it is open, as it is."""
        self.file.close()


def write_header(folder: Path, header: dict[str, Any], files: dict[str, ArrayFile]) -> None:
    """Completes a folder of closed array files: records their types and sizes, durably."""
    types = {name: np.dtype(file.kinds[0]).name for name, file in files.items()}
    sizes = {name: file.path.stat().st_size for name, file in files.items()}
    with (folder / HEADER).open("w", encoding="utf-8") as file:
        json.dump({**header, "types": types, "bytes": sizes}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def damaged(folder: Path, why: str) -> UserError:
    """What is wrong with a finished folder, and what to do about it."""
    return UserError(f"{folder}: a damaged cache ({why}): delete this folder and run again")


def _kind(name: str, told: str) -> np.dtype:
    """The type that a header tells. Raises ValueError for one that the array cannot have."""
    for kind in ARRAYS[name]:
        if np.dtype(kind).name == told:
            return np.dtype(kind)
    raise ValueError(f"{name} is never {told}")


def open_arrays(folder: Path, key: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Maps the arrays of a finished folder; reads nothing but the header. Returns both.

    Raises UserError where the folder is not what `write_header` left: a file missing, shortened or
    of another key.
    """
    try:
        header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
        kinds = {name: _kind(name, header["types"][name]) for name in ARRAYS}
        sizes, found = dict(header["bytes"]), header["key"]
    except OSError as error:
        raise damaged(folder, f"{HEADER}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise damaged(folder, f"{HEADER} is not a header") from None
    if found != key:
        raise damaged(folder, f"{HEADER} belongs to {found}")
    arrays = {}
    for name, kind in kinds.items():
        path = folder / f"{name}.bin"
        try:
            size = path.stat().st_size
            if size != sizes.get(name):
                raise damaged(folder, f"{path.name} has {size} bytes, not {sizes.get(name)}")
            if size % kind.itemsize:
                raise damaged(folder, f"{path.name} has {size} bytes, no whole number of values")
            # An empty file cannot be mapped.
            flat = np.memmap(path, dtype=kind, mode="r") if size else np.empty(0, dtype=kind)
        except OSError as error:
            raise damaged(folder, f"{path.name}: {error.strerror}") from None
        # A plain view: what is gathered from it is then an ordinary array.
        arrays[name] = flat.view(np.ndarray)
    return arrays, header
