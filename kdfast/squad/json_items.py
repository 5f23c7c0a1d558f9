"""The records of a JSON file, one at a time, so that a file's size does not set the memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from kdfast.errors import UserError

_CHUNK = 1 << 20  # characters read at once; doubled while one record needs more
_BLANK = " \t\r\n"
_NUMERIC = "0123456789.eE+-"
_DECODER = json.JSONDecoder()


class _Cursor:
    """A place in a JSON text of which only the part around the value at hand is in memory."""

    def __init__(self, path: Path, file: TextIO):
        self.path, self.file = path, file
        self.text, self.at, self.passed, self.ended = "", 0, 0, False

    def _more(self) -> None:
        """Drops what has been consumed and reads at least as much again as is left."""
        left = len(self.text) - self.at
        chunk = self.file.read(max(_CHUNK, left))
        self.ended = not chunk
        self.text, self.passed, self.at = self.text[self.at :] + chunk, self.passed + self.at, 0

    def fault(self, what: str, at: int) -> UserError:
        return UserError(
            f"{self.path}: not JSON ({what}, at character {self.passed + at}): give a SQuAD file, "
            "or a list or lines of flat records"
        )

    def peek(self) -> str:
        """The next character that is not blank; "" at the end of the file."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in _BLANK:
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if self.ended:
                return ""
            self._more()

    def take(self, wanted: str) -> str:
        """Consumes the next character, which must be one of `wanted`."""
        found = self.peek()
        if not found or found not in wanted:
            what = f"expected {' or '.join(wanted)}, found {found or 'the end of the file'}"
            raise self.fault(what, self.at)
        self.at += 1
        return found

    def value(self) -> Any:
        """Consumes and decodes one value."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if self.ended:
                    raise self.fault(error.msg, error.pos) from None
            except ValueError as error:  # a number of more digits than Python reads
                raise self.fault(str(error), self.at) from None
            except RecursionError:
                raise self.fault("nested too deeply", self.at) from None
            else:
                # A number may go on behind the end of the buffer, as "-1." or "2e+" would.
                cut = isinstance(value, int | float) and not self.text[end:].strip(_NUMERIC)
                if self.ended or not cut:
                    self.at = end
                    return value
            self._more()

    def items(self) -> Iterator[Any]:
        """The values of the array that starts here."""
        self.take("[")
        if self.peek() == "]":
            self.take("]")
            return
        while True:
            yield self.value()
            if self.take(",]") == "]":
                return

    def members(self) -> Iterator[str]:
        """The keys of the object that starts here; whoever asks consumes each value."""
        self.take("{")
        if self.peek() == "}":
            self.take("}")
            return
        while True:
            key = self.value()
            if not isinstance(key, str):
                raise self.fault("a key that is not a string", self.at)
            self.take(":")
            yield key
            if self.take(",}") == "}":
                return


def json_items(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields (where, record): articles or flat records, in the file's order.

    Accepts `{"data": [...]}`, a bare list, and one object per line. `where` is the record's
    address in the file. Memory: one record and about a megabyte.

    Raises UserError for a text that is not JSON or has none of the three shapes, and OSError or
    UnicodeDecodeError from reading it.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        cursor = _Cursor(path, file)
        first = cursor.peek()
        if path.suffix.lower() in (".jsonl", ".ndjson") and first != "[":
            yield from _lines(cursor)
            return
        if first == "[":
            for number, item in enumerate(cursor.items()):
                yield f"[{number}]", item
        elif first == "{":
            other = {}
            for key in cursor.members():
                if key == "data" and cursor.peek() == "[":
                    other[key] = None
                    for number, item in enumerate(cursor.items()):
                        yield f"data[{number}]", item
                else:
                    other[key] = cursor.value()
            if "question" in other and "data" not in other:
                yield "record 1", other
                yield from _lines(cursor, 2)
                return
            if "data" not in other or other["data"] is not None:
                raise UserError(
                    f'{path}: no list under "data": give a SQuAD file (data, paragraphs, qas), or '
                    "a list or lines of records with id, question, context and answers"
                )
        else:
            raise cursor.fault("no list and no object", cursor.at)
        if cursor.peek():
            raise cursor.fault("text after the end of the value", cursor.at)


def _lines(cursor: _Cursor, number: int = 1) -> Iterator[tuple[str, Any]]:
    """The values that follow one another up to the end of the file."""
    while cursor.peek():
        yield f"record {number}", cursor.value()
        number += 1
