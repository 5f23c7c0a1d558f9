"""What programs have written: answers and null odds by question id, and figures."""

import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from kdfast.common.errors import UserError
from kdfast.common.files import read_json_object
from kdfast.common.settings import is_of
from kdfast.data.examples import Example
from kdfast.data.parsing import IDS, first_of
from kdfast.data.records import file_items, text_of
from kdfast.evaluation import tables
from kdfast.evaluation.metric_rules import MetricRule

# Where a record of one question holds its answer, or its odds.
ANSWERS = ("prediction_text", "answer", "prediction", "text")
ODDS = ("no_answer_probability", "null_odds")

Value = TypeVar("Value", str, float)


def read_answers(name: str, examples: Sequence[Example]) -> dict[str, str]:
    """The answers in the file of --predictions, by question id.

    The file holds a JSON object of them, or one record a question, as a list or as lines:
    {"id", "prediction_text"} of Hugging Face's metrics, or what kdfast.predict writes. The answer
    of a repeated id is that of each of its questions.

    Raises:
        UserError: For anything else, and for two answers to one question.
    """
    return _read(name, "--predictions", ANSWERS, str, examples)


def read_odds(name: str, examples: Sequence[Example]) -> dict[str, float]:
    """The null odds in the file of --null_odds, as `read_answers` reads answers."""
    return _read(name, "--null_odds", ODDS, float, examples)


def recorded_figures(name: str, rule: MetricRule) -> dict[str, Any] | None:
    """The figures in a result that an evaluation wrote; None where `name` is no result."""
    record = read_json_object(Path(name).expanduser())
    figures = record.get("metrics", record)
    if not isinstance(figures, dict) or "best_f1_thresh" not in figures:
        if "metrics" in record or "sets" in record:
            raise UserError(
                f"--null_threshold_from {name} holds no best_f1_thresh: give the result of one set."
            )
        return None
    names = ("best_f1_thresh", "best_f1", "total")
    if not all(is_of(figures.get(each), float) for each in names):
        raise UserError(
            f"--null_threshold_from {name} holds a best_f1_thresh without best_f1 and total: "
            "give the result of an evaluation."
        )
    if tables.scored_by(record) != rule.label:
        raise UserError(
            f"--null_threshold_from {name} is scored by {tables.scored_by(record)}, and this "
            f"evaluation by {rule.label}: give a result of the same rule, or data."
        )
    return figures


def _read(
    name: str,
    role: str,
    keys: tuple[str, ...],
    kind: type[Value],
    examples: Sequence[Example],
) -> dict[str, Value]:
    forms = f'give a JSON object by question id, or records with "id" and "{keys[0]}"'
    found: dict[str, Value] = {}
    twice: list[str] = []
    for where, item in file_items(Path(name).expanduser()):
        if not isinstance(item, dict):
            raise UserError(f"{role} {name} holds no object at {where}: {forms}")
        key = first_of(item, (*keys, "answers"))
        id_key = first_of(item, IDS)
        pairs: dict[str | None, Any] = item
        if key and id_key and len(item) > 1:
            value = item[key]
            if key == "answers" and isinstance(value, list) and value:  # --top_k, the best first
                value = value[0].get("answer") if isinstance(value[0], dict) else value[0]
            pairs = {text_of(item[id_key]): value}
        elif where:
            raise UserError(f"{role} {name} holds no answer by an id at {where}: {forms}")
        for question, value in pairs.items():
            is_good = is_of(value, kind) and (kind is str or -1e308 < value < 1e308)
            if question is None or not is_good:
                raise UserError(
                    f"{role} {name} holds {reprlib.repr(value)} for question {question}: "
                    f"give {'a text' if kind is str else 'a finite number'}."
                )
            if found.setdefault(question, value) != value:
                twice.append(question)
    if twice:
        raise UserError(
            f"{role} {name} holds two values of {len(set(twice))} questions, such as {twice[0]}: "
            "keep one of each"
        )
    renamed = {each.id: found[each.renamed_from] for each in examples if each.renamed_from in found}
    return renamed | found
