"""Generated questions with their verdicts, in a JSONL file that grows paragraph by paragraph."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kdfast.common.errors import UserError
from kdfast.common.files import append, open_file, refuse_link, write_bytes
from kdfast.common.folders import make_writable
from kdfast.common.forms import list_of, mapping, number, optional, record, unicode, whole
from kdfast.common.locks import locked

VERDICT = record(
    {"answer": unicode, "start": whole(), "over_null": number(), "over_second": number()},
    others=False,
)
PAIR = record({"paragraph": whole(), "verdict": VERDICT}, others=False)
CANDIDATE = record(
    {"question": unicode, "answer": unicode, "verdict": VERDICT, "pair": optional(PAIR)}
)
LINE = record(
    {
        "paragraph": whole(),
        "by": unicode,
        "dropped": mapping(whole()),
        "candidates": list_of(CANDIDATE),
    }
)


class CandidateFile:
    """What has been generated and judged, a line for each paragraph, whatever is kept of it.

    The first line holds a key of all that the others depend on.
    """

    def __init__(self, output: Path, key: str):
        self.output, self.key = output, key
        self.path = output.with_name(f"{output.name}.candidates.jsonl")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from both files.

        Raises UserError where that is done already, and where they cannot be written.
        """
        for path in (self.output, self.path):
            refuse_link(path)
            if path.exists() and not path.is_file():
                raise UserError(f"--output {path} is a folder, a pipe or a device: name a file.")
        if self.output.exists() and not self.path.exists():
            raise UserError(
                f"--output {self.output} is there, and {self.path.name}, which it would be made "
                "of, is not: name another file, or delete it."
            )
        make_writable(self.output.absolute().parent)
        with locked(self.output.with_name(f".{self.output.name}.lock")) as is_ours:
            if not is_ours:
                raise UserError(f"--output {self.output} is being written by another process.")
            yield

    def load(self, paragraphs: int) -> dict[int, dict[str, Any]]:
        """The lines that are there, by paragraph; begins the file where there is none.

        A last line that a kill cut short is dropped. Raises UserError where the file is of other
        settings or damaged.
        """
        head = json.dumps({"key": self.key}).encode() + b"\n"
        lines = []
        if self.path.exists():
            with open_file(self.path) as file:
                lines = file.readlines()
        whole_lines = lines[:-1] if lines and not lines[-1].endswith(b"\n") else lines
        if not whole_lines:
            write_bytes(self.path, head)
            return {}
        if whole_lines[0] != head:
            raise UserError(
                f"{self.path} was begun with other settings, models or data: delete it, or name "
                "another --output."
            )
        found = {}
        for at, line in enumerate(whole_lines[1:], 2):
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = None
            if LINE(value) is not None or value["paragraph"] >= paragraphs:
                raise UserError(
                    f"{self.path} is damaged in line {at}: delete the line, and it is made again."
                )
            found[value["paragraph"]] = value
        if len(whole_lines) < len(lines):
            write_bytes(self.path, b"".join(whole_lines))
        return found

    def add(self, line: dict[str, Any]) -> None:
        """Append the line of a paragraph."""
        with append(self.path) as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
