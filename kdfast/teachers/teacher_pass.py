"""The pass of a teacher over its windows, which fills the cache of its logits.

`done.bin` has a byte for each micro-batch, 1 once its logits are on the disk: a killed pass goes on
where it stopped, with as many ranks as there are then.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdfast.common import heartbeat
from kdfast.common.errors import UserError
from kdfast.common.files import lock, read_json_object
from kdfast.common.precision import AUTOCAST
from kdfast.common.ranks import Ranks
from kdfast.data.batches import cut_by_tokens
from kdfast.data.chunks import Shard
from kdfast.data.windows import Windows
from kdfast.models.inference import Room, forward_windows
from kdfast.models.span_model import SpanModel
from kdfast.teachers.cache import (
    HEADER,
    PROGRESS_FILE,
    Source,
    disk_error,
    header_of,
    make_once,
    map_logits,
    start_folder,
)
from kdfast.teachers.pass_shards import PassShards, Share

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
        share = Share.whole(_cuts(windows, read_json_object(partial / HEADER)), windows)
        _fill(partial, teacher, share, progress, ranks)

    logits = make_once(cache_dir, teacher.source, len(windows.input_ids), start, fill, ranks)
    if ranks.is_first:
        shards.remove()
    return logits


def fill_shard(
    cache_dir: Path,
    teacher: TeacherPass,
    shard: Shard,
    progress: Callable[[int], object] = lambda windows_done: None,
    ranks: Ranks | None = None,
) -> None:
    """As `fill_cache`, but only a share of the pass, or the rest of it: join_shards has the others.

    Raises UserError also where the pass was begun with another number of shares.
    """
    ranks, windows, source = ranks or Ranks(), teacher.windows, teacher.source
    shards = PassShards.of(cache_dir, source)
    folder = shards.folder(shard.number)
    try:
        with ExitStack() as stack:
            if ranks.is_first:
                shards.begin(len(windows.input_ids), shard, teacher.cut)
            ranks.barrier()
            share = shards.share(shard.number, _cuts(windows, shards.header), windows)
            if not share.batches:
                return
            if ranks.is_first:
                # The same task may have been started twice.
                lock(stack.enter_context(folder.with_suffix(".lock").open("w")))
                if not shards.has_begun(shard.number, share):
                    cut = _cut_of(shards.header)
                    start_folder(folder, source, share.tokens, len(share.batches), **cut)
            ranks.barrier()
            _fill(folder, teacher, share, progress, ranks)
            ranks.barrier()
    except OSError as error:
        raise disk_error(folder, error) from error


def missing_shards(cache_dir: Path, source: Source, windows: Windows) -> list[str] | None:
    """The shares of a pass that are not done, as --shard names them; None where none has begun."""
    shards = PassShards.of(cache_dir, source)
    if not (header := shards.header):
        return None
    missing = shards.missing(_cuts(windows, header))
    return [f"{number}/{header['shards']}" for number in missing]


def join_shards(
    cache_dir: Path, source: Source, windows: Windows, ranks: Ranks | None = None
) -> np.ndarray | None:
    """The cache of a pass whose shares are all done, as fill_cache makes it; None if they are not.

    Raises UserError as fill_cache.
    """
    ranks, shards = ranks or Ranks(), PassShards.of(cache_dir, source)
    if not ranks.any(ranks.is_first and missing_shards(cache_dir, source, windows) == []):
        return None

    def start(partial: Path) -> None:
        _start(partial, source, windows, shards, {})

    tokens = len(windows.input_ids)
    logits = make_once(cache_dir, source, tokens, start, lambda partial: None, ranks)
    if ranks.is_first:
        shards.remove()
    return logits


def _start(
    partial: Path, source: Source, windows: Windows, shards: PassShards, cut: dict[str, Any]
) -> None:
    """Create the folder of a pass, or take over one that a killed pass left, and what shares did.

    cut: how the pass is cut, unless it has begun.
    """
    header, tokens, begun = (
        read_json_object(partial / HEADER),
        len(windows.input_ids),
        shards.header,
    )
    needed = header_of(source, tokens)
    if begun:
        cut = _cut_of(begun)
    is_other = begun and _cut_of(header) != cut
    if is_other or any(header.get(name) != value for name, value in needed.items()):
        start_folder(partial, source, tokens, len(_cuts(windows, cut)), **cut)
    if begun:
        shards.copy(partial, _cuts(windows, cut), windows)


def _fill(
    folder: Path,
    teacher: TeacherPass,
    share: Share,
    progress: Callable[[int], object],
    ranks: Ranks,
) -> None:
    """This rank's part of a share of the pass, into `folder`."""
    windows, batches = teacher.windows, share.batches
    logits = map_logits(folder, share.tokens, "r+")
    done = np.memmap(folder / PROGRESS_FILE, dtype=np.uint8, mode="r+", shape=(len(batches),))
    progress(sum(len(batches[number]) for number in np.flatnonzero(done)))
    mine = np.flatnonzero(done == 0)[ranks.rank :: ranks.count]
    ranks.barrier()  # until all have read what is left
    dtype = AUTOCAST[teacher.source.precision]
    if dtype is not None:
        teacher.model.cast_linear_layers(dtype)
    saved_at, unsaved = time.monotonic(), []
    cuts = [batches[number] for number in mine]
    # As the pass has begun, whatever is asked for now.
    packed = read_json_object(folder / HEADER).get("packed", False)
    if packed:
        teacher.model.enable_packing()
    room = Room(packs=packed)
    passes = forward_windows(teacher.model, windows, cuts, teacher.device, dtype, room)
    for number, (indices, rows) in zip(mine, passes, strict=True):
        with np.errstate(over="ignore"):
            half = rows.astype(np.float16)
        _check_finite(half, windows, indices)
        logits[share.positions(windows, indices)] = half
        unsaved.append(number)
        progress(len(indices) * ranks.count)
        heartbeat.report(f"micro-batch {number} of the teacher's pass")
        if time.monotonic() - saved_at > SECONDS_BETWEEN_SAVES:
            _save_progress(logits, done, unsaved)
            saved_at, unsaved = time.monotonic(), []
    _save_progress(logits, done, unsaved)


def _cuts(windows: Windows, header: dict[str, Any]) -> list[np.ndarray]:
    """The micro-batches of the pass with this header, or of a new one with this `cut`."""
    packed = header.get("packed", False)
    everything = np.arange(len(windows.lengths))
    return cut_by_tokens(everything, windows.lengths, header["max_tokens"], packed)


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


def _save_progress(logits: np.memmap, done: np.memmap, batches: list[int]) -> None:
    """Mark micro-batches as done, after their logits are on the disk."""
    logits.flush()
    done[batches] = 1
    done.flush()
