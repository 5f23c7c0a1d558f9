"""The pass of a teacher over its windows, which fills the cache of its logits.

`sums.bin` has a sum of each micro-batch, once its logits are on the disk: a killed pass goes on
where it stopped, with as many ranks as there are then, and what is damaged is done again.
"""

import errno
import json
import os
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdfast.common import heartbeat
from kdfast.common.errors import UserError
from kdfast.common.files import read_json_object
from kdfast.common.locks import lock
from kdfast.common.precision import AUTOCAST
from kdfast.common.ranks import Ranks
from kdfast.data.batches import cut_by_tokens
from kdfast.data.chunks import Shard
from kdfast.data.windows import Windows
from kdfast.models.inference import Room, forward_windows
from kdfast.models.span_model import SpanModel
from kdfast.teachers.cache import (
    HEADER,
    Source,
    disk_error,
    header_of,
    make_once,
    map_logits,
    map_progress,
    open_shared,
    record_environment,
    start_folder,
)
from kdfast.teachers.pass_shards import PassShards, Share, save_progress, sum_of

SECONDS_BETWEEN_SAVES = 10.0
CUT = ("max_tokens", "packed")  # all that the cut into micro-batches depends on besides the windows


@dataclass(frozen=True)
class TeacherPass:
    """A pass of a teacher over all of its windows, longest first.

    max_tokens: tokens in one forward pass, with padding. packed: there is none, as windows stand
    one behind the other; the model's type must be one of `packing.PACKS`.
    """

    source: Source
    model: SpanModel
    windows: Windows
    device: torch.device
    max_tokens: int
    packed: bool = False

    @property
    def cut(self) -> dict[str, Any]:
        """How the windows are cut into micro-batches, as the header has it."""
        return {name: value for name in CUT if (value := getattr(self, name))}


def fill_cache(
    cache_dir: Path,
    teacher: TeacherPass,
    progress: Callable[[int], object] = lambda windows_done: None,
    ranks: Ranks | None = None,
) -> np.ndarray:
    """Run a teacher over its windows, or the rest of them where an earlier pass was killed.

    Args:
        cache_dir: One folder for all ranks.
        teacher: The pass. One that goes on keeps the cut that it began with.
        progress: Called with the number of windows that all ranks, as far as this one can tell,
            have done since the last call.
        ranks: Who share the pass.

    Returns:
        open_cache's array.

    Raises:
        UserError: A logit is not finite in fp16, or the disk is full. What was on the disk before
            stays for the next start.
    """
    ranks, windows = ranks or Ranks(), teacher.windows
    shards = PassShards.of(cache_dir, teacher.source)

    def start(partial: Path) -> None:
        _start(partial, teacher.source, windows, shards, teacher.cut)

    def fill(partial: Path) -> None:
        share = _whole(windows, read_json_object(partial / HEADER))
        _fill(partial, teacher, share, progress, ranks)

    return make_once(cache_dir, teacher.source, len(windows.input_ids), start, fill, ranks)


def fill_shard(
    cache_dir: Path,
    teacher: TeacherPass,
    shard: Shard,
    progress: Callable[[int], object] = lambda windows_done: None,
    ranks: Ranks | None = None,
) -> None:
    """As `fill_cache`, but only a share of the pass, or the rest of it: join_shards has the others.

    It does nothing, or stops, where another process has made the cache of all of it meanwhile.

    Raises UserError also where the pass was begun with another number of shares.
    """
    ranks, shards = ranks or Ranks(), PassShards.of(cache_dir, teacher.source)
    folder = shards.folder(shard.number)
    try:
        with ExitStack() as stack:
            header = _begin(shards, shard, teacher, stack) if ranks.is_first else {}
            header = json.loads(ranks.share(json.dumps(header)))
            share = _share(teacher.windows, shard, header)
            if not share.batches:
                return
            _fill(folder, teacher, share, progress, ranks)
            ranks.barrier()
    except OSError as error:
        if isinstance(error, FileNotFoundError) and shards.finished:
            return
        raise disk_error(folder, error) from error


def _begin(
    shards: PassShards, shard: Shard, teacher: TeacherPass, stack: ExitStack
) -> dict[str, Any]:
    """The header of all shares, once this one is locked in `stack`, and its folder is there.

    Empty where the cache is finished.
    """
    windows, folder = teacher.windows, shards.folder(shard.number)
    try:
        header = shards.begin(len(windows.input_ids), shard, teacher.cut)
        share = _share(windows, shard, header)
        if not share.batches:
            return header
        # The same task may have been started twice.
        stack.enter_context(lock(folder.with_suffix(".lock")))
        if shards.finished:  # so that the lock may be that of a deleted file
            return {}
        if not shards.has_begun(shard.number, share, header, windows):
            cut = _cut_of(header)
            start_folder(folder, teacher.source, share.tokens, len(share.batches), **cut)
    except FileNotFoundError:
        if not shards.finished:
            raise
        return {}
    return header


def _share(windows: Windows, shard: Shard, header: dict[str, Any]) -> Share:
    """A share of the pass with this header; none of it where the header is empty."""
    batches = _cuts(windows, header)[shard.number :: shard.count] if header else []
    return Share.of(batches, windows)


