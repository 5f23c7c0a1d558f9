"""The windows of a source: what determines them, and how one process or several make them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from kdfast.common import heartbeat
from kdfast.common.errors import UserError
from kdfast.common.files import spool
from kdfast.common.folders import remove, subfolder
from kdfast.common.progress import reading_bar
from kdfast.config import WindowSettings
from kdfast.data.cache import ARRAYS, FORMAT, Kinds
from kdfast.data.chunks import WHOLE, ChunkFolder, Shard
from kdfast.data.examples import Example
from kdfast.data.read import fingerprint, iter_examples
from kdfast.data.tally import COUNTED, Tally
from kdfast.data.windowing import WindowBuilder
from kdfast.data.windows import Parts, check_settings
from kdfast.tokenizers.template import Template, tokenizer_key

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from kdfast.common.ranks import Ranks

CONTENT = 4  # part of Windows.key: raise it when other windows are made of the same source


@dataclass
class Features:
    """The windows of a source, which are made when they are asked for."""

    source: str
    split: str | None
    content: str  # fingerprint of the source
    key: str
    builder: WindowBuilder
    is_shown: bool = True  # whether this process has the bar
    kinds: ClassVar[dict[str, Kinds]] = ARRAYS

    @classmethod
    def of(
        cls,
        source: str,
        tokenizer: PreTrainedTokenizerFast,
        settings: WindowSettings,
        split: str | None,
    ) -> Features:
        """Raises UserError for a bad source, tokenizer or setting."""
        template = Template.learn(tokenizer)
        check_settings(settings, template)
        sum_of = fingerprint(source, split=split)
        content = [CONTENT, sum_of, tokenizer_key(tokenizer), vars(settings)]
        key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return cls(source, split, sum_of, key, WindowBuilder(tokenizer, template, settings))

    def share(self, folder: Path, ranks: Ranks) -> None:
        self.encode(ChunkFolder.of(folder), WHOLE, ranks)

    def arrays(self, folder: Path, partial: Path) -> Parts:
        chunks = ChunkFolder.of(folder)
        if not chunks.path.is_dir():
            with spool(partial) as self.builder.spool:
                yield from self.builder.arrays(self._examples(self.builder.tally))
            return
        self.encode(chunks, WHOLE, None)  # what others have left
        yield from chunks.joined(self.builder.tally)

    def encode(self, chunks: ChunkFolder, shard: Shard, ranks: Ranks | None) -> None:
        """Makes the chunks of a share that are not there, or this rank's part of them."""
        mine = shard
        if ranks is not None:
            self.is_shown, mine = ranks.is_first, shard.split(ranks.rank, ranks.count)
        subfolder(chunks.path.parent)
        subfolder(chunks.path)
        if chunks.missing(mine) == []:
            return
        count, tally = 0, Tally()
        with spool(chunks.path) as self.builder.spool:
            for number, chunk in self.builder.chunks(
                self._examples(tally), lambda n: mine.has(n) and not chunks.file(n).is_file()
            ):
                heartbeat.report(f"chunk {number} of the features")
                if chunk is not None:
                    chunks.save(number, chunk)
                count = number + 1
        self._check_source(chunks)
        chunks.finish(count, tally, shard.count)

    def header(self) -> dict[str, Any]:
        self._check_source()
        return header_of(self.key, self.builder)

    def _check_source(self, chunks: ChunkFolder | None = None) -> None:
        """Raise UserError where the source was replaced since its fingerprint was taken."""
        if fingerprint(self.source, split=self.split) != self.content:
            if chunks:
                remove(chunks.path)
            raise UserError(
                f"{self.source} was changed while it was read: run again when nothing writes it."
            )

    def _examples(self, tally: Tally) -> Iterable[Example]:
        examples = iter_examples(self.source, split=self.split, tally=tally)
        return reading_bar(self.source, examples, self.is_shown)


def header_of(key: str, builder: WindowBuilder) -> dict[str, Any]:
    first = builder.tally.first
    return {
        "key": key,
        "format": FORMAT,
        "settings": vars(builder.settings),
        "pad_token_id": builder.template.pad_token_id,
        "uses_token_types": builder.template.uses_token_types,
        "counts": builder.tally.counts,
        # In an order that does not depend on who counted.
        "first": {what: first[what] for what in COUNTED if what in first},
    }
