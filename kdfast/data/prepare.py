"""From a source and a tokenizer to Windows, through a cache that is keyed by content."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdfast.common.errors import UserError
from kdfast.common.files import fault_in, sync, write_json, write_sums
from kdfast.config import WindowSettings
from kdfast.data.cache import (
    ARRAYS,
    FORMAT,
    HEADER,
    ArrayFile,
    Kinds,
    cache_folder,
    damaged,
    narrowest,
)
from kdfast.data.examples import Example
from kdfast.data.read import fingerprint, iter_examples
from kdfast.data.windowing import WindowBuilder
from kdfast.data.windows import Windows, check_settings, open_windows
from kdfast.tokenizers.template import Template, tokenizer_key

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CONTENT = 4  # part of Windows.key: raise it when other windows are made of the same source
# Up to this size together, the files of a cache are read once and compared with their sums when it
# is opened: some seconds. Larger ones are taken as they are.
VERIFIED_BYTES = 4 * 2**30
# Arrays of Windows by name, each of them in parts.
Parts = Generator[dict[str, np.ndarray], None, None]
USUAL = WindowSettings()


def prepare_windows(
    source: str,
    tokenizer: PreTrainedTokenizerFast,
    settings: WindowSettings = USUAL,
    *,
    cache_dir: Path | str,
    split: str | None = None,
    progress: Callable[[Iterable[Example]], Iterable[Example]] = iter,
) -> Windows:
    """The windows of all questions of a source, from the cache if they are there.

    Windows of a context of n tokens begin at its tokens 0, doc_stride, 2 doc_stride, … and end with
    the first one that reaches token n.

    The cache is a folder of cache_dir/features, named by a sha256 over the content of the source,
    the tokenizer and the settings; a hit maps files and parses nothing. It is written under another
    name, made durable and then renamed, by one process at a time: others that want it wait.

    Args:
        source: a file or a dataset, see `iter_examples`.
        tokenizer: a fast one.
        settings: how the windows are cut.
        cache_dir: made where it is not there.
        split: of a dataset whose name gives none.
        progress: what shows how many questions have been read, such as tqdm. Only called where
            there is no cache yet.

    Raises:
        UserError: for a bad source, tokenizer or setting, for a damaged cache, and for a folder
            that cannot be written or is full.
    """
    template = Template.learn(tokenizer)
    check_settings(settings, template)
    content = [CONTENT, fingerprint(source, split=split), tokenizer_key(tokenizer), vars(settings)]
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    builder = WindowBuilder(tokenizer, template, settings)

    def arrays(folder: Path) -> Parts:
        with tempfile.TemporaryFile(dir=folder) as builder.spool:
            examples = iter_examples(source, split=split, tally=builder.tally)
            yield from builder.arrays(progress(examples))

    return cached_windows(cache_dir, key, arrays, lambda: _header(key, builder))


def cached_windows(
    cache_dir: Path | str,
    key: str,
    arrays: Callable[[Path], Parts],
    header: Callable[[], dict[str, Any]],
    more: dict[str, Kinds] | None = None,
) -> Windows:
    """The windows of this key in the cache, written first where they are not there.

    Args:
        cache_dir: made where it is not there.
        key: names the content.
        arrays: called with the folder that is being written.
        header: called when all arrays are written.
        more: arrays besides those of Windows, and their types.

    Raises:
        UserError: for a damaged cache, and for a folder that cannot be written or is full.
    """
    folder = cache_folder(cache_dir, key)
    kinds = {**ARRAYS, **(more or {})}
    if folder.is_dir():
        if fault := fault_in(folder, _files(kinds), VERIFIED_BYTES):
            raise damaged(folder, fault)
        return open_windows(folder, key)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_name(f"{folder.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.is_dir():  # unless another process has written it by now
                _write(folder, kinds, arrays, header)
    except OSError as error:
        raise UserError(
            f"--cache_dir {cache_dir}: features cannot be written there "
            f"({error.strerror or error}): make room or give another folder"
        ) from None
    return open_windows(folder, key)


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
    return Windows(joined, _header("", builder))


def _header(key: str, builder: WindowBuilder) -> dict[str, Any]:
    return {
        "key": key,
        "format": FORMAT,
        "settings": vars(builder.settings),
        "pad_token_id": builder.template.pad_token_id,
        "uses_token_types": builder.template.uses_token_types,
        "counts": builder.tally.counts,
        "first": builder.tally.first,
    }


def _files(arrays: Iterable[str]) -> tuple[str, ...]:
    return (HEADER, *(f"{name}.npy" for name in arrays))


def _write(
    folder: Path,
    kinds: dict[str, Kinds],
    arrays: Callable[[Path], Parts],
    header: Callable[[], dict[str, Any]],
) -> None:
    """Writes all files next to `folder`, then renames; the caller holds the key's lock."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    partial.mkdir()
    try:
        with ExitStack() as stack:
            files = {
                name: stack.enter_context(closing(ArrayFile(partial / f"{name}.npy", each)))
                for name, each in kinds.items()
            }
            for part in stack.enter_context(closing(arrays(partial))):
                for name, array in part.items():
                    files[name].append(array)
            for file in files.values():
                file.finish()
        write_json(partial / HEADER, header())
        write_sums(partial, _files(kinds))
        sync(partial)
        partial.rename(folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
