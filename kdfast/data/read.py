"""Questions with their contexts and answers, read from a file or from a `datasets` dataset."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kdfast.common.errors import UserError
from kdfast.data.examples import Example
from kdfast.data.parsing import Parser
from kdfast.data.records import file_items
from kdfast.data.tally import Tally

_FILE_LIKE = re.compile(
    r"^[/~.]|\\|/.*/|\.(json|jsonl|ndjson|parquet|csv|tsv|txt|gz)$", re.IGNORECASE
)
_FORMS = "give a .json, .jsonl, .csv, .tsv or .parquet file, or such a one with .gz"
# The branch on which the hub keeps CONFIG/SPLIT/*.parquet of every data set, scripts included.
CONVERTED = "refs/convert/parquet"


def read_examples(
    source: str, *, split: str | None = None, tally: Tally | None = None
) -> list[Example]:
    """Reads all questions of a path or of a hub name; see `iter_examples`."""
    return list(iter_examples(source, split=split, tally=tally))


def iter_examples(
    source: str, *, split: str | None = None, tally: Tally | None = None
) -> Iterator[Example]:
    """Yields the questions of a file or a dataset in order.

    Every id is given once: a question without one has its number in the file, from 0, and one whose
    id an earlier question has gets it with "#2", and so on. Questions that follow one another on
    equal contexts share one context string.

    Args:
        source: a file of any form that docs/data.md lists; or `id[@revision][:config[:split]]` of
            a dataset that `datasets.load_dataset` knows, with a question a row. At the revision
            refs/convert/parquet, the hub's own conversion of every dataset, give a config.
        split: used where a dataset's name gives none; "train" if None.
        tally: counts what a user should hear of the questions, and those that cannot be used, by
            the keys of tally.UNREAD.

    Raises:
        UserError: for a source that is missing, unreadable or of a form that is not read, and where
            none of its questions can be used.
    """
    parser = Parser(source, Tally() if tally is None else tally)
    found = False
    try:
        for where, item in source_items(source, split):
            for example in parser.examples(where, item):
                found = True
                yield example
    except RecursionError:
        raise UserError(f"{source}: nested too deeply: give {_FORMS}") from None
    if not found:
        why = parser.fault or "give a file with at least one"
        raise UserError(f"{source}: no question in it that can be used: {why}")


def check_ids(source: str, examples: Iterable[Example]) -> None:
    """Raises UserError for a question without an id of its own, by which answers are kept."""
    lacking = [example.id for example in examples if example.numbered]
    if lacking:
        raise UserError(
            f"{source}: {len(lacking)} questions have no id, such as number {lacking[0]}, and an "
            "evaluation keeps answers by it: give each question an id"
        )


def fingerprint(source: str, *, split: str | None = None) -> str:
    """The sha256 of a source's content, which is not parsed.

    Args:
        source, split: as `iter_examples` takes them.

    Returns:
        In hex: of a file the sum of its bytes, of a dataset that of its `datasets` fingerprint.

    Raises:
        UserError: where there is no such source.
    """
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
        folder = next((each for each in (path, Path(source.split(":")[0])) if each.is_dir()), None)
        if folder is not None:
            raise _is_folder(folder)
        if path.exists():
            return path
    except (OSError, RuntimeError) as error:  # no rights, no such user, too long
        raise UserError(f"{source!r}: not a path that can be read ({error}): check it") from None
    named = source.replace(f"@{CONVERTED}", "")
    if not named or _FILE_LIKE.search(named) or named.count(":") > 2:
        raise UserError(f"{source!r}: no such file: {_FORMS}")
    return None


def _is_folder(folder: Path) -> UserError:
    if any((folder / name).exists() for name in ("dataset_dict.json", "state.json")):
        return UserError(
            f"{folder}: a folder of datasets.save_to_disk: write it with Dataset.to_parquet, and "
            "name that file"
        )
    return UserError(f"{folder}: a folder: name a file in it")


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be read ({error.strerror or error}): check its rights")


def _load_dataset(source: str, split: str | None) -> Any:
    place, config, part = (*source.split(":"), "", "")[:3]
    name, _, revision = place.partition("@")
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
            f"or {_FORMS.replace('a .json', 'a local .json')}"
        ) from None


def source_items(source: str, split: str | None = None) -> Iterator[tuple[str, Any]]:
    """The records of a source, not yet parsed, each with what a message calls it."""
    path = _path(source)
    if path is not None:
        yield from file_items(path)
        return
    for number, row in enumerate(_load_dataset(source, split)):
        yield f"row {number}", row
