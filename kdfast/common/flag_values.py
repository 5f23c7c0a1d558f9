"""What a flag's value may be, whoever gives it: a command line or a recipe."""

import reprlib
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from kdfast.common.errors import UserError

# What a number may be at most: beyond, arithmetic or memory would fail, and not by one sentence.
LARGEST = 2**31 - 1
MOST = {
    "n_best_size": 1000,
    # Exact in fp32, in which the ranks tell each other how they cut.
    "max_tokens_per_micro_batch": 2**24,
    "gradient_accumulation_steps": 2**24,
    "num_train_epochs": 10**6,
    "layers_num_train_epochs": 10**6,
    "temperature": 10**6,
}
PATHS = {
    "teacher",
    "student",
    "layers_teacher",
    "layers_train_file",
    "train_file",
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
}


def check_values(config: Any) -> None:
    """Raise UserError for a value of another type than its flag's, or a path that cannot be one.

    config: a dataclass of flags.
    """
    for name, kind in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if not is_of(value, kind):
            told = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
            raise UserError(f"--{name} is {reprlib.repr(value)}: give {told}.")
        for text in value if isinstance(value, list) else [value]:
            if name in PATHS and text is not None:
                _check_path(name, text)


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


def _check_path(name: str, text: str) -> None:
    """Whether it exists is for others to say; here it is enough that the system can be asked."""
    try:
        text.encode()
        Path(text).expanduser().exists()
    except (OSError, ValueError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(
            f"--{name} {reprlib.repr(text)} cannot be looked up ({why}): name another."
        ) from error
