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
from typing import Any

import numpy as np

from kdfast.common.errors import UserError
from kdfast.common.files import fault_in, sync, write_json, write_sums
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
from kdfast.data.windowing import Cutter
from kdfast.data.windows import Windows, open_windows
from kdfast.tokenizers.template import Template, tokenizer_key

CONTENT = 4  # part of Windows.key: raise it when other windows are made of the same source
# Up to this size together, the files of a cache are read once and compared with their sums when it
# is opened: some seconds. Larger ones are taken as they are.
VERIFIED_BYTES = 4 * 2**30
# Arrays of Windows by name, each of them in parts.
Parts = Generator[dict[str, np.ndarray], None, None]


def prepare_windows(
    source: str,
    tokenizer: Any,
    *,
    max_seq_length: int = 384,
    max_query_length: int = 64,
    doc_stride: int = 128,
    cache_dir: Path | str,
    split: str | None = None,
    progress: Callable[[Iterable[Example]], Iterable[Example]] = iter,
) -> Windows:
    """Windows of all questions of `source` (see records.iter_examples), from the cache if there.

    A question is cut at max_query_length tokens. Windows of a context of n tokens begin at its
    tokens 0, doc_stride, 2 doc_stride, … and end with the first one that reaches token n.

    progress: what shows how far the questions of a source without a cache have been read, such as
    tqdm.

    The cache is a folder of cache_dir/features, named by a sha256 over the content of the source,
    the tokenizer and the settings; a hit maps files and parses nothing. It is written under another
    name, made durable and then renamed, by one process at a time: others that want it wait.

    Raises UserError for a bad source, tokenizer or setting, for a damaged cache, and for a folder
    that cannot be written or is full.
    """
    settings = {
        "max_seq_length": max_seq_length,
        "max_query_length": max_query_length,
        "doc_stride": doc_stride,
    }
    template = Template.learn(tokenizer)
    _check(settings, template)
    parts = [CONTENT, fingerprint(source, split=split), tokenizer_key(tokenizer), settings]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    cutter = Cutter(tokenizer, template, **settings)

    def arrays(folder: Path) -> Parts:
        with tempfile.TemporaryFile(dir=folder) as cutter.spool:
            examples = iter_examples(source, split=split, tally=cutter.tally)
            yield from cutter.arrays(progress(examples))

    return cached_windows(cache_dir, key, arrays, lambda: _header(key, settings, cutter))


def cached_windows(
    cache_dir: Path | str,
    key: str,
    arrays: Callable[[Path], Parts],
    header: Callable[[], dict[str, Any]],
    more: dict[str, Kinds] | None = None,
) -> Windows:
    """The windows of this key in the cache, written first where they are not there.

    arrays: called with the folder that is being written. header: called when all is written.
    more: arrays besides those of Windows, and their types. Raises UserError for a damaged cache,
    and for a folder that cannot be written or is full.
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
            if not folder.is_dir():  # unless another process wrote it meanwhile
                _write(folder, kinds, arrays, header)
    except OSError as error:
        raise UserError(
            f"--cache_dir {cache_dir}: features cannot be written there "
            f"({error.strerror or error}): make room or give another folder"
        ) from None
    return open_windows(folder, key)


def windows_of(
    examples: Iterable[Example],
    tokenizer: Any,
    *,
    max_seq_length: int = 384,
    max_query_length: int = 64,
    doc_stride: int = 128,
    overlap: int | None = None,
) -> Windows:
    """As `prepare_windows`, for examples at hand, in memory and without a cache (key "").

    overlap: instead of doc_stride, the context tokens that two neighbouring windows share; half of
    those that fit, where a question leaves no room for more. One that leaves none at all raises
    UserError.
    """
    settings = {
        "max_seq_length": max_seq_length,
        "max_query_length": max_query_length,
        "doc_stride": doc_stride,
    }
    template = Template.learn(tokenizer)
    if overlap is None:
        _check(settings, template)
    cutter = Cutter(tokenizer, template, **settings, overlap=overlap)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in ARRAYS}
    for arrays in cutter.arrays(examples):
        for name, array in arrays.items():
            parts[name].append(array)
    joined = {}
    for name, kinds in ARRAYS.items():
        whole = np.concatenate(parts.pop(name) or [np.empty(0, dtype=np.int64)])
        joined[name] = whole.astype(narrowest(whole, kinds))
    return Windows(joined, _header("", settings, cutter))


def _check(settings: dict[str, int], template: Template) -> None:
    """Refuses settings under which some token of a context would be in no window."""
    for name, value in settings.items():
        if value < 1:
            raise UserError(f"--{name} {value}: give a positive number")
    room = settings["max_seq_length"] - settings["max_query_length"] - template.size
    if room < 1:
        raise UserError(
            f"--max_seq_length {settings['max_seq_length']}: a question of --max_query_length "
            f"{settings['max_query_length']} and {template.size} special tokens leave no room for "
            "a context: change one of them"
        )
    if settings["doc_stride"] > room:
        raise UserError(
            f"--doc_stride {settings['doc_stride']}: more than the {room} tokens that "
            f"--max_seq_length {settings['max_seq_length']} leaves for the context beside a "
            f"question of --max_query_length {settings['max_query_length']} and "
            f"{template.size} special tokens, so that windows would leave gaps: change one of them"
        )


def _header(key: str, settings: dict[str, int], cutter: Cutter) -> dict[str, Any]:
    return {
        "key": key,
        "format": FORMAT,
        "settings": settings,
        "pad_token_id": cutter.template.pad_token_id,
        "uses_token_types": cutter.template.uses_token_types,
        "counts": cutter.tally.counts,
        "first": cutter.tally.first,
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
            files = {name: ArrayFile(partial / f"{name}.npy", kinds[name]) for name in kinds}
            for each in files.values():
                stack.callback(lambda each=each: each.file.close())
            for part in stack.enter_context(closing(arrays(partial))):
                for name, array in part.items():
                    files[name].append(array)
            for each in files.values():
                each.finish()
        write_json(partial / HEADER, header())
        write_sums(partial, _files(kinds))
        sync(partial)
        partial.rename(folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
