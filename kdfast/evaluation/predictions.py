"""Answers and null odds by question id, from the files that programs leave them in."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdfast.common.errors import UserError
from kdfast.data.examples import Example
from kdfast.data.parsing import IDS, first_of
from kdfast.data.records import file_items, text_of

# Where a record of one question holds its answer, or its odds.
ANSWERS = ("prediction_text", "answer", "prediction", "text")
ODDS = ("no_answer_probability", "null_odds")


def read_values(name: str, role: str, kind: type[str] | type[float]) -> dict[str, Any]:
    """Question id -> its answer (kind str), or its null odds (kind float).

    name: a file with a JSON object of them; or with one record a question, as a list or as lines:
    {"id", "prediction_text"} of Hugging Face's metrics, or what kdfast.predict writes.

    Raises UserError, naming `role`, for anything else, and for two values of one question.
    """
    keys = ANSWERS if kind is str else ODDS
    path = Path(name).expanduser()
    found: dict[str, Any] = {}
    twice: list[str] = []
    for where, item in file_items(path):
        if not isinstance(item, dict):
            raise UserError(f"{role} {name} holds no object at {where}: {_forms(keys)}")
        key = first_of(item, (*keys, "answers"))
        question = first_of(item, IDS)
        pairs = item
        if key and question and len(item) > 1:
            value = item[key]
            if key == "answers" and isinstance(value, list) and value:  # --top_k, the best first
                value = value[0].get("answer") if isinstance(value[0], dict) else value[0]
            pairs = {text_of(item[question]): value}
        elif where:
            raise UserError(f"{role} {name} holds no answer by an id at {where}: {_forms(keys)}")
        for each, value in pairs.items():
            _check(name, role, kind, each, value)
            if each in found and found[each] != value:
                twice.append(each)
            found[each] = value
    if twice:
        raise UserError(
            f"{role} {name} holds two values of {len(set(twice))} questions, such as {twice[0]}: "
            "keep one of each"
        )
    return found


def for_examples(found: Mapping[str, Any], examples: Sequence[Example]) -> dict[str, Any]:
    """The values, and those of a repeated id under each name that its questions have."""
    again = {
        each.id: found[each.renamed_from]
        for each in examples
        if each.renamed_from in found and each.id not in found
    }
    return {**found, **again}


def _check(name: str, role: str, kind: type, question: Any, value: Any) -> None:
    if kind is str:
        good, what = isinstance(value, str), "a text"
    else:
        good, what = type(value) in (int, float) and -1e308 < value < 1e308, "a finite number"
    if question is None or not good:
        raise UserError(
            f"{role} {name} holds {reprlib.repr(value)} for question {question}: give {what}."
        )


def _forms(keys: tuple[str, ...]) -> str:
    return f'give a JSON object by question id, or records with "id" and "{keys[0]}"'
