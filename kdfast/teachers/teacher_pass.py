"""The pass of a teacher over its windows, which fills the cache of its logits.

`done.bin` has a byte for each micro-batch, 1 once its logits are on the disk: a killed pass goes on
where it stopped, with as many ranks as there are then.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kdfast.common.errors import UserError
from kdfast.common.files import read_json_object
from kdfast.common.precision import AUTOCAST
from kdfast.common.ranks import Ranks
from kdfast.data.batches import cut_by_tokens
from kdfast.data.windows import Windows
from kdfast.models.inference import forward_windows
from kdfast.models.span_model import SpanModel
from kdfast.models.window_loader import flat_positions
from kdfast.teachers.cache import (
    HEADER,
    PROGRESS_FILE,
    Source,
    header_of,
    make_once,
    map_logits,
    start_folder,
)

SECONDS_BETWEEN_SAVES = 10.0


@dataclass(frozen=True)
class TeacherPass:
    """A pass of a teacher over all of its windows, longest first.

    max_tokens: padded tokens in one forward pass.
    """

    source: Source
    model: SpanModel
    windows: Windows
    device: torch.device
    max_tokens: int


def fill_cache(
    cache_dir: Path,
    teacher: TeacherPass,
    progress: Callable[[int], object] = lambda windows_done: None,
    ranks: Ranks | None = None,
) -> np.ndarray:
    """Run a teacher over its windows, or the rest of them where an earlier pass was killed.

    Args:
        cache_dir: One folder for all ranks.
        teacher: The pass. One that goes on keeps the max_tokens that it began with.
        progress: Called with the number of windows that all ranks, as far as this one can tell,
            have done since the last call.
        ranks: Who share the pass.

    Returns:
        open_cache's array.

    Raises:
        UserError: A logit is not finite in fp16, or the disk is full. What was on the disk before
            stays for the next start.
    """
    ranks = ranks or Ranks()

    def start(partial: Path) -> None:
        _start(partial, teacher)

    def fill(partial: Path) -> None:
        _fill(partial, teacher, progress, ranks)

    tokens = len(teacher.windows.input_ids)
    return make_once(cache_dir, teacher.source, tokens, start, fill, ranks)


def _start(partial: Path, teacher: TeacherPass) -> None:
    """Create the folder of a pass, or take over one that a killed pass left."""
    source, windows, max_tokens = teacher.source, teacher.windows, teacher.max_tokens
    tokens = len(windows.input_ids)
    header = read_json_object(partial / HEADER)
    if any(header.get(name) != value for name, value in header_of(source, tokens).items()):
        micro_batches = len(_cuts(windows, max_tokens))
        start_folder(partial, source, tokens, micro_batches, max_tokens=max_tokens)


def _fill(
    partial: Path, teacher: TeacherPass, progress: Callable[[int], object], ranks: Ranks
) -> None:
    """This rank's part of a pass, into `partial`."""
    windows = teacher.windows
    batches = _cuts(windows, read_json_object(partial / HEADER)["max_tokens"])
    logits = map_logits(partial, len(windows.input_ids), "r+")
    done = np.memmap(partial / PROGRESS_FILE, dtype=np.uint8, mode="r+", shape=(len(batches),))
    progress(sum(len(batches[number]) for number in np.flatnonzero(done)))
    mine = np.flatnonzero(done == 0)[ranks.rank :: ranks.count]
    ranks.barrier()  # until all have read what is left
    dtype = AUTOCAST[teacher.source.precision]
    if dtype is not None:
        teacher.model.cast_linear_layers(dtype)
    saved_at, unsaved = time.monotonic(), []
    cuts = [batches[number] for number in mine]
    passes = forward_windows(teacher.model, windows, cuts, teacher.device, dtype)
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


def _cuts(windows: Windows, max_tokens: int) -> list[np.ndarray]:
    return cut_by_tokens(np.arange(len(windows.lengths)), windows.lengths, max_tokens)


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
