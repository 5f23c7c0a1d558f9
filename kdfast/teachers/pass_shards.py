"""Shares of a teacher's pass that processes make at different times, each in a folder of its own.

All shares have the micro-batches of one pass over all windows, so that the cache that they are
joined to has the bits of that pass. A share is done by tasks that know of no others: no file is
written by two of them.
"""

from __future__ import annotations

import json
import uuid
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdfast.common import heartbeat
from kdfast.common.errors import UserError
from kdfast.common.files import (
    is_damage,
    read_bytes,
    read_json_object,
    refuse_link,
    write_bytes,
    write_json,
)
from kdfast.common.folders import fresh_folder, remove, rename, subfolder
from kdfast.data.chunks import Shard
from kdfast.data.windows import Windows
from kdfast.teachers.cache import (
    HEADER,
    MADE_ON,
    PROGRESS_FILE,
    SHARDS,
    Source,
    environments_in,
    header_of,
    map_logits,
    map_progress,
)
from kdfast.tokenizers.encode import ragged, starts_of

SUM = "crc32"  # in the header of the shares: of the rest of it
OF_SHARDS = ("shards", SUM)


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

    def sound(self, folder: Path, header: dict[str, Any], windows: Windows) -> np.ndarray:
        """uint32: the sum of each micro-batch that `folder` has as it was written; 0 of others.

        header: of the pass that it should be of.
        """
        nothing = np.zeros(len(self.batches), np.uint32)
        try:
            logits = map_logits(folder, self.tokens, "r")
            sums = np.frombuffer(read_bytes(folder / PROGRESS_FILE), np.uint32).copy()
        except Exception as error:  # numpy raises many kinds for a damaged header
            if not is_damage(error):
                raise
            return nothing
        if sums.shape != nothing.shape:
            return nothing
        for number in np.flatnonzero(sums):
            heartbeat.report(f"the sum of micro-batch {number} of the teacher's pass")
            rows = logits[self.positions(windows, self.batches[number])]
            if sum_of(rows, header) != sums[number]:
                sums[number] = 0
        return sums

    def keep_sound(self, folder: Path, header: dict[str, Any], windows: Windows) -> bool:
        """Let what is damaged be done again. False where nothing is left."""
        sums = self.sound(folder, header, windows)
        if sums.any():
            write_bytes(folder / PROGRESS_FILE, sums.tobytes())
        return bool(sums.any())


def sum_of(rows: np.ndarray, header: dict[str, Any]) -> int:
    """A sum of a micro-batch's logits and of the pass that they are of: never 0."""
    others = (MADE_ON, "tokens", *OF_SHARDS)
    identity = {name: header[name] for name in sorted(header) if name not in others}
    return zlib.crc32(rows.tobytes(), zlib.crc32(json.dumps(identity).encode())) or 1


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
        return cls(cache_dir / "teacher" / f"{source.key}{SHARDS}", source)

    @property
    def finished(self) -> bool:
        """Whether the cache of the pass is there."""
        return self.path.with_suffix("").is_dir()

    @property
    def header(self) -> dict[str, Any]:
        """The header; empty where no share has begun. Raises UserError for one that is damaged."""
        path = self.path / HEADER
        header: dict[str, Any] = {}
        try:
            header = json.loads(read_bytes(path))
            is_whole = header.pop(SUM, None) == _header_sum(header, self.source)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            if not is_damage(error):
                raise
            is_whole = False
        if not is_whole:
            raise UserError(
                f"{path} is damaged or of an earlier version: delete {self.path}, and make all "
                "parts again."
            )
        return header

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
            write_json(made / HEADER, {**header, SUM: _header_sum(header, self.source)})
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

    def folder(self, number: int) -> Path:
        return self.path / str(number)

    def has_begun(
        self, number: int, share: Share, header: dict[str, Any], windows: Windows
    ) -> bool:
        """Whether the share's folder is one that it can go on with; what is damaged is done again.

        header: that of all shares.
        """
        wanted = header | {"tokens": share.tokens}
        del wanted["shards"]
        found = read_json_object(self.folder(number) / HEADER)
        found.pop(MADE_ON, None)
        return found == wanted and share.keep_sound(self.folder(number), header, windows)

    def missing(self, batches: list[np.ndarray], count: int) -> list[int]:
        """The shares, of `count`, that are not done."""
        return [each for each in range(count) if not self._is_done(each, batches[each::count])]

    def _is_done(self, number: int, batches: list[np.ndarray]) -> bool:
        with suppress(OSError, ValueError):
            sums = np.frombuffer(read_bytes(self.folder(number) / PROGRESS_FILE), np.uint32)
            return len(sums) == len(batches) and bool(sums.all())
        return not batches

    def copy(self, partial: Path, batches: list[np.ndarray], windows: Windows, count: int) -> None:
        """Take what `count` shares have done over into the folder of the whole pass.

        What is damaged is left out.
        """
        logits = map_logits(partial, len(windows.input_ids), "r+")
        sums, copied = map_progress(partial, len(batches)), {}
        whole, header = Share.whole(batches, windows), read_json_object(partial / HEADER)
        for number, own, indices, rows in self._finished(batches, windows, count):
            heartbeat.report(f"micro-batch {number}, which another process made")
            if not sums[number]:
                logits[whole.positions(windows, indices)] = rows[own]
                copied[number] = sum_of(rows[own], header)
        heartbeat.report("the logits that other processes made", heartbeat.LONG)
        save_progress(logits, sums, copied)
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
            share = Share.of(batches[shard::count], windows)
            sums = share.sound(self.folder(shard), self.header, windows)
            if not sums.any():
                continue
            rows = map_logits(self.folder(shard), share.tokens, "r")
            for place in np.flatnonzero(sums):
                indices = share.batches[place]
                yield shard + place * count, share.positions(windows, indices), indices, rows


def _header_sum(header: dict[str, Any], source: Source) -> int:
    return zlib.crc32(json.dumps([header, source.key]).encode())


def save_progress(logits: np.memmap, sums: np.memmap, done: dict[int, int]) -> None:
    """Enter the sums of micro-batches that are done, after their logits are on the disk."""
    logits.flush()
    sums[list(done)] = list(done.values())
    sums.flush()
