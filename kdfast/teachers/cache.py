"""Caches of logits on disk, memory-mapped.

docs/formats.md describes the files. A cache is written into `KEY.partial`, which gets its name when
all of it is on the disk, so that nobody opens half of one.
"""

import errno
import hashlib
import io
import json
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from kdfast.common import heartbeat
from kdfast.common.errors import UserError, cause_of, remedy
from kdfast.common.files import (
    SUMS_FILE,
    fault_in,
    is_damage,
    listed,
    open_file,
    open_in_place,
    read_bytes,
    read_json_object,
    refuse_link,
    reserve,
    sha256_of,
    write_json,
    write_sums,
)
from kdfast.common.folders import fresh_folder, remove, rename, subfolder
from kdfast.common.locks import lock
from kdfast.common.machine import changes, numeric_environment
from kdfast.common.ranks import Ranks

FORMAT = 3  # part of every key
VERIFIED_BYTES = 4 * 2**30  # a larger cache is not compared with its sums: that takes too long
HEADER = "header.json"
LOGITS = "logits.npy"
RAW_LOGITS = "logits.bin"  # of earlier versions: the same values without the header of a .npy
PROGRESS_FILE = "sums.bin"
SHARDS = ".shards"  # the folder of shares that are done apart, after the key
MADE_ON = "made_on"  # in a header: the environments in which the pass ran


