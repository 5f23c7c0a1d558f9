"""Decoded records of the official and the flat form to examples; each fault names its record."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from kdfast.errors import UserError
from kdfast.squad.examples import Answer, Example


def article_examples(where: str, article: Any) -> Iterator[tuple[str, Example]]:
    """The questions of one entry of the official form's `data`."""
    title = _field(where, article, "title", str, default="")
    if title:
        where = f'{where} ("{title}")'
    for i, paragraph in enumerate(_field(where, article, "paragraphs", list)):
        at_paragraph = f"{where}, paragraphs[{i}]"
        context = _text(at_paragraph, paragraph, "context")
        for j, qa in enumerate(_field(at_paragraph, paragraph, "qas", list)):
            at = f"{at_paragraph}, qas[{j}]"
            yield at, _example(at, qa, title, context)


def row_example(where: str, row: Any) -> Example:
    """The question of one flat record."""
    title = _field(where, row, "title", str, default="")
    return _example(where, row, title, _text(where, row, "context"))


def _example(where: str, record: Any, title: str, context: str) -> Example:
    name = str(_field(where, record, "id", (str, int)))
    _encodable(where, "id", name)
    where = f'{where} (id "{name}")'
    question = _field(where, record, "question", str)
    _encodable(where, "question", question)
    impossible = _field(where, record, "is_impossible", bool, default=False)
    # A question marked impossible may list plausible answers; it has no answer.
    answers = () if impossible else _answers(where, record)
    for answer in answers or ():
        if not 0 <= answer.start < len(context):
            raise UserError(
                f"{where}: answer_start {answer.start} lies outside its context of {len(context)} "
                "characters: correct it, or leave the question out"
            )
    return Example(name, title, question, context, answers)


def _answers(where: str, record: dict) -> tuple[Answer, ...] | None:
    """Reads a list of {text, answer_start}, or {text: [...], answer_start: [...]}."""
    raw = record.get("answers")
    if raw is None:
        return None
    if isinstance(raw, dict):
        texts = _field(f"{where}, answers", raw, "text", list)
        starts = _field(f"{where}, answers", raw, "answer_start", list)
        if len(texts) != len(starts):
            raise UserError(
                f"{where}: answers has {len(texts)} text but {len(starts)} answer_start: "
                "give one of each per answer"
            )
        pairs: Iterable = [
            {"text": t, "answer_start": s} for t, s in zip(texts, starts, strict=True)
        ]
    elif isinstance(raw, list):
        pairs = raw
    else:
        raise UserError(
            f"{where}: answers is {type(raw).__name__}: give a list of text and answer_start"
        )
    found = []
    for number, pair in enumerate(pairs):
        at = f"{where}, answers[{number}]"
        text = _field(at, pair, "text", str)
        found.append(Answer(text, _field(at, pair, "answer_start", int)))
    return tuple(found)


def _text(where: str, record: Any, key: str) -> str:
    """A context: a string that is not blank."""
    text = _field(where, record, key, str)
    if not text.strip():
        raise UserError(f"{where}: its {key} is empty: give a text, or leave the record out")
    _encodable(where, key, text)
    return text


def _encodable(where: str, key: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: its {key} holds half a surrogate pair at character {error.start}: "
            "write the character whole"
        ) from None


_REQUIRED = object()


def _field(where: str, record: Any, key: str, kind: Any, default: Any = _REQUIRED) -> Any:
    """record[key], of the given type. A field with a default may be absent or null."""
    if type(record) is dict and type(record.get(key)) is kind:
        return record[key]  # as nearly always
    if not isinstance(record, dict):
        raise UserError(f"{where}: {type(record).__name__} where an object with {key!r} belongs")
    value = record.get(key)
    if value is None and default is not _REQUIRED:
        return default
    if key not in record:
        present = ", ".join(map(str, record)) or "nothing"
        raise UserError(f"{where}: no {key!r} (it has {present}): add it")
    wrong_bool = isinstance(value, bool) and kind is not bool
    if wrong_bool or not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join(k.__name__ for k in kinds)
        found = "null" if value is None else type(value).__name__
        raise UserError(f"{where}: {key!r} is {found}: give {wanted}")
    return value
