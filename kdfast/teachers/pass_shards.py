"""Shares of a teacher's pass that processes make at different times, each in a folder of its own.

All shares have the micro-batches of one pass over all windows, so that the cache that they are
joined to has the bits of that pass. A share is done by tasks that know of no others: no file is
written by two of them.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdfast.common import heartbeat
from kdfast.common.errors import UserError
from kdfast.common.files import open_file, read_json_object, refuse_link, write_json
from kdfast.common.folders import fresh_folder, remove, rename, subfolder
from kdfast.data.chunks import Shard
from kdfast.data.windows import Windows
from kdfast.teachers.cache import (
    HEADER,
    MADE_ON,
    PROGRESS_FILE,
    Source,
    environments_in,
    header_of,
    map_logits,
    map_progress,
)
from kdfast.tokenizers.encode import ragged, starts_of


@dataclass(frozen=True)
class Share:
    """A part of the micro-batches of a pass, and where its logits stand in its own file.

    batches: window numbers. starts: int64 (W,), where the tokens of each of its windows begin.
    """

    batches: list[np.ndarray]
    starts: np.ndarray
    tokens: int

    @classmethod
    def of(cls, batches: list[np.ndarray], windows: Windows) -> Share:
        indices = np.concatenate([np.empty(0, dtype=np.int64), *batches])
        ends = starts_of(windows.lengths[indices])
        starts = np.full(len(windows), -1)
        starts[indices] = ends[:-1]
        return cls(batches, starts, int(ends[-1]))

    @classmethod
    def whole(cls, batches: list[np.ndarray], windows: Windows) -> Share:
        """All of a pass, in the order of the windows."""
        return cls(batches, windows.window_start[:-1], len(windows.input_ids))

    def positions(self, windows: Windows, indices: np.ndarray) -> np.ndarray:
        """int64: the places of all tokens of these windows, window after window."""
        return ragged(self.starts[indices], windows.lengths[indices])


@dataclass(frozen=True)
class PassShards:
    """The folders of the shares of one pass, below `path`.

    header.json says whose pass it is, how it is cut, and into how many shares. Share i is in the
    folder i, which has the files of a pass. All of it goes once the pass's cache is `finished`, at
    any time for who works on a share: so the header is read once, and handed on.
    """

    path: Path
    source: Source

    @classmethod
    def of(cls, cache_dir: Path, source: Source) -> PassShards:
        return cls(cache_dir / "teacher" / f"{source.key}.shards", source)

    @property
    def finished(self) -> bool:
        """Whether the cache of the pass is there."""
        return self.path.with_suffix("").is_dir()

    @property
    def header(self) -> dict[str, Any]:
        """The header; empty where no share has begun."""
        return read_json_object(self.path / HEADER)

    def begin(self, tokens: int, shard: Shard, cut: dict[str, Any]) -> dict[str, Any]:
        """The header: that of the share which came first. Raises UserError for another count.

        cut: how the pass is cut, where this share is the first.
        """
        refuse_link(self.path)
        header = self.header
        if not header:
            header = {**header_of(self.source, tokens), **cut, "shards": shard.count}
            subfolder(self.path.parent)
            made = fresh_folder(self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex}"))
            write_json(made / HEADER, header)
            try:
                rename(made, self.path)  # fails where another one was first: it is not empty
            except OSError:
                remove(made)
                header = self.header
                if not header:
                    raise
        if header["shards"] != shard.count:
            raise UserError(
                f"--shard {shard.number}/{shard.count}: this pass was begun in {header['shards']} "
                f"parts: go on with those, or delete {self.path} to begin again."
            )
        return header

    def remove(self) -> None:
        """Delete all shares."""
        with suppress(OSError):  # others may do so too
            remove(self.path)

    def folder(self, number: int) -> Path:
        return self.path / str(number)

    def has_begun(self, number: int, share: Share, header: dict[str, Any]) -> bool:
        """Whether the share's folder is one that it can go on with. header: that of all shares."""
        wanted = header | {"tokens": share.tokens}
        del wanted["shards"]
        found = read_json_object(self.folder(number) / HEADER)
        found.pop(MADE_ON, None)
        return found == wanted

    def missing(self, batches: list[np.ndarray], count: int) -> list[int]:
        """The shares, of `count`, that are not done."""
        return [each for each in range(count) if not self._is_done(each, batches[each::count])]

    def _is_done(self, number: int, batches: list[np.ndarray]) -> bool:
        return not batches or self._done(number) == b"\1" * len(batches)

    def _done(self, number: int) -> bytes:
        try:
            with open_file(self.folder(number) / PROGRESS_FILE) as file:
                return file.read()
        except OSError:
            return b""

    def copy(self, partial: Path, batches: list[np.ndarray], windows: Windows, count: int) -> None:
        """Take what `count` shares have done over into the folder of the whole pass."""
        logits = map_logits(partial, len(windows.input_ids), "r+")
        done = map_progress(partial, len(batches))
        whole, copied = Share.whole(batches, windows), []
        for number, own, indices, rows in self._finished(batches, windows, count):
            heartbeat.report(f"micro-batch {number}, which another process made")
            if not done[number]:
                logits[whole.positions(windows, indices)] = rows[own]
                copied.append(number)
        heartbeat.report("the logits that other processes made", heartbeat.LONG)
        logits.flush()
        done[copied] = 1
        done.flush()
        header = read_json_object(partial / HEADER)
        made_on = environments_in(header)
        for shard in range(count):
            places = environments_in(read_json_object(self.folder(shard) / HEADER))
            made_on += [each for each in places if each not in made_on]
        write_json(partial / HEADER, {**header, MADE_ON: made_on})

    def _finished(
        self, batches: list[np.ndarray], windows: Windows, count: int
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
        """Of each micro-batch that is done: number, places in the logits, windows, the logits."""
        for shard in range(count):
            share, done = Share.of(batches[shard::count], windows), self._done(shard)
            if len(done) != len(share.batches) or not any(done):
                continue
            rows = map_logits(self.folder(shard), share.tokens, "r")
            for place, indices in enumerate(share.batches):
                if done[place]:
                    number = shard + place * count
                    yield number, share.positions(windows, indices), indices, rows