@dataclass(frozen=True)
class Identity:
    """What determines the content of a cache. The key is a hash of it, and header.json holds it."""

    @property
    def key(self) -> str:
        text = json.dumps([FORMAT, asdict(self)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Source(Identity):
    """The logits of one teacher."""

    weights: str  # weights_key of the teacher's folder
    tokenizer: str  # tokenizer_key of the teacher's
    windows: str  # Windows.key
    precision: str  # "no", "fp16" or "bf16"
    kind: str = "raw"  # logits of one teacher on its own windows


def weights_key(folder: Path) -> str:
    """sha256 over config.json and the safetensors files of a model folder."""
    digest = hashlib.sha256()
    for path in [folder / "config.json", *listed(folder, "*.safetensors")]:
        digest.update(path.name.encode() + b"\0")
        digest.update(sha256_of(path).encode())
    return digest.hexdigest()


def check_unchanged(folder: Path, weights: str | None, name: str) -> None:
    """Raise UserError where a model that was loaded has not the weights_key of before any more."""
    if weights_key(folder) != weights:
        raise UserError(
            f"{name} was replaced while it was loaded: run again when nothing writes there."
        )


def open_cache(
    cache_dir: Path, source: Identity, tokens: int, verify: bool = True
) -> np.ndarray | None:
    """Open a finished cache.

    Args:
        cache_dir: The folder of all caches.
        source: What determines the cache's content.
        tokens: How many tokens its windows have.
        verify: Read all of it, up to VERIFIED_BYTES, and compare it with its sums.

    Returns:
        fp16 (tokens, 2), memory-mapped; None where there is no such cache.

    Raises:
        UserError: The folder's header is of something else, or its files are damaged.
    """
    folder = cache_dir / "teacher" / source.key
    if not folder.is_dir():
        return None
    header = read_json_object(folder / HEADER)
    expected = header_of(source, tokens)
    if wrong := [name for name in expected if header.get(name) != expected[name]]:
        raise UserError(
            f"Teacher cache {folder} does not match this run in {', '.join(wrong)}: "
            "delete that folder, and it is made again."
        )
    fault = fault_in(folder, _files(folder), VERIFIED_BYTES) if verify else None
    if fault is None:
        try:
            return map_logits(folder, tokens, "r")
        except Exception as error:  # numpy raises many kinds for a damaged header
            if not is_damage(error):
                raise
            fault = str(error)
    raise UserError(
        f"Teacher cache {folder} is damaged ({fault}): delete that folder, and it is made again."
    )


def open_shared(cache_dir: Path, source: Identity, tokens: int, ranks: Ranks) -> np.ndarray | None:
    """As open_cache, but what rank 0 finds is there, or not there, for all.

    It deletes what a kill just after the pass has left.
    """
    is_there = ranks.is_first and open_cache(cache_dir, source, tokens) is not None
    if is_there:
        _remove_leftovers(cache_dir, source)
    return open_cache(cache_dir, source, tokens, verify=False) if ranks.any(is_there) else None


def _remove_leftovers(cache_dir: Path, source: Identity) -> None:
    """Delete what a finished cache no longer needs of its pass."""
    finished = cache_dir / "teacher" / source.key
    for path in (finished / PROGRESS_FILE, finished.with_suffix(SHARDS)):
        with suppress(OSError):  # others may do so too, or the cache is only to be read
            remove(path)


def make_once(
    cache_dir: Path,
    source: Identity,
    tokens: int,
    start: Callable[[Path], None],
    fill: Callable[[Path], None],
    ranks: Ranks,
) -> np.ndarray:
    """Open a cache, after it has been made where it is not there.

    Args:
        cache_dir: One folder for all ranks.
        source: What determines the cache's content.
        tokens: How many tokens its windows have.
        start: Called by rank 0 with the folder to write into. No other run makes the same cache
            meanwhile.
        fill: Called by all ranks with that folder. It flushes what it has written. There is no
            cache before all of them have returned.
        ranks: Who make it.

    Returns:
        open_cache's array.

    Raises:
        UserError: The folder cannot be written, or the disk is full.
    """
    partial = cache_dir / "teacher" / f"{source.key}.partial"
    try:
        with ExitStack() as stack:
            is_needed = False
            if ranks.is_first:
                subfolder(partial.parent)
                refuse_link(partial)
                # Another run that makes the same cache is waited for, and its cache taken.
                stack.enter_context(lock(partial.with_suffix(".lock")))
                is_needed = open_cache(cache_dir, source, tokens) is None
                if is_needed:
                    start(partial)
            if ranks.any(is_needed):
                fill(partial)
                ranks.barrier()
                if ranks.is_first:
                    heartbeat.report("the sums of the teacher's logits", heartbeat.LONG)
                    write_sums(partial, _files(partial))
                    rename(partial, partial.with_suffix(""))
                ranks.barrier()
    except OSError as error:
        raise disk_error(partial, error) from error
    cached = open_cache(cache_dir, source, tokens, verify=False)
    assert cached is not None
    if ranks.is_first:
        _remove_leftovers(cache_dir, source)
    return cached


def map_logits(folder: Path, tokens: int, mode: Literal["r", "r+"]) -> np.memmap:
    """The fp16 (tokens, 2) of a cache, or of the folder that start_folder made."""
    opened = open_file if mode == "r" else open_in_place
    if (folder / RAW_LOGITS).is_file():
        if (size := (folder / RAW_LOGITS).stat().st_size) != tokens * 4:
            raise ValueError(f"{RAW_LOGITS} has {size} bytes, and {tokens * 4} are needed")
        with opened(folder / RAW_LOGITS) as file:
            return np.memmap(file, np.float16, mode, shape=(tokens, 2))
    with opened(folder / LOGITS) as file:
        np.lib.format.read_magic(file)
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
        if dtype != np.float16 or shape != (tokens, 2) or is_fortran:
            raise ValueError(f"{LOGITS} holds {dtype} {shape}")
        return np.memmap(file, np.float16, mode, file.tell(), shape)


def map_progress(folder: Path, micro_batches: int) -> np.memmap:
    """uint32, of each micro-batch of a pass: the sum of its logits, 0 until it is done."""
    with open_in_place(folder / PROGRESS_FILE) as file:
        return np.memmap(file, np.uint32, "r+", shape=(micro_batches,))


def start_folder(
    partial: Path, source: Identity, tokens: int, micro_batches: int = 0, **more: Any
) -> None:
    """Create the folder to write a cache into: logits of 0, what is done of a pass, the header.

    more: what the header holds besides the fields of `source`.
    """
    fresh_folder(partial)
    npy_header = io.BytesIO()
    array = {"descr": "<f2", "fortran_order": False, "shape": (tokens, 2)}
    np.lib.format.write_array_header_1_0(npy_header, array)
    reserve(partial / LOGITS, npy_header.tell() + tokens * 4, npy_header.getvalue())
    reserve(partial / PROGRESS_FILE, 4 * micro_batches)
    write_json(partial / HEADER, {**header_of(source, tokens), **more})


def _files(folder: Path) -> tuple[str, str]:
    return HEADER, RAW_LOGITS if (folder / RAW_LOGITS).is_file() else LOGITS


def header_of(source: Identity, tokens: int) -> dict[str, Any]:
    return {"format": FORMAT, "tokens": tokens, "dtype": "float16", **asdict(source)}


def logits_sum(cache_dir: Path, source: Identity) -> str | None:
    """sha256 of a finished cache's logits: made again elsewhere, they differ in the last bits."""
    folder = cache_dir / "teacher" / source.key
    with suppress(FileNotFoundError, ValueError):
        for line in read_bytes(folder / SUMS_FILE).decode().splitlines():
            if line.endswith(f"  {_files(folder)[1]}"):
                return line.split()[0]
    return None


def record_environment(folder: Path, device: torch.device, ranks: Ranks) -> None:
    """Name in a pass's header where it runs, and say so where it began elsewhere.

    All ranks call it, before they compute.
    """
    now = numeric_environment(device, ranks)
    if not ranks.is_first:
        return
    header = read_json_object(folder / HEADER)
    before = environments_in(header)
    if now in before:
        return
    if before and (different := changes(before[-1], now)):
        ranks.log(
            f"The teacher's pass goes on, not as before: {', '.join(different)}; so its logits are "
            "not to the bits of a pass in one place."
        )
    write_json(folder / HEADER, {**header, MADE_ON: [*before, now]})


def environments_in(header: dict[str, Any]) -> list[dict[str, Any]]:
    """Where a pass ran, as far as its header says."""
    found = header.get(MADE_ON)
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def disk_error(partial: Path, error: OSError) -> UserError:
    """The sentence for a folder that cannot be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"The disk is full while the teacher's logits are written to {partial}: free some "
            "space, and the pass goes on from there, or give a --cache_dir on another disk."
        )
    return UserError(
        f"The teacher's logits cannot be written to {partial} ({cause_of(error)}): "
        f"{remedy(error.errno) or 'give a --cache_dir that is writable'}."
    )
