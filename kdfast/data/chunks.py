"""Features in chunks, the windows of some thousand questions each, which are joined in order.

Several processes share a preparation so: each reads the whole source and tokenises its chunks. How
the source is cut into chunks depends on nothing else, so that it does not matter who makes which.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from kdfast.common.errors import UserError
from kdfast.common.files import is_damage, new_file, open_file
from kdfast.common.folders import sync
from kdfast.data.cache import ARRAYS, narrowest
from kdfast.data.tally import COUNTED, Tally

SOURCE_FILE = "source.npz"
# Arrays of places and numbers, and what of the chunks before is added to them.
_SHIFTS = {
    "window_start": "tokens",
    "question": "questions",
    "question_token_start": "question_tokens",
    "context_token_start": "context_tokens",
    "question_id_start": "question_id_bytes",
}
_SIZES = ("questions", "contexts", "windows", "tokens", "context_tokens", "question_tokens")


@dataclass(frozen=True)
class Shard:
    """The share of one process: every `count`-th chunk, from `number` on, which counts from 0."""

    number: int = 0
    count: int = 1

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def has(self, chunk: int) -> bool:
        """Whether a chunk is of this share."""
        return chunk % self.count == self.number

    def split(self, number: int, count: int) -> Shard:
        """The share that one of `count` processes has in this share."""
        return Shard(self.number + self.count * number, self.count * count)


WHOLE = Shard()


def parse_shard(text: str) -> Shard:
    """The share that --shard i/n names. Raises UserError for anything else."""
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if not found:
        raise UserError(f"--shard is {text!r}: give a part and how many there are, such as 0/8.")
    number, count = int(found[1]), int(found[2])
    if number >= count:
        last = f" to {count - 1}/{count}" if count > 1 else ""
        raise UserError(f"--shard is {text}: parts count from 0: give 0/{max(count, 1)}{last}.")
    return Shard(number, count)


class Chunk(NamedTuple):
    """The windows of successive questions.

    first: the number of the first question. arrays: by the names of Windows; places and numbers
    count from 0 in each chunk, but for those of the contexts. tally: of these questions.
    """

    first: int
    arrays: dict[str, np.ndarray]
    tally: Tally


class Joiner:
    """Makes the arrays of Windows out of successive chunks. tally: counts over all of them."""

    def __init__(self, tally: Tally):
        self.tally = tally
        self._id_bytes = 0

    def heads(self) -> dict[str, np.ndarray]:
        """What stands before the arrays of the first chunk."""
        self.tally.counts.update(dict.fromkeys((*_SIZES, *COUNTED, "unanswerable"), 0))
        zero = np.zeros(1, dtype=np.int64)
        return {name: zero for name in _SHIFTS if name != "question"}

    def join(self, chunk: Chunk) -> dict[str, np.ndarray]:
        """The arrays of the next chunk, as they stand in the whole."""
        before = self.tally.counts | {"question_id_bytes": self._id_bytes}
        shifted = {name: before[of] + chunk.arrays[name] for name, of in _SHIFTS.items()}
        self.tally.merge(chunk.tally)
        self._id_bytes += len(chunk.arrays["question_id_bytes"])
        return chunk.arrays | shifted


@dataclass(frozen=True)
class ChunkFolder:
    """Chunks on the disk, next to the cache that they will be, each whole or not there.

    `source.npz` is written by each process that has read the source to its end. It holds how many
    chunks there are, what was counted while reading, and by how many the work was last shared. All
    files name their folder, and a .npz has a sum of what is in it.
    """

    path: Path

    @classmethod
    def of(cls, cache: Path) -> ChunkFolder:
        """Those of the cache in a folder."""
        return cls(cache.with_name(f"{cache.name}.chunks"))

    def file(self, number: int) -> Path:
        return self.path / f"{number:06}.npz"

    def save(self, number: int, chunk: Chunk) -> None:
        """Writes a chunk, aside and then renamed."""
        arrays = {
            name: values.astype(narrowest(values, ARRAYS[name]))
            for name, values in chunk.arrays.items()
        }
        self._write(self.file(number), {"first": chunk.first}, chunk.tally, arrays)

    def load(self, number: int) -> Chunk:
        """Reads a chunk. Raises UserError for one that is damaged."""
        path = self.file(number)
        try:
            facts, arrays = self._read(path, ARRAYS)
            return Chunk(facts["first"], arrays, Tally(facts["counts"], facts["ids"]))
        except Exception as error:  # numpy and zipfile raise a dozen kinds
            if not is_damage(error):
                raise
            raise UserError(
                f"{path}: a damaged part of features ({error}): delete it and make its part again"
            ) from None

    def finish(self, count: int, tally: Tally, shards: int) -> None:
        """Says how many chunks there are, and what was counted while the source was read."""
        self._write(self.path / SOURCE_FILE, {"chunks": count, "shards": shards}, tally, {})

    def _write(
        self, path: Path, facts: dict[str, Any], tally: Tally, arrays: dict[str, np.ndarray]
    ) -> None:
        facts = {**facts, "folder": self.path.name, "counts": tally.counts, "ids": tally.first}
        with self._written(path) as file:
            np.savez(file, facts=np.frombuffer(json.dumps(facts).encode(), np.uint8), **arrays)  # type: ignore[arg-type]

    def _read(
        self, path: Path, names: Iterable[str]
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Raises some exception where a file is damaged, or of another folder."""
        with open_file(path) as file, np.load(file, allow_pickle=False) as held:
            facts = json.loads(held["facts"].tobytes())
            if facts.get("folder", self.path.name) != self.path.name:  # earlier versions: none
                raise ValueError(f"it is of {facts['folder']}")
            return facts, {name: held[name] for name in names}

    def _source(self) -> dict[str, Any]:
        """What the file of the source holds; nothing where there is none, or it is damaged."""
        try:
            return self._read(self.path / SOURCE_FILE, ())[0]
        except Exception as error:  # as in load; the source is read once more then
            if not is_damage(error):
                raise
            return {}

    @contextmanager
    def _written(self, path: Path) -> Iterator[BinaryIO]:
        """A file with a name of its own until it is whole, as others may write the same one."""
        with new_file(path, aside=uuid.uuid4().hex) as file:
            yield file
        sync(self.path)

    def joined(self, tally: Tally) -> Generator[dict[str, np.ndarray], None, None]:
        """Yields the arrays of Windows, in parts, of chunks that are all there.

        tally: counts what the processes that made them have counted. Raises UserError for a chunk
        that is damaged, or cut otherwise.
        """
        joiner = Joiner(tally)
        yield joiner.heads()
        facts = self._source()
        for number in range(facts["chunks"]):
            chunk = self.load(number)
            if chunk.first != tally.counts["questions"]:
                raise UserError(
                    f"{self.file(number)}: made by another version of kdfast: delete its folder, "
                    "and make all parts again."
                )
            yield joiner.join(chunk)
        tally.merge(Tally(facts["counts"], facts["ids"]))

    def missing(self, shard: Shard = WHOLE) -> list[int] | None:
        """The chunks of a share that are not there; None where nobody knows yet how many."""
        count = self._source().get("chunks")
        if count is None:
            return None
        mine = filter(shard.has, range(count))
        return [number for number in mine if not self.file(number).is_file()]

    def missing_shards(self) -> list[str] | None:
        """The shares, as --shard names them, of which a chunk is missing; None where all are."""
        shards = self._source().get("shards")
        missing = self.missing()  # by now another process may have joined and deleted them
        if shards is None or missing is None:
            return None
        return [f"{each}/{shards}" for each in sorted({number % shards for number in missing})]
