"""What trainer_state.json of a checkpoint may hold, whoever wrote it."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from kdfast.data.batches import MicroBatchPolicy

FORMAT = 4


def fault_of_state(state: dict[str, Any]) -> str | None:
    """Which entry is not as save_checkpoint writes it; None where all are."""
    for name, is_good in ENTRIES.items():
        if name not in state or not is_good(state[name]):
            return name
    return None


def _whole(least: int, most: int = 2**62) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value <= most


def _number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1e30  # False for NaN


def _optional(is_good: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or is_good(value)


def _record(entries: dict[str, Callable[[Any], bool]]) -> Callable[[Any], bool]:
    """An object that has these entries and no other."""

    def is_good(value: Any) -> bool:
        return (
            isinstance(value, dict)
            and value.keys() == entries.keys()
            and all(entries[name](each) for name, each in value.items())
        )

    return is_good


def _list(is_good: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(is_good, value))


CUTS: dict[str, Callable[[Any], bool]] = dict.fromkeys(
    (each.name for each in fields(MicroBatchPolicy)), _number
)
CUTS |= {"max_tokens": _whole(1, 2**24), "parts": _optional(_whole(1, 2**24))}
# torch's names of a GradScaler's state.
SCALER = {
    "scale": lambda value: _number(value) and value > 0,
    "growth_factor": lambda value: _number(value) and value > 1,
    "backoff_factor": lambda value: _number(value) and 0 < value < 1,
    "growth_interval": _whole(1, 2**31),
    "_growth_tracker": _whole(0, 2**31),
}
PROGRESS = {
    "steps": _whole(0),
    "evaluated": _whole(0),
    "best_f1": _optional(_number),
    "validation": _optional(lambda value: isinstance(value, str)),
    "rule": _optional(_record(CUTS)),
    "clock": lambda value: _list(_number)(value) and len(value) in (0, 5),
    "starts": _list(_whole(0)),
}
ENTRIES: dict[str, Callable[[Any], bool]] = {
    "format": lambda value: type(value) is int and value == FORMAT,
    "identity": lambda value: (
        isinstance(value, dict) and isinstance(value.get("circumstances", {}), dict)
    ),
    "progress": _record(PROGRESS),
    "updates": _whole(0),
    "overflows": _whole(0),
    "scaler": _optional(_record(SCALER)),
}
