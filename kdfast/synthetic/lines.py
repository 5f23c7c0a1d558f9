"""A JSONL file that is made in parts, and goes on after a kill."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kdfast.common.errors import UserError
from kdfast.common.files import append, cut, open_file, refuse_link
from kdfast.common.folders import make_writable, rename, sync
from kdfast.common.locks import locked

MADE_BY = "made_by"  # of a line: what it was made of, and by which part


class Lines:
    """Lines in FILE.part, which is named FILE when all are there.

    Each line holds, as `made_by`, the number of the part that wrote it and a key of all that it
    depends on, so that a part that a kill cut short is found and made again.
    """

    def __init__(self, path: Path, key: str):
        self.path = path
        self.key = key
        self.part = path.with_name(f"{path.name}.part")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from the file. Raises UserError where it is there, or held."""
        refuse_link(self.path)
        if self.path.exists():
            raise UserError(f"--output {self.path} is there: delete it, or name another file.")
        make_writable(self.path.absolute().parent)
        with locked(self.path.with_name(f".{self.path.name}.lock")) as is_ours:
            if not is_ours:
                raise UserError(f"--output {self.path} is being written by another process.")
            yield

    def next_part(self) -> int:
        """The part to go on with: the last one that has lines, which may be short of some.

        Its lines are cut off.

        Raises UserError where the lines are of other settings or data, or none of this class.
        """
        refuse_link(self.part)
        if not self.part.exists():
            return 0
        size = begin = number = 0
        with open_file(self.part) as file:
            for line in file:
                if size and not line.endswith(b"\n"):
                    break  # torn by a kill
                try:
                    made_by = json.loads(line)[MADE_BY]
                    at, key = made_by["part"], made_by["key"]
                except (ValueError, TypeError, KeyError, RecursionError):
                    raise UserError(
                        f"{self.part} is damaged, or not of kdfast.augment: delete it, or name "
                        "another --output."
                    ) from None
                if key != self.key:
                    raise UserError(
                        f"{self.part} was begun with other settings, models or data: delete it, "
                        "or name another --output."
                    )
                if at != number:
                    number, begin = at, size
                size += len(line)
        cut(self.part, begin)
        return number

    def add(self, part: int, lines: Iterable[dict[str, Any]]) -> None:
        """Append the lines of a part."""
        made_by = {MADE_BY: {"key": self.key, "part": part}}
        text = "".join(json.dumps(line | made_by, ensure_ascii=False) + "\n" for line in lines)
        with append(self.part) as file:
            file.write(text)

    def finish(self) -> None:
        """Give the file its name."""
        append(self.part).close()  # of no line at all
        sync(self.part)
        rename(self.part, self.path)