def missing_shards(cache_dir: Path, source: Source, windows: Windows) -> list[str] | None:
    """The shares of a pass that are not done, as --shard names them; None where none has begun."""
    shards = PassShards.of(cache_dir, source)
    if not (header := shards.header):
        return None
    missing = shards.missing(_cuts(windows, header), header["shards"])
    return [f"{number}/{header['shards']}" for number in missing]


def join_shards(
    cache_dir: Path, source: Source, windows: Windows, ranks: Ranks | None = None
) -> np.ndarray | None:
    """The cache of a pass whose shares are all done, as fill_cache makes it; None if they are not.

    Raises UserError as fill_cache.
    """
    ranks, shards = ranks or Ranks(), PassShards.of(cache_dir, source)
    tokens = len(windows.input_ids)

    def start(partial: Path) -> None:
        _start(partial, source, windows, shards, {})
        if not map_progress(partial, len(_cuts(windows, shards.header))).all():
            raise UserError(f"A part in {shards.path} is damaged: make all parts once more.")

    if ranks.any(ranks.is_first and missing_shards(cache_dir, source, windows) == []):
        return make_once(cache_dir, source, tokens, start, lambda partial: None, ranks)
    # Another process may have joined and deleted them meanwhile.
    return open_shared(cache_dir, source, tokens, ranks)


def _start(
    partial: Path, source: Source, windows: Windows, shards: PassShards, cut: dict[str, Any]
) -> None:
    """Create the folder of a pass, or take over one that a killed pass left, and what shares did.

    cut: how the pass is cut, unless it has begun.
    """
    header, begun = read_json_object(partial / HEADER), shards.header
    tokens = len(windows.input_ids)
    if begun:
        cut = _cut_of(begun)
    is_its = header_of(source, tokens).items() <= header.items() and "max_tokens" in header
    if begun and _cut_of(header) != cut:
        is_its = False
    if not (is_its and _whole(windows, header).keep_sound(partial, header, windows)):
        start_folder(partial, source, tokens, len(_cuts(windows, cut)), **cut)
    if begun:
        shards.copy(partial, _cuts(windows, cut), windows, begun["shards"])


def _fill(
    folder: Path,
    teacher: TeacherPass,
    share: Share,
    progress: Callable[[int], object],
    ranks: Ranks,
) -> None:
    """This rank's part of a share of the pass, into `folder`.

    Raises FileNotFoundError, on all ranks, where one of them does not find the folder.
    """
    windows, batches, header = teacher.windows, share.batches, {}
    with suppress(FileNotFoundError):
        logits = map_logits(folder, share.tokens, "r+")
        sums = map_progress(folder, len(batches))
        mine = np.flatnonzero(sums == 0)[ranks.rank :: ranks.count]
        progress(sum(len(batches[number]) for number in np.flatnonzero(sums)))
        header = read_json_object(folder / HEADER)
    if ranks.any(not header):  # which waits until all have read what is left
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
    if ranks.any(len(mine) > 0):
        record_environment(folder, teacher.device, ranks)
    dtype = AUTOCAST[teacher.source.precision]
    if dtype is not None:
        teacher.model.cast_linear_layers(dtype)
    unsaved: dict[int, int] = {}
    saved_at = time.monotonic()
    cuts = [batches[number] for number in mine]
    # As the pass has begun, whatever is asked for now.
    packed = header.get("packed", False)
    if packed:
        teacher.model.enable_packing()
    room = Room(packs=packed)
    passes = forward_windows(teacher.model, windows, cuts, teacher.device, dtype, room)
    for number, (indices, rows) in zip(mine, passes, strict=True):
        with np.errstate(over="ignore"):
            half = rows.astype(np.float16)
        _check_finite(half, windows, indices)
        logits[share.positions(windows, indices)] = half
        unsaved[number] = sum_of(half, header)
        progress(len(indices) * ranks.count)
        heartbeat.report(f"micro-batch {number} of the teacher's pass")
        if time.monotonic() - saved_at > SECONDS_BETWEEN_SAVES:
            save_progress(logits, sums, unsaved)
            saved_at, unsaved = time.monotonic(), {}
    save_progress(logits, sums, unsaved)


def _cuts(windows: Windows, header: dict[str, Any]) -> list[np.ndarray]:
    """The micro-batches of the pass with this header, or of a new one with this `cut`."""
    packed = header.get("packed", False)
    return cut_by_tokens(np.arange(len(windows)), windows.lengths, header["max_tokens"], packed)


def _whole(windows: Windows, header: dict[str, Any]) -> Share:
    """All of the pass with this header."""
    return Share.whole(_cuts(windows, header), windows)


def _cut_of(header: dict[str, Any]) -> dict[str, Any]:
    """A header's part of a pass's cut; one of a padded pass does not name `packed`."""
    return {name: header[name] for name in CUT if name in header}


def _check_finite(half: np.ndarray, windows: Windows, indices: np.ndarray) -> None:
    bad = ~np.isfinite(half).all(axis=1)
    if bad.any():
        window = np.repeat(indices, windows.lengths[indices])[bad.argmax()]
        question = windows.question_ids[windows.question[window]]
        raise UserError(
            f"The teacher's logits are not finite in fp16 for question {question} "
            f"(window {window}): check the teacher's weights, or leave that question out."
        )
