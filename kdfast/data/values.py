"""Single values of a record: texts, numbers and flags, however they are written."""

from __future__ import annotations

import math
import re
from typing import Any

_LARGEST = 10**18


def usable(key: str, value: Any) -> tuple[str, str]:
    """A text that a tokenizer takes, and ""; or "" and what is wrong with it."""
    text = text_of(value)
    if text is None:
        return "", f"its {key} is {kind_of(value)}"
    if not text.strip() and key == "context":
        return "", f"its {key} is empty"
    if fault := unwritable(text):
        return "", f"its {key} holds {fault}"
    return text, ""


def unwritable(text: str) -> str:
    """What of a text cannot be written as UTF-8; "" if all can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"half a surrogate pair at character {error.start}"
    return ""


def text_of(value: Any) -> str | None:
    """A text, or a number as one; None for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value) if value.is_integer() else value)
    return str(value) if type(value) is int else None


def integer_of(value: Any) -> int | None:
    """A whole number, also where it is written as a float or as text; None for anything else."""
    if type(value) is int:
        return value if -_LARGEST < value < _LARGEST else None
    text = text_of(value)
    found = re.fullmatch(r"\s*(-?\d{1,18})(?:\.0*)?\s*", text or "")
    return int(found[1]) if found else None


def is_true(value: Any) -> bool:
    """A flag: true, 1, or their text in any case."""
    return (str(value) if isinstance(value, bool) else text_of(value) or "").lower() in (
        "true",
        "1",
    )


def kind_of(value: Any) -> str:
    return "null" if value is None else type(value).__name__
