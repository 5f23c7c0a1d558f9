"""Questions with their contexts and answers, read from a file or from a `datasets` dataset."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kdfast.errors import UserError
from kdfast.squad.examples import Answer, Example, Place, locate
from kdfast.squad.forms import article_examples, row_example
from kdfast.squad.json_items import json_items

__all__ = ["Answer", "Example", "Place", "fingerprint", "iter_examples", "locate", "read_examples"]

_FLAT = {"context", "question", "answers"}  # any of these tells a flat record from an article
_FILE_LIKE = re.compile(r"^[/~.]|\\|/.*/|\.(json|jsonl|ndjson|parquet|csv|txt|gz)$", re.IGNORECASE)
# The branch on which the hub keeps CONFIG/SPLIT/*.parquet of every data set, scripts included.
CONVERTED = "refs/convert/parquet"


def read_examples(source: str, *, split: str | None = None) -> list[Example]:
    """Reads all questions of a path or of a hub name; see `iter_examples`."""
    return list(iter_examples(source, split=split))


def iter_examples(source: str, *, split: str | None = None) -> Iterator[Example]:
    """Yields the questions of `source` in order, holding about one article in memory.

    source: a path to official SQuAD 1.1 or 2.0 JSON, or to flat records (json, jsonl, parquet)
    with id, question, context and, optionally, title and answers; or
    `id[@revision][:config[:split]]` of a dataset that `datasets.load_dataset` knows, in the flat
    form. `split` is used where a hub name gives none ("train" if None). At the revision
    refs/convert/parquet, the hub's own conversion of every data set, a config must be given.

    Questions that stand together on equal contexts share one context string.

    Raises UserError for whatever is missing, unreadable or malformed, naming file and record.
    """
    seen: set[str] = set()
    context = ""
    for where, example in _examples(source, split):
        if example.id in seen:
            raise UserError(
                f'{where}: the id "{example.id}" is used twice: give each question its own id'
            )
        seen.add(example.id)
        if example.context == context and example.context is not context:
            example = Example(example.id, example.title, example.question, context, example.answers)
        context = example.context
        yield example
    if not seen:
        raise UserError(f"{source}: no question in it: give a file with at least one")


def fingerprint(source: str, *, split: str | None = None) -> str:
    """The sha256, in hex, of what `source` holds, without parsing it: of the bytes of a file, or
    of the `datasets` fingerprint of a hub name. Raises UserError where there is no such source."""
    path = _path(source)
    if path is None:
        dataset = _load_dataset(source, split)
        return hashlib.sha256(f"{dataset._fingerprint} {len(dataset)}".encode()).hexdigest()
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise _unreadable(path, error) from None
    return digest.hexdigest()


def _path(source: str) -> Path | None:
    """The file that `source` names; None where it can only be a name on a hub."""
    try:
        path = Path(source).expanduser()
        if path.is_dir() or Path(source.split(":")[0]).is_dir():
            return None
        if path.exists():
            return path
    except (OSError, ValueError, RuntimeError) as error:  # no rights, no such user, too long
        raise UserError(f"{source!r}: not a path that can be read ({error}): check it") from None
    named = source.replace(f"@{CONVERTED}", "")
    if not named or _FILE_LIKE.search(named) or named.count(":") > 2:
        raise UserError(f"{source!r}: no such file: give a .json, .jsonl or .parquet file")
    return None


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be read ({error.strerror or error}): check its rights")


def _load_dataset(source: str, split: str | None) -> Any:
    place, config, part = (*source.split(":"), "", "")[:3]
    name, _, revision = (place, "", "") if Path(place).is_dir() else place.partition("@")
    part = part or split or "train"
    try:
        import datasets

        if revision == CONVERTED:
            files = f"hf://datasets/{place}/{config}/{part}/*.parquet"
            return datasets.load_dataset("parquet", data_files=files, split="train")
        return datasets.load_dataset(name, config or None, split=part, revision=revision or None)
    except Exception as error:  # the hub's client raises a dozen kinds, some of them private
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(
            f"{source!r}: no such file here, and no dataset of that name could be loaded "
            f"({type(error).__name__}: {reason}): check name, configuration, split and network, "
            "or give a local .json, .jsonl or .parquet file"
        ) from None


def _examples(source: str, split: str | None) -> Iterator[tuple[str, Example]]:
    """Yields (where, example), where being what an error message calls the record."""
    path = _path(source)
    if path is None:
        rows = enumerate(_load_dataset(source, split))
        yield from (
            (f"{source}: row {n}", row_example(f"{source}: row {n}", row)) for n, row in rows
        )
        return
    try:
        if path.suffix.lower() == ".parquet":
            for number, row in enumerate(_parquet_rows(path)):
                where = f"{path}: row {number}"
                yield where, row_example(where, row)
            return
        for place, item in json_items(path):
            where = f"{path}: {place}"
            if isinstance(item, dict) and "paragraphs" not in item and not _FLAT.isdisjoint(item):
                yield where, row_example(where, item)
            else:
                yield from article_examples(where, item)
    except OSError as error:
        raise _unreadable(path, error) from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text: save it as UTF-8") from None


def _parquet_rows(path: Path) -> Iterator[dict]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except pyarrow.ArrowInvalid as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a Parquet file ({reason}): write it again") from None
