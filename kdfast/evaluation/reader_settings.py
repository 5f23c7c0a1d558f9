"""How a reader answers: the arguments of a call, and of the Reader itself, which it starts from."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from numbers import Real
from typing import Any, SupportsIndex

from kdfast.common.errors import UserError

# Argument -> the least that it may be.
LEAST = {
    "top_k": 1,
    "max_answer_len": 1,
    "max_question_len": 1,
    "max_seq_len": 1,
    "doc_stride": 0,
    "batch_size": 1,
}
# Of the pipeline of transformers 4: how it made its inputs and loaded its model. No answer
# depends on them here.
WITHOUT_EFFECT = (
    *("num_workers", "padding", "task", "framework", "use_fast", "binary_output"),
    *("modelcard", "feature_extractor", "image_processor", "processor"),
)


@dataclass(frozen=True)
class ReaderSettings:
    """How questions are answered: the arguments of Reader.__call__, which describes them."""

    top_k: int = 1
    handle_impossible_answer: bool = False
    max_answer_len: int = 15
    max_question_len: int = 64
    max_seq_len: int | None = None
    doc_stride: int | None = None
    align_to_words: bool = True
    batch_size: int | None = None

    def changed(self, arguments: Mapping[str, object]) -> ReaderSettings:
        """These settings, but for the arguments that are given and not None.

        Warns of an argument that no reader has. Raises UserError for a value out of range.
        """
        given: dict[str, Any] = {k: value for k, value in arguments.items() if value is not None}
        topk = given.pop("topk", None)  # its name before transformers 4.15
        if topk is not None:
            given.setdefault("top_k", topk)
        known = [field.name for field in fields(self)]
        for name in [name for name in given if name not in known]:
            value = given.pop(name)
            # False, as in trust_remote_code=False, asks for what is done anyhow.
            if value is not False and value != {} and name not in WITHOUT_EFFECT:
                nearest = get_close_matches(name, known, n=1)
                remedy = f"did you mean {nearest[0]}?" if nearest else "leave it out."
                warnings.warn(
                    f"{name} is no argument of a reader and changes nothing: {remedy}",
                    stacklevel=3,
                )
        for name, value in given.items():
            given[name] = _whole(name, value) if name in LEAST else _yes_or_no(name, value)
        return replace(self, **given)


def _whole(name: str, value: object) -> int:
    """A whole number of any type that holds one. Raises UserError for any other value."""
    number: int | None = None
    if isinstance(value, SupportsIndex):  # int, and those of numpy and torch
        with suppress(TypeError):  # an array of several
            number = operator.index(value)
    elif isinstance(value, Real) and float(value).is_integer():
        number = int(float(value))
    if number is None or number < LEAST[name]:
        raise UserError(f"{name} is {value!r}: give a whole number of at least {LEAST[name]}.")
    return number


def _yes_or_no(name: str, value: object) -> bool:
    if isinstance(value, str):  # "False" would be true
        raise UserError(f"{name} is {value!r}: give True or False.")
    return bool(value)
