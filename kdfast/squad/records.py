"""Questions with their contexts and answers, read from a file or from a `datasets` dataset."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdfast.errors import UserError
from kdfast.squad.json_items import json_items

NEARBY = 200  # characters around the stated place in which a misplaced answer is looked for

_FLAT = {"context", "question", "answers"}  # any of these tells a flat record from an article
_FILE_LIKE = re.compile(r"^[/~.]|\\|/.*/|\.(json|jsonl|ndjson|parquet|csv|txt|gz)$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Answer:
    text: str
    start: int  # characters from the start of the context


@dataclass(frozen=True, slots=True)
class Example:
    """One question. `answers` is None where unlabelled and () where it has no answer."""

    id: str
    title: str
    question: str
    context: str
    answers: tuple[Answer, ...] | None


@dataclass(frozen=True, slots=True)
class Place:
    """Where an answer stands: context[start:end], without outer blanks."""

    start: int
    end: int
    moved: bool  # True where the record named another place


def locate(context: str, answer: Answer) -> Place | None:
    """Finds an answer in its context.

    The text, less its outer blanks, counts as being where the record says (its blanks counted or
    not). Otherwise it is taken from elsewhere if it occurs exactly once among the places that
    start at most NEARBY characters away from the stated one. None: not found, not unique, or
    blank.
    """
    text = answer.text.strip()
    if not text:
        return None
    stated = answer.start + len(answer.text) - len(answer.text.lstrip())
    for start in (stated, answer.start):
        if context.startswith(text, start):
            return Place(start, start + len(text), moved=False)
    low, high = max(0, stated - NEARBY), stated + NEARBY + len(text)
    start = context.find(text, low, high)
    if start < 0 or context.find(text, start + 1, high) >= 0:
        return None
    return Place(start, start + len(text), moved=True)


def read_examples(source: str, *, split: str | None = None) -> list[Example]:
    """Reads all questions of a path or of a hub name; see `iter_examples`."""
    return list(iter_examples(source, split=split))


def iter_examples(source: str, *, split: str | None = None) -> Iterator[Example]:
    """Yields the questions of `source` in order, holding about one article in memory.

    source: a path to official SQuAD 1.1 or 2.0 JSON, or to flat records (json, jsonl, parquet)
    with id, question, context and, optionally, title and answers; or `id[:config[:split]]` of a
    dataset that `datasets.load_dataset` knows, in the flat form. `split` is used where a hub name
    gives none ("train" if None).

    Questions that stand together on equal contexts share one context string.

    Raises UserError for whatever is missing, unreadable or malformed, naming file and record.
    """
    seen: set[str] = set()
    context = ""
    for where, example in _examples(source, split):
        if example.id in seen:
            raise UserError(
                f'{where}: the id "{example.id}" is used twice: give each question its own id'
            )
        seen.add(example.id)
        if example.context == context and example.context is not context:
            example = Example(example.id, example.title, example.question, context, example.answers)
        context = example.context
        yield example
    if not seen:
        raise UserError(f"{source}: no question in it: give a file with at least one")


def fingerprint(source: str, *, split: str | None = None) -> str:
    """The sha256, in hex, of what `source` holds, without parsing it: of the bytes of a file, or
    of the `datasets` fingerprint of a hub name. Raises UserError where there is no such source."""
    path = _path(source)
    if path is None:
        dataset = _load_dataset(source, split)
        return hashlib.sha256(f"{dataset._fingerprint} {len(dataset)}".encode()).hexdigest()
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise _unreadable(path, error) from None
    return digest.hexdigest()


def _path(source: str) -> Path | None:
    """The file that `source` names; None where it can only be a name on a hub."""
    try:
        path = Path(source).expanduser()
        if path.is_dir() or Path(source.split(":")[0]).is_dir():
            return None
        if path.exists():
            return path
    except (OSError, ValueError, RuntimeError) as error:  # no rights, no such user, too long
        raise UserError(f"{source!r}: not a path that can be read ({error}): check it") from None
    if not source or _FILE_LIKE.search(source) or source.count(":") > 2:
        raise UserError(f"{source!r}: no such file: give a .json, .jsonl or .parquet file")
    return None


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be read ({error.strerror or error}): check its rights")


def _load_dataset(source: str, split: str | None) -> Any:
    name, config, part = (*source.split(":"), "", "")[:3]
    try:
        import datasets

        return datasets.load_dataset(name, config or None, split=part or split or "train")
    except Exception as error:  # the hub's client raises a dozen kinds, some of them private
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(
            f"{source!r}: no such file here, and no dataset of that name could be loaded "
            f"({type(error).__name__}: {reason}): check name, configuration, split and network, "
            "or give a local .json, .jsonl or .parquet file"
        ) from None


def _examples(source: str, split: str | None) -> Iterator[tuple[str, Example]]:
    """Yields (where, example), where being what an error message calls the record."""
    path = _path(source)
    if path is None:
        rows = enumerate(_load_dataset(source, split))
        yield from ((f"{source}: row {n}", _row(f"{source}: row {n}", row)) for n, row in rows)
        return
    try:
        if path.suffix.lower() == ".parquet":
            for number, row in enumerate(_parquet_rows(path)):
                where = f"{path}: row {number}"
                yield where, _row(where, row)
            return
        for place, item in json_items(path):
            where = f"{path}: {place}"
            if isinstance(item, dict) and "paragraphs" not in item and not _FLAT.isdisjoint(item):
                yield where, _row(where, item)
            else:
                yield from _article(where, item)
    except OSError as error:
        raise _unreadable(path, error) from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text: save it as UTF-8") from None


def _parquet_rows(path: Path) -> Iterator[dict]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except pyarrow.ArrowInvalid as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a Parquet file ({reason}): write it again") from None


def _article(where: str, article: Any) -> Iterator[tuple[str, Example]]:
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


def _row(where: str, row: Any) -> Example:
    """The question of one flat record."""
    title = _field(where, row, "title", str, default="")
    return _example(where, row, title, _text(where, row, "context"))


def _example(where: str, record: Any, title: str, context: str) -> Example:
    name = _field(where, record, "id", (str, int))
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
    return Example(str(name), title, question, context, answers)


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
