"""From a source and a tokenizer to Windows, through a cache that is keyed by content."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from kdfast.common import heartbeat
from kdfast.common.errors import UserError, cause_of, remedy
from kdfast.common.files import fault_in, write_json, write_sums
from kdfast.common.folders import fresh_folder, remove, rename, subfolder, sync
from kdfast.common.locks import lock
from kdfast.config import WindowSettings
from kdfast.data.cache import (
    ARRAYS,
    HEADER,
    ArrayFile,
    Kinds,
    cache_folder,
    damaged,
    narrowest,
)
from kdfast.data.chunks import ChunkFolder, Shard
from kdfast.data.examples import Example
from kdfast.data.features import Features, header_of
from kdfast.data.windowing import WindowBuilder
from kdfast.data.windows import Parts, Windows, check_settings, open_windows
from kdfast.tokenizers.template import Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from kdfast.common.ranks import Ranks

# Up to this size together, the files of a cache are read once and compared with their sums when it
# is opened: some seconds. Larger ones are taken as they are.
VERIFIED_BYTES = 4 * 2**30
USUAL = WindowSettings()


class Made(Protocol):
    """What a cache of windows is made of.

    Attributes:
        key: names the content.
        kinds: the arrays, and their types.
    """

    key: str

    @property
    def kinds(self) -> dict[str, Kinds]: ...

    def share(self, folder: Path, ranks: Ranks) -> None:
        """Called by all of several ranks, with the folder that the cache will have."""

    def arrays(self, folder: Path, partial: Path) -> Parts:
        """Called by one process. partial: the folder that is being written."""

    def header(self) -> dict[str, Any]:
        """Called when all arrays are written."""


def prepare_windows(
    source: str,
    tokenizer: PreTrainedTokenizerFast,
    settings: WindowSettings = USUAL,
    *,
    cache_dir: Path | str,
    split: str | None = None,
    ranks: Ranks | None = None,
) -> Windows:
    """The windows of all questions of a source, from the cache if they are there.

    Windows of a context of n tokens begin at its tokens 0, doc_stride, 2 doc_stride, … and end with
    the first one that reaches token n.

    The cache is a folder of cache_dir/features, named by a sha256 over the content of the source,
    the tokenizer and the settings; a hit maps files and parses nothing. It is written under another
    name, made durable and then renamed, by one process at a time: others that want it wait. Several
    ranks each tokenise a share, and one of them joins the shares (chunks.py); so does a process
    alone that finds shares there. The files are the same, however many made them.

    Args:
        source: a file or a dataset, see `iter_examples`.
        tokenizer: a fast one.
        settings: how the windows are cut.
        cache_dir: made where it is not there.
        split: of a dataset whose name gives none.
        ranks: all of them must call this.

    Raises:
        UserError: for a bad source, tokenizer or setting, for a damaged cache, and for a folder
            that cannot be written or is full.
    """
    return cached_windows(cache_dir, Features.of(source, tokenizer, settings, split), ranks)


def prepare_shard(
    cache_dir: Path | str, features: Features, shard: Shard, ranks: Ranks
) -> Windows | None:
    """Makes a share of the chunks of features, and the cache if no other share is missing.

    Returns the windows, or None where a share is missing. Raises UserError as `prepare_windows`.
    """
    folder = cache_folder(cache_dir, features.key)
    chunks = ChunkFolder.of(folder)
    if ranks.any(not folder.is_dir()):
        # Another one that had all shares may join and delete them meanwhile.
        with _writing(cache_dir):
            try:
                features.encode(chunks, shard, ranks)
            except FileNotFoundError:
                if not folder.is_dir():
                    raise
        ranks.barrier()
        if ranks.any(chunks.missing() != [] and not folder.is_dir()):
            return None
    windows = cached_windows(cache_dir, features, ranks)
    if ranks.is_first:
        with suppress(OSError):
            remove(chunks.path)  # what was written after that
    return windows


def cached_windows(cache_dir: Path | str, made: Made, ranks: Ranks | None = None) -> Windows:
    """The windows of a cache, written first where they are not there.

    Args:
        cache_dir: made where it is not there.
        made: what the cache is made of.
        ranks: all of them must call this.

    Raises:
        UserError: for a damaged cache, and for a folder that cannot be written or is full.
    """
    folder = cache_folder(cache_dir, made.key)
    several = ranks if ranks is not None and ranks.count > 1 else None
    is_writer = several is None or several.is_first
    with _writing(cache_dir), ExitStack() as stack:
        is_needed = is_writer and not folder.is_dir()
        if is_needed:
            subfolder(folder.parent)
            stack.enter_context(lock(folder.with_name(f"{folder.name}.lock")))
            is_needed = not folder.is_dir()  # unless another process has written it by now
        is_made = is_needed if several is None else several.any(is_needed)
        if several is not None and is_made:
            made.share(folder, several)
            several.barrier()
        if is_needed:
            _write(folder, made)
        if several is not None:
            several.barrier()
    if not is_made and (fault := fault_in(folder, _files(made.kinds), VERIFIED_BYTES)):
        raise damaged(folder, fault)
    return open_windows(folder, made.key)


@contextmanager
def _writing(cache_dir: Path | str) -> Iterator[None]:
    """Inside, an OSError is a UserError that says that features cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--cache_dir {cache_dir}: features cannot be written there "
            f"({cause_of(error)}): {remedy(error.errno) or 'give another folder'}"
        ) from None


