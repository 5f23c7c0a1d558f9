"""Whether the arrays and the header of Windows fit together, whoever wrote them."""

from __future__ import annotations

from typing import Any

import numpy as np

UNLABELLED = -100
COUNTS = ("moved", "left_out", "unlabelled", "truncated_questions", "questions")
BLOCK = 1 << 22  # values looked at in one go


def fault_of(arrays: dict[str, np.ndarray]) -> str | None:
    """What is wrong with the arrays of Windows, by name as there; None where nothing is.

    Whether a token is in a vocabulary is not looked at, except that none is below 0.
    """
    windows = len(arrays["lengths"])
    if windows == 0:
        return "no window"
    runs = (
        ("window_start", windows, len(arrays["input_ids"])),
        ("question_token_start", None, len(arrays["question_char_start"])),
        ("context_token_start", None, len(arrays["context_char_start"])),
        ("question_id_start", None, len(arrays["question_id_bytes"])),
    )
    for name, count, total in runs:
        starts = arrays[name]
        if len(starts) < 1 or count not in (None, len(starts) - 1):
            return f"{name} has {len(starts)} entries"
        if starts[0] != 0 or starts[-1] != total or not _all(starts[1:] >= starts[:-1]):
            return f"{name} does not rise from 0 to {total}"
    questions = len(arrays["question_id_start"]) - 1
    if len(arrays["question_token_start"]) != questions + 1:
        return "question_token_start is not of these questions"
    for name in ("question", "context"):
        if len(arrays[f"{name}_char_start"]) != len(arrays[f"{name}_char_count"]):
            return f"{name}_char_count is not as long as {name}_char_start"
    per_window = ("question", "context", "first_token", "count", "prefix", "trainable")
    for name in (*per_window, "start_positions", "end_positions"):
        if len(arrays[name]) != windows:
            return f"{name} has {len(arrays[name])} entries for {windows} windows"
    lengths, count, prefix = (
        arrays[name].astype(np.int64) for name in ("lengths", "count", "prefix")
    )
    if not _all(np.diff(arrays["window_start"]) == lengths) or not _all(lengths > 0):
        return "lengths are not those of window_start, or 0"
    if not _all((prefix > 0) & (count >= 0) & (prefix + count <= lengths)):
        return "prefix and count lead out of their window"
    question = arrays["question"]
    rises = _all(np.isin(np.diff(question), (0, 1)))
    if not (question[0] == 0 and rises and question[-1] == questions - 1):
        return f"question does not rise from 0 to {questions - 1}, in steps of 0 or 1"
    contexts = len(arrays["context_token_start"]) - 1
    if not _within(arrays["context"], contexts):
        return "context holds a number that is no context's"
    held = np.diff(arrays["context_token_start"])[arrays["context"]]
    first = arrays["first_token"].astype(np.int64)
    if not _all((first >= 0) & (first + count <= held)):
        return "first_token and count lead out of their context"
    start, end = arrays["start_positions"], arrays["end_positions"]
    unlabelled = (start == UNLABELLED) & (end == UNLABELLED)
    if not _all(unlabelled | ((start >= 0) & (start <= end) & (end < lengths))):
        return "start_positions or end_positions hold a label that is not in its window"
    if not _is_text(arrays["question_id_bytes"], arrays["question_id_start"]):
        return "question_id_bytes is not UTF-8"
    ids = arrays["input_ids"]
    if not all(_all(ids[at : at + BLOCK] >= 0) for at in range(0, len(ids), BLOCK)):
        return "input_ids holds a number below 0"
    return None


def fault_of_header(header: dict[str, Any]) -> str | None:
    """What is wrong with the entries of a header that Windows reads; None where nothing is."""
    counts = header.get("counts")
    if not isinstance(counts, dict) or not all(type(counts.get(name)) is int for name in COUNTS):
        return "no counts"
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


def _is_text(data: np.ndarray, starts: np.ndarray) -> bool:
    """Whether each run of bytes from one start to the next is UTF-8."""
    try:
        data.tobytes().decode()
    except UnicodeDecodeError:
        return False
    inside = starts[starts < len(data)]
    return _all((data[inside] & 0xC0) != 0x80)  # no run begins amid a character


def _within(numbers: np.ndarray, count: int) -> bool:
    return _all((numbers >= 0) & (numbers < count))
