"""The teacher's logits: computed once, cached on disk, memory-mapped.

A cache is a folder `teacher/KEY` with two files. `logits.bin` holds fp16 (tokens, 2), the raw
start and end logits of every real token of every window, flat in the order of Windows.input_ids.
`header.json` says whose they are, and SHA256SUMS what both files hold. A pass writes into
`KEY.partial` and renames it when all is on the disk, so that a half-written cache is never read;
`done.bin` in there has a byte for each micro-batch, 1 where it is safe, so that a killed pass goes
on where it stopped, with as many ranks as there are then.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdfast.common.errors import UserError
from kdfast.common.files import (
    fault_in,
    read_json_object,
    reserve,
    sha256_of,
    sync,
    write_json,
    write_sums,
)
from kdfast.common.ranks import Ranks
from kdfast.data.batches import cut_by_tokens
from kdfast.data.windows import Windows
from kdfast.models.inference import forward_windows
from kdfast.models.load import SpanModel
from kdfast.models.loader import flat_positions
from kdfast.models.precision import AUTOCAST

FORMAT = 3
# Up to this size a finished cache is read once and compared with its sums when it is opened: some
# seconds. A larger one is taken as it is.
VERIFIED_BYTES = 4 * 2**30
FILES = ("header.json", "logits.bin")
PROGRESS_FILE = "done.bin"
SECONDS_BETWEEN_SAVES = 10.0


@dataclass(frozen=True)
class Identity:
    """What determines the content of a cache. The key is a hash of it, and header.json holds it."""

    @property
    def key(self) -> str:
        text = json.dumps([FORMAT, self.__dict__], sort_keys=True)
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
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        digest.update(path.name.encode() + b"\0")
        digest.update(sha256_of(path).encode())
    return digest.hexdigest()


def open_cache(
    cache_dir: Path, source: Identity, tokens: int, verify: bool = True
) -> np.ndarray | None:
    """The finished cache of `source` as fp16 (tokens, 2), memory-mapped; None where there is none.

    verify: read all of it, up to VERIFIED_BYTES, and compare it with its sums.
    Raises UserError for a folder of that key whose header, size or content is not what it must be.
    """
    folder = cache_dir / "teacher" / source.key
    if not folder.is_dir():
        return None
    header = read_json_object(folder / "header.json")
    expected = _header(source, tokens)
    wrong = [name for name in expected if header.get(name) != expected[name]]
    path = folder / "logits.bin"
    if not wrong and (not path.is_file() or path.stat().st_size != tokens * 4):
        wrong = ["size of logits.bin"]
    if wrong:
        raise UserError(
            f"Teacher cache {folder} does not match this run in {', '.join(wrong)}: "
            "delete that folder, and it is made anew."
        )
    if verify and (fault := fault_in(folder, FILES, VERIFIED_BYTES)):
        raise UserError(
            f"Teacher cache {folder} is damaged ({fault}): delete that folder, and it is made anew."
        )
    return np.memmap(path, dtype=np.float16, mode="r", shape=(tokens, 2))


def open_shared(cache_dir: Path, source: Identity, tokens: int, ranks: Ranks) -> np.ndarray | None:
    """As open_cache, but what rank 0 finds is there, or not there, for all."""
    cached = ranks.is_first and open_cache(cache_dir, source, tokens) is not None
    if ranks.share(str(cached)) == "True":
        return open_cache(cache_dir, source, tokens, verify=False)
    return None


def fill_cache(
    cache_dir: Path,
    source: Source,
    model: SpanModel,
    windows: Windows,
    device: torch.device,
    max_tokens: int,
    progress: Callable[[int], None] = lambda windows_done: None,
    ranks: Ranks | None = None,
) -> np.ndarray:
    """Run the teacher over all windows, longest first, and return open_cache's array.

    max_tokens: padded tokens in one forward pass; an interrupted pass goes on with its own.
    progress: called with the number of windows that all ranks are taken to have done since the
    last call. ranks: who share the pass; cache_dir is one folder for all of them.
    Raises UserError for a logit that is not finite in fp16, naming the question, and for a disk
    that is full; what was safe before stays for the next start.
    """
    ranks = ranks or Ranks()

    def start(partial: Path) -> None:
        _start(partial, source, windows, max_tokens)

    def fill(partial: Path) -> None:
        _fill(partial, source, model, windows, device, progress, ranks)

    return made_once(cache_dir, source, len(windows.input_ids), start, fill, ranks)


def made_once(
    cache_dir: Path,
    source: Identity,
    tokens: int,
    start: Callable[[Path], None],
    fill: Callable[[Path], None],
    ranks: Ranks,
) -> np.ndarray:
    """open_cache's array, made where it is not there.

    start: called by rank 0 with the folder to write into, while no other run makes the same cache.
    fill: called by all ranks; flushes what it has written, and no cache is there before all have.
    Raises UserError for a folder that cannot be written, or a disk that is full.
    """
    partial = cache_dir / "teacher" / f"{source.key}.partial"
    try:
        with ExitStack() as stack:
            is_needed = True
            if ranks.is_first:
                partial.parent.mkdir(parents=True, exist_ok=True)
                # Another run that makes the same cache is waited for, and its cache taken.
                lock = stack.enter_context(partial.with_suffix(".lock").open("w"))
                fcntl.flock(lock, fcntl.LOCK_EX)
                is_needed = open_cache(cache_dir, source, tokens) is None
                if is_needed:
                    start(partial)
            if ranks.share(str(is_needed)) == "True":
                fill(partial)
                ranks.barrier()
                if ranks.is_first:
                    write_sums(partial, FILES)
                    finished = partial.with_suffix("")
                    os.replace(partial, finished)
                    sync(finished.parent)
                    (finished / PROGRESS_FILE).unlink(missing_ok=True)
                ranks.barrier()
    except OSError as error:
        raise _disk_error(partial, error) from error
    cached = open_cache(cache_dir, source, tokens, verify=False)
    assert cached is not None
    return cached


def _fill(
    partial: Path,
    source: Source,
    model: SpanModel,
    windows: Windows,
    device: torch.device,
    progress: Callable[[int], None],
    ranks: Ranks,
) -> None:
    """This rank's part of the pass, into `partial`."""
    batches = _cuts(windows, read_json_object(partial / "header.json")["max_tokens"])
    logits = writable_logits(partial, len(windows.input_ids))
    done = np.memmap(partial / PROGRESS_FILE, dtype=np.uint8, mode="r+", shape=(len(batches),))
    progress(sum(len(batches[number]) for number in np.flatnonzero(done)))
    mine = np.flatnonzero(done == 0)[ranks.rank :: ranks.count]
    ranks.barrier()  # until all have read what is left
    if source.precision != "no":
        model.cast_linear_layers(AUTOCAST[source.precision])
    saved_at, unsaved = time.monotonic(), []
    passes = forward_windows(
        model, windows, [batches[number] for number in mine], device, AUTOCAST[source.precision]
    )
    for number, (indices, rows) in zip(mine, passes, strict=True):
        with np.errstate(over="ignore"):
            half = rows.astype(np.float16)
        _check_finite(half, windows, indices)
        logits[flat_positions(windows, indices)] = half
        unsaved.append(number)
        progress(len(indices) * ranks.count)
        if time.monotonic() - saved_at > SECONDS_BETWEEN_SAVES:
            _save_progress(logits, done, unsaved)
            saved_at, unsaved = time.monotonic(), []
    _save_progress(logits, done, unsaved)


