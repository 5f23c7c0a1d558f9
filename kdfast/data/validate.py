"""Whether the arrays and the header of Windows fit together, no matter who wrote them."""

from __future__ import annotations

from typing import Any

import numpy as np

from kdfast.data.cache import UNLABELLED
from kdfast.data.tally import COUNTED

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


def fault_of(arrays: dict[str, np.ndarray]) -> str | None:
    """What is wrong with the arrays of Windows, by name as there; None where nothing is.

    Of the tokens it is only looked at whether one is below 0: the vocabulary is not known here.
    """
    if fault := _fault_of_sizes(arrays):
        return fault
    for name, data in STARTS.items():
        if not rises(arrays[name], len(arrays[data])):
            return f"{name} does not rise from 0 to {len(arrays[data])}"
    if fault := _fault_of_windows(arrays):
        return fault
    if not _is_text(arrays["question_id_bytes"], arrays["question_id_start"]):
        return "question_id_bytes is not UTF-8"
    return "input_ids holds a number below 0" if arrays["input_ids"].min() < 0 else None


def rises(starts: np.ndarray, total: int) -> bool:
    """Whether the runs that begin at `starts` lie one after another in `total` entries."""
    return bool(starts[0] == 0 and starts[-1] == total and (starts[1:] >= starts[:-1]).all())


def _fault_of_sizes(arrays: dict[str, np.ndarray]) -> str | None:
    """Of arrays that have an entry for each of the same things."""
    windows, questions = len(arrays["lengths"]), len(arrays["question_id_start"]) - 1
    if windows == 0 or questions < 1 or len(arrays["context_token_start"]) < 2:
        return "no window"
    sizes = dict.fromkeys(PER_WINDOW, windows)
    sizes |= {"window_start": windows + 1, "question_token_start": questions + 1}
    for each in ("question", "context"):
        sizes[f"{each}_char_count"] = len(arrays[f"{each}_char_start"])
    for name, size in sizes.items():
        if len(arrays[name]) != size:
            return f"{name} has {len(arrays[name])} entries, not {size}"
    return None


def _fault_of_windows(arrays: dict[str, np.ndarray]) -> str | None:
    """Of what each window states, where all sizes and starts are known to be sound."""
    lengths, count, prefix, first, question = (
        arrays[name].astype(np.int64)
        for name in ("lengths", "count", "prefix", "first_token", "question")
    )
    if (np.diff(arrays["window_start"]) != lengths).any() or (lengths <= 0).any():
        return "lengths are not those of window_start, or 0"
    if ((prefix <= 0) | (count < 0) | (prefix + count > lengths)).any():
        return "prefix and count lead out of their window"
    last = len(arrays["question_id_start"]) - 2
    if question[0] != 0 or question[-1] != last or not np.isin(np.diff(question), (0, 1)).all():
        return f"question does not rise from 0 to {last} in steps of 0 or 1"
    context, begins = arrays["context"], arrays["context_token_start"]
    if ((context < 0) | (context >= len(begins) - 1)).any():
        return "context holds a number that is no context's"
    if ((first < 0) | (first + count > begins[context + 1] - begins[context])).any():
        return "first_token and count lead out of their context"
    start, end = arrays["start_positions"], arrays["end_positions"]
    unlabelled = (start == UNLABELLED) & (end == UNLABELLED)
    if not (unlabelled | ((start >= 0) & (start <= end) & (end < lengths))).all():
        return "start_positions or end_positions hold a label that is not in its window"
    return None


def _is_text(data: np.ndarray, starts: np.ndarray) -> bool:
    """Whether each run of bytes from one start to the next is UTF-8."""
    try:
        data.tobytes().decode()
    except UnicodeDecodeError:
        return False
    # No run begins inside a character.
    return bool(((data[starts[starts < len(data)]] & 0xC0) != 0x80).all())


def fault_of_header(header: dict[str, Any]) -> str | None:
    """What is wrong with the entries of a header that Windows reads; None where nothing is."""
    counts, first, pad = (header.get(name) for name in ("counts", "first", "pad_token_id"))
    is_sound = {
        "counts": isinstance(counts, dict)
        and counts.keys() >= {"questions", *COUNTED}
        and all(type(count) is int for count in counts.values()),
        "first": isinstance(first, dict)
        and all(isinstance(ids, list) for ids in first.values())
        and all(isinstance(each, str) for ids in first.values() for each in ids),
        "settings": isinstance(header.get("settings"), dict),
        "pad_token_id": type(pad) is int and 0 <= pad < 2**31,
        "uses_token_types": isinstance(header.get("uses_token_types"), bool),
    }
    return next((f"no sound {name}" for name, sound in is_sound.items() if not sound), None)
