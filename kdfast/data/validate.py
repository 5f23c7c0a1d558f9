"""Whether the arrays and the header of Windows fit together, whoever wrote them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from kdfast.data.tally import COUNTED

UNLABELLED = -100
PER_WINDOW = (
    "question",
    "context",
    "first_token",
    "count",
    "prefix",
    "start_positions",
    "end_positions",
    "trainable",
)
# Where runs begin in which array.
STARTS = {
    "window_start": "input_ids",
    "question_token_start": "question_char_start",
    "context_token_start": "context_char_start",
    "question_id_start": "question_id_bytes",
}
BLOCK = 1 << 20  # entries looked at in one go


def fault_of(arrays: dict[str, np.ndarray]) -> str | None:
    """What is wrong with the arrays of Windows, by name as there; None where nothing is.

    Whether a token is in a vocabulary is not looked at, except that none is below 0. Everything is
    read once, in blocks, so that a set of any size takes little memory.
    """
    if fault := _fault_of_sizes(arrays):
        return fault
    for name, data in STARTS.items():
        starts, total = arrays[name], len(arrays[data])
        rises = all(_all(starts[at][1:] >= starts[at][:-1]) for at in _blocks(starts))
        if starts[0] != 0 or starts[-1] != total or not rises:
            return f"{name} does not rise from 0 to {total}"
    questions = len(arrays["question_id_start"]) - 1
    if arrays["question"][0] != 0 or arrays["question"][-1] != questions - 1:
        return f"question does not rise from 0 to {questions - 1}"
    for at in _blocks(arrays["lengths"]):
        if fault := _fault_of_windows(arrays, at):
            return fault
    starts, data = arrays["question_id_start"], arrays["question_id_bytes"]
    if not all(_is_text(data, starts[at]) for at in _blocks(starts)):
        return "question_id_bytes is not UTF-8"
    ids = arrays["input_ids"]
    if not all(_all(ids[at] >= 0) for at in _blocks(ids)):
        return "input_ids holds a number below 0"
    return None


def _fault_of_sizes(arrays: dict[str, np.ndarray]) -> str | None:
    """Of arrays that have an entry for each of the same things."""
    windows, questions = len(arrays["lengths"]), len(arrays["question_id_start"]) - 1
    if windows == 0 or questions < 1 or len(arrays["context_token_start"]) < 2:
        return "no window"
    sizes = dict.fromkeys(PER_WINDOW, windows)
    sizes |= {"window_start": windows + 1, "question_token_start": questions + 1}
    sizes |= {
        f"{name}_char_count": len(arrays[f"{name}_char_start"]) for name in ("question", "context")
    }
    for name, size in sizes.items():
        if len(arrays[name]) != size:
            return f"{name} has {len(arrays[name])} entries, not {size}"
    return None


def _fault_of_windows(arrays: dict[str, np.ndarray], at: slice) -> str | None:
    """Of some windows, whose starts and the number of questions are known to be sound."""
    lengths, count, prefix, first = (
        arrays[name][at].astype(np.int64) for name in ("lengths", "count", "prefix", "first_token")
    )
    begins = arrays["window_start"][at.start : at.stop + 1]
    if not _all(np.diff(begins) == lengths[: len(begins) - 1]) or not _all(lengths > 0):
        return "lengths are not those of window_start, or 0"
    if not _all((prefix > 0) & (count >= 0) & (prefix + count <= lengths)):
        return "prefix and count lead out of their window"
    if not _all(np.isin(np.diff(arrays["question"][at]), (0, 1))):
        return "question does not rise in steps of 0 or 1"
    context, begins = arrays["context"][at], arrays["context_token_start"]
    if not _all((context >= 0) & (context < len(begins) - 1)):
        return "context holds a number that is no context's"
    if not _all((first >= 0) & (first + count <= begins[context + 1] - begins[context])):
        return "first_token and count lead out of their context"
    start, end = arrays["start_positions"][at], arrays["end_positions"][at]
    unlabelled = (start == UNLABELLED) & (end == UNLABELLED)
    if not _all(unlabelled | ((start >= 0) & (start <= end) & (end < lengths))):
        return "start_positions or end_positions hold a label that is not in its window"
    return None


def fault_of_header(header: dict[str, Any]) -> str | None:
    """What is wrong with the entries of a header that Windows reads; None where nothing is."""
    counts = header.get("counts")
    names = ("questions", *COUNTED)
    if not isinstance(counts, dict) or not counts.keys() >= set(names):
        return "no counts"
    if not all(type(count) is int for count in counts.values()):
        return "counts that are no numbers"
    first = header.get("first")
    lists = first.values() if isinstance(first, dict) else [None]
    if not all(isinstance(ids, list) and all(isinstance(i, str) for i in ids) for ids in lists):
        return "no ids of the first questions"
    if not isinstance(header.get("settings"), dict):
        return "no settings"
    pad = header.get("pad_token_id")
    if type(pad) is not int or not 0 <= pad < 2**31:
        return "no pad_token_id"
    if not isinstance(header.get("uses_token_types"), bool):
        return "no uses_token_types"
    return None


def _all(condition: np.ndarray) -> bool:
    return bool(condition.all())


def _blocks(array: np.ndarray) -> Iterator[slice]:
    """Slices of BLOCK entries, each with the first entry of the next one, for what lies between."""
    for begin in range(0, len(array), BLOCK):
        yield slice(begin, min(begin + BLOCK + 1, len(array)))


def _is_text(data: np.ndarray, starts: np.ndarray) -> bool:
    """Whether each run of bytes from one start to the next is UTF-8."""
    data = data[starts[0] : starts[-1]]
    try:
        data.tobytes().decode()
    except UnicodeDecodeError:
        return False
    inside = starts[starts < starts[-1]] - starts[0]
    return _all((data[inside] & 0xC0) != 0x80)  # no run begins amid a character