def writable_logits(partial: Path, tokens: int) -> np.memmap:
    """The fp16 (tokens, 2) of a folder that `start_folder` made."""
    return np.memmap(partial / "logits.bin", dtype=np.float16, mode="r+", shape=(tokens, 2))


def _cuts(windows: Windows, max_tokens: int) -> list[np.ndarray]:
    return cut_by_tokens(np.arange(len(windows.lengths)), windows.lengths, max_tokens)


def _header(source: Identity, tokens: int) -> dict:
    return {"format": FORMAT, "tokens": tokens, "dtype": "float16", **source.__dict__}


def _start(partial: Path, source: Source, windows: Windows, max_tokens: int) -> None:
    """Create the partial folder, or take over one that a killed pass left."""
    tokens = len(windows.input_ids)
    header = read_json_object(partial / "header.json")
    if any(header.get(name) != value for name, value in _header(source, tokens).items()):
        sizes = {PROGRESS_FILE: len(_cuts(windows, max_tokens))}
        start_folder(partial, source, tokens, sizes, {"max_tokens": max_tokens})


def start_folder(
    partial: Path, source: Identity, tokens: int, sizes: dict[str, int], more: dict[str, Any]
) -> None:
    """Create the partial folder anew: logits.bin, files of these sizes in bytes, and the header.

    more: what the header holds beside the fields of `source`.
    """
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, size in {"logits.bin": tokens * 4, **sizes}.items():
        reserve(partial / name, size)
    write_json(partial / "header.json", {**_header(source, tokens), **more})


def _check_finite(half: np.ndarray, windows: Windows, indices: np.ndarray) -> None:
    bad = ~np.isfinite(half).all(axis=1)
    if bad.any():
        window = np.repeat(indices, windows.lengths[indices])[bad.argmax()]
        question = windows.question_ids[windows.question[window]]
        raise UserError(
            f"The teacher's logits are not finite in fp16 for question {question} "
            f"(window {window}): check the teacher's weights, or leave that question out."
        )


def _save_progress(logits: np.memmap, done: np.memmap, batches: list[int]) -> None:
    """Mark micro-batches as safe, after their logits are."""
    logits.flush()
    done[batches] = 1
    done.flush()


def _disk_error(partial: Path, error: OSError) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"The disk is full while the teacher's logits are written to {partial}: free some "
            "space, and the pass goes on from there, or give a --cache_dir on another disk."
        )
    return UserError(
        f"The teacher's logits cannot be written to {partial} ({error.strerror}): "
        "give a --cache_dir that is writable."
    )
