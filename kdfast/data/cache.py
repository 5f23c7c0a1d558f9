"""The files of a set of windows: one .npy for each array, opened mapped, and a header.json."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kdfast.common.errors import UserError
from kdfast.common.files import create, is_damage, open_file

FORMAT = 5  # of the files, and part of their folder's name: raise it when one of them changes
HEADER = "header.json"
UNLABELLED = -100  # in start_positions and end_positions
_AT_ONCE = 1 << 20  # values that are copied in one go

Kinds = tuple[type[np.generic], ...]
# Each array's types: it is stored as the first of them that holds all of its values. The arrays
# with an entry for every token make up nearly all of a cache.
ARRAYS: dict[str, Kinds] = {
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


class MappedFile(NamedTuple):
    """An array that is mapped from a file: what is pickled in place of its values."""

    path: str
    dtype: str
    offset: int
    shape: tuple[int, ...]

    @classmethod
    def of(cls, value: Any) -> Any:
        """The file of an array that was mapped and is all there; any other value itself."""
        if isinstance(value, list):
            return [cls.of(each) for each in value]
        root = value
        while isinstance(root, np.ndarray) and isinstance(root.base, np.ndarray):
            root = root.base
        is_map = isinstance(root, np.memmap) and value.flags.c_contiguous
        if not is_map or value.nbytes != root.nbytes:
            return value
        return cls(str(root.filename), value.dtype.str, root.offset, value.shape)

    @classmethod
    def opened(cls, value: Any) -> Any:
        """What `of` was given."""
        if isinstance(value, list):
            return [cls.opened(each) for each in value]
        return value.open() if isinstance(value, cls) else value

    def open(self) -> np.ndarray:
        return np.memmap(self.path, self.dtype, "r", self.offset, self.shape).view(np.ndarray)


class PickledByPath:
    """Pickles as the paths of the files that its arrays are mapped from."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: MappedFile.of(value) for name, value in vars(self).items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, MappedFile.opened(value))


def narrowest(values: np.ndarray, kinds: Kinds) -> type[np.generic]:
    """The first of `kinds` that holds all of `values`; the last one where none does."""
    if len(kinds) == 1 or not values.size:
        return kinds[0]
    ends = [np.min_scalar_type(end) for end in (values.min(), values.max())]
    return next((k for k in kinds if all(np.can_cast(end, k) for end in ends)), kinds[-1])


class ArrayFile:
    """A .npy file in which an array of one dimension grows.

    It has the narrowest of `kinds` for what it holds so far.
    """

    def __init__(self, path: Path, kinds: Kinds):
        self.path = path
        self.kinds = kinds
        self._start()

    def append(self, values: np.ndarray) -> None:
        kind = narrowest(values, self.kinds)
        if kind is not self.kinds[0]:
            self._widen(kind)
        self.file.write(values.astype(self.kinds[0]).tobytes())
        self.length += len(values)

    def finish(self) -> None:
        """Closes the file, once it is durable."""
        self._write_header()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()

    def close(self) -> None:
        """Closes the file as it is."""
        self.file.close()

    def _start(self) -> None:
        self.file = create(self.path)
        self.length = 0
        self._write_header()

    def _write_header(self) -> None:
        # 128 bytes for any length, so that it can be replaced when the length is known.
        descr = np.lib.format.dtype_to_descr(np.dtype(self.kinds[0]))
        header = {"descr": descr, "fortran_order": False, "shape": (self.length,)}
        self.file.seek(0)
        np.lib.format.write_array_header_1_0(self.file, header)

    def _widen(self, kind: type[np.generic]) -> None:
        """Writes what is there again, as `kind`. Rare: once or twice for a file, if at all."""
        self.finish()
        narrow = np.load(self.path, mmap_mode="r", allow_pickle=False)
        self.kinds = self.kinds[self.kinds.index(kind) :]
        self._start()  # deletes the file, whose map stays
        for begin in range(0, len(narrow), _AT_ONCE):
            self.append(narrow[begin : begin + _AT_ONCE])


def cache_folder(cache_dir: Path | str, key: str) -> Path:
    """Where the windows of this key are, or would be."""
    return Path(cache_dir).expanduser() / "features" / f"{key}-{FORMAT}"


def damaged(folder: Path, why: str) -> UserError:
    """What is wrong with a finished folder, and what to do about it."""
    return UserError(f"{folder}: a damaged cache ({why}): delete this folder and run again")


def open_array(folder: Path, name: str, kinds: Kinds) -> np.ndarray:
    """Maps the array in `folder`/`name`.npy. Raises UserError unless it is one of `kinds`."""
    path = folder / f"{name}.npy"
    try:
        open_file(path).close()
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        if not is_damage(error):
            raise
        raise damaged(folder, f"{path.name}: {error.strerror}") from None
    except Exception:  # numpy raises a dozen kinds for a made-up header
        raise damaged(folder, f"{path.name} is no whole .npy file") from None
    if not isinstance(array, np.memmap) or array.ndim != 1 or array.dtype not in kinds:
        raise damaged(folder, f"{path.name} holds no list of {kinds[-1].__name__} or narrower")
    # A plain view: what is gathered from it is then an ordinary array.
    return array.view(np.ndarray)