def windows_of(
    examples: Iterable[Example],
    tokenizer: PreTrainedTokenizerFast,
    settings: WindowSettings = USUAL,
    *,
    overlap: int | None = None,
) -> Windows:
    """As `prepare_windows`, for examples at hand, in memory and without a cache (key "").

    Args:
        examples: in the order that the windows have.
        tokenizer: a fast one.
        settings: how the windows are cut.
        overlap: in place of settings.doc_stride, the context tokens that two neighbouring windows
            share; half of those that fit, where a question leaves no room for more.

    Raises:
        UserError: for a tokenizer or a setting that is refused, and where a question leaves no
            token to its context.
    """
    template = Template.learn(tokenizer)
    if overlap is None:
        check_settings(settings, template)
    builder = WindowBuilder(tokenizer, template, settings, overlap)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in ARRAYS}
    for arrays in builder.arrays(examples):
        for name, array in arrays.items():
            parts[name].append(array)
    joined: dict[str, np.ndarray] = {}
    for name, kinds in ARRAYS.items():
        whole = np.concatenate(parts.pop(name) or [np.empty(0, dtype=np.int64)])
        joined[name] = whole.astype(narrowest(whole, kinds))
    return Windows(joined, header_of("", builder))


def _files(arrays: Iterable[str]) -> tuple[str, ...]:
    return (HEADER, *(f"{name}.npy" for name in arrays))


def _write(folder: Path, made: Made) -> None:
    """Writes all files next to `folder`, then renames; the caller holds the key's lock."""
    partial = fresh_folder(folder.with_name(f"{folder.name}.partial"))
    try:
        with ExitStack() as stack:
            files = {
                name: stack.enter_context(closing(ArrayFile(partial / f"{name}.npy", each)))
                for name, each in made.kinds.items()
            }
            parts = stack.enter_context(closing(made.arrays(folder, partial)))
            for number, part in enumerate(parts):
                heartbeat.report(f"part {number} of the features")
                for name, array in part.items():
                    files[name].append(array)
            for file in files.values():
                file.finish()
        heartbeat.report("the sums of the features", heartbeat.LONG)
        write_json(partial / HEADER, made.header())
        write_sums(partial, _files(made.kinds))
        sync(partial)
        rename(partial, folder)
    except BaseException:
        with suppress(OSError):
            remove(partial)
        raise
    with suppress(OSError):
        remove(ChunkFolder.of(folder).path)
