"""Settings as fields of dataclasses: default, help and range of each stand in one place."""

import math
import reprlib
from dataclasses import field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from kdfast.common.errors import UserError

# The most that a number may be: beyond it arithmetic or memory would fail in ways of their own.
LARGEST = 2**31 - 1
PATHS = {
    "teacher",
    "student",
    "layers_teacher",
    "layers_train_file",
    "train_file",
    "unlabelled_file",
    "validation_file",
    "output_dir",
    "resume_from_checkpoint",
    "cache_dir",
    "data",
    "model",
    "compare",
    "predictions",
    "null_odds",
    "null_threshold_from",
    "masked_model",
    "vectors",
    "embeddings",
    "output",
}


class Help(str):
    """The help of a setting, which also carries its range and rule: HfArgumentParser hands all
    metadata of a field to argparse, which knows help alone.

    above, least, most, resume: as `flag` has them.
    """

    above: float | None = None
    least: float | None = None
    most: float | None = None
    resume: str = "same"


def flag(
    default: Any,
    text: str,
    *,
    above: float | None = None,
    least: float | None = None,
    most: float | None = LARGEST,
    resume: Literal["same", "allowed", "free"] = "same",
) -> Any:
    """A dataclass field that is a setting.

    Args:
        default: Its value where none is given.
        text: The help that the command line shows.
        above: A number must be larger than this.
        least: A number must be at least this.
        most: A number must be at most this; None: no bound.
        resume: Whether a resumed run may change it: never, where --allow_changes names it, or
            freely.
    """
    described = Help(text)
    described.above, described.least, described.most = above, least, most
    described.resume = resume
    metadata = {"help": described}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def check_values(settings: Any) -> None:
    """Raise UserError for a value of another type than its flag's, out of its range, or a path that
    no system can have. settings: a dataclass of flags."""
    kinds = get_type_hints(type(settings))
    for each in fields(settings):
        value, kind = getattr(settings, each.name), kinds[each.name]
        if not is_of(value, kind):
            name = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
            raise UserError(f"--{each.name} is {reprlib.repr(value)}: give {name}.")
        for text in value if isinstance(value, list) else [value]:
            if each.name in PATHS and text:
                _check_path(each.name, text)
        described = each.metadata["help"]
        if isinstance(described, Help) and type(value) in (int, float):
            _check_range(each.name, value, described)


def is_of(value: Any, kind: Any) -> bool:
    """Whether a value is of a flag's type. A whole number may stand for a float."""
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(is_of(each, get_args(kind)[0]) for each in value)
    if get_args(kind):  # such as int | None
        return any(is_of(value, each) for each in get_args(kind))
    is_whole = type(value) is int and abs(value) < 2**1000  # which a float can hold
    return type(value) is kind or (kind is float and is_whole)


def _check_range(name: str, value: float, described: Help) -> None:
    above, least, most = described.above, described.least, described.most
    if most is None:
        return
    if least is not None and math.isinf(most) and not least <= value:
        raise UserError(f"--{name} is {value}: give {least} or more.")
    if above is not None and not above < value <= most:
        raise UserError(f"--{name} is {value}: give a number above {above}, {most} at most.")
    if least is not None and not least <= value <= most:
        raise UserError(f"--{name} is {value}: give a number from {least} to {most}.")
    if not value <= most:  # False for NaN too
        raise UserError(f"--{name} is {value}: give {most} at most.")


def _check_path(name: str, text: str) -> None:
    """Whether it exists is checked where it is used; here it is enough that one can ask."""
    try:
        text.encode()
        Path(text).expanduser().exists()
    except (OSError, ValueError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(
            f"--{name} {reprlib.repr(text)} cannot be looked up ({why}): name another."
        ) from error
