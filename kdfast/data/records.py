"""The records of a file (JSON, JSONL, CSV, TSV or Parquet, each also as .gz), and their values."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import re
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from kdfast.common.errors import UserError

_LONGEST_CELL = 2**31 - 1  # characters
_LARGEST = 10**18
# How files begin that are not read, what they are, and what to do.
_UNREAD = {
    b"PK\x03\x04": "a zip archive or an Excel workbook: unpack it, or save the sheet as CSV",
    b"version https://git-lfs": "a git-LFS pointer and not the data: run git lfs pull",
    b"<": "a page of HTML or XML: download the file itself (on GitHub, its raw form)",
    b"ARROW1": "an Arrow file: write it as Parquet (datasets.Dataset.to_parquet)",
    b"\xff\xff\xff\xff": "an Arrow file: write it as Parquet (datasets.Dataset.to_parquet)",
    b"BZh": "packed by bzip2: unpack it",
    b"\xfd7zXZ": "packed by xz: unpack it",
    b"\x28\xb5\x2f\xfd": "packed by zstd: unpack it",
    b"7z\xbc\xaf": "a 7z archive: unpack it",
    b"Rar!": "a rar archive: unpack it",
    b"SQLite": "a SQLite database: write its table as CSV",
    b"\x80": "a Python pickle, which is never read: write it as JSON",
}
_FORMS = (
    "give a SQuAD file, or a list or lines of records with question, context and answers, or a "
    "table (CSV, TSV, Parquet) with such columns"
)


def file_items(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields the records of a file, which is opened and read once, so that it may be a pipe.

    Of JSONL, CSV and Parquet only a part is in memory at a time.

    Yields:
        The record's line or row ("" for the one value of a JSON file), and the record.

    Raises:
        UserError: for a file that cannot be read, or is of no such kind.
    """
    try:
        with path.open("rb") as raw:
            yield from _items(path, raw, packed=False)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason}): check it and its rights") from None
    except UnicodeError:
        raise UserError(f"{path}: not UTF-8 text: save it as UTF-8") from None


def _items(path: Path, raw: io.BufferedReader, packed: bool) -> Iterator[tuple[str, Any]]:
    start = raw.peek(512)[:512]
    if start.startswith(b"\x1f\x8b") and not packed:
        with gzip.open(raw) as file:
            yield from _items(path, io.BufferedReader(file), packed=True)
        return
    for begin, what in _UNREAD.items():
        if start.lstrip().startswith(begin):
            raise UserError(f"{path}: {what}")
    if start[257:262] == b"ustar":
        raise UserError(f"{path}: a tar archive: unpack it")
    if start.startswith(b"PAR1"):
        yield from _parquet_rows(path, raw)
        return
    encoding = "utf-16" if start.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    text = io.TextIOWrapper(raw, encoding, newline="")
    number, first = next(((n, line) for n, line in enumerate(text, 1) if line.strip()), (0, ""))
    kinds = {suffix.lower() for suffix in path.suffixes}
    if not first:
        raise UserError(f"{path}: an empty file: {_FORMS}")
    if first.lstrip()[0] in "{[":
        yield from _json_items(path, number, first, text)
    elif kinds & {".csv", ".tsv"} or {"context", "question"} <= set(_columns(first)[0]):
        yield from _table_rows(path, number, first, text)
    else:
        raise UserError(f"{path}: neither JSON nor a table: {_FORMS}")


def _json_items(path: Path, number: int, first: str, text: TextIO) -> Iterator[tuple[str, Any]]:
    """A value to each line where the first one holds a whole one, else one value in all.

    number: of the line `first`, which is the first that is not blank.
    """
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        yield from _spread("", _loaded(path, first + text.read(), number))
        return
    rest = ((n, line) for n, line in enumerate(text, number + 1) if line.strip())
    following = next(rest, None)
    yield from _spread(f"line {number}" if following else "", value)
    for n, line in chain([following], rest) if following else ():
        yield from _spread(f"line {n}", _loaded(path, line.rstrip(), n))


def _spread(where: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The members of a list, or the value."""
    if not isinstance(value, list):
        yield where, value
        return
    for number, each in enumerate(value):
        yield f"{where}[{number}]", each


def _loaded(path: Path, text: str, line: int) -> Any:
    """The JSON value of a text that begins in this line of the file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        what = f"{error.msg} in line {line + error.lineno - 1}, column {error.colno}"
    except ValueError:
        what = f"a number of too many digits in or after line {line}"
    except RecursionError:
        what = f"nested too deeply in or after line {line}"
    raise UserError(f"{path}: not JSON ({what}): {_FORMS}")


def _columns(header: str) -> tuple[list[str], str]:
    """The names in the first line of a table, in lower case, and what stands between them."""
    rows = {mark: next(csv.reader([header], delimiter=mark)) for mark in ",\t;"}
    mark = max(rows, key=lambda each: len(rows[each]))
    return [name.strip().lower() for name in rows[mark]], mark


def _table_rows(path: Path, number: int, first: str, text: TextIO) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(_LONGEST_CELL)
    names, mark = _columns(first)
    reader = csv.DictReader(text, names, delimiter=mark)
    try:
        for row in reader:
            row.pop(None, None)  # cells without a name
            yield f"line {number + reader.line_num}", row
    except csv.Error as error:
        at = number + reader.line_num
        raise UserError(f"{path}: not a table ({error} in line {at}): write it again") from None


def _parquet_rows(path: Path, raw: io.BufferedReader) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        seekable = raw if raw.seekable() else io.BytesIO(raw.read())
        with pyarrow.parquet.ParquetFile(seekable) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    yield f"row {number}", row
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"{path}: not a Parquet file ({reason}): write it again") from None


def usable(key: str, value: Any) -> tuple[str, str]:
    """The text of a record's key, and why a tokenizer cannot take it; one of the two is ""."""
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
