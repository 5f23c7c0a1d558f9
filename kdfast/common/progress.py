"""Lines, and progress bars: these on a terminal or in a notebook, none elsewhere."""

import sys
from collections.abc import Iterable
from typing import TextIO, TypeVar

from tqdm.auto import tqdm

from kdfast.common.errors import printable

Item = TypeVar("Item")


def print_line(text: str, file: TextIO | None = None) -> None:
    """Print one line, above a progress bar where there is one. file: standard output if None.

    What a terminal would not print is escaped, line ends too: no id or title moves the cursor, or
    looks like a line of the program's own.
    """
    file = file or sys.stdout
    tqdm.write(printable(text), file=file)
    file.flush()


def passing_bar(what: str, unit: str, total: int | None, is_first: bool = True) -> tqdm:
    """A bar of something that takes a while, gone when it is done. is_first: this rank shows it."""
    return tqdm(
        total=total,
        desc=printable(what),
        unit=unit,
        leave=False,
        dynamic_ncols=True,
        disable=None if is_first else True,
    )


def training_bar(done: int, total: int, is_first: bool) -> tqdm:
    """The bar of the run, of which 80 columns have room for what `progress_line` says."""
    return tqdm(
        total=total,
        initial=done,
        desc="train",
        dynamic_ncols=True,
        bar_format="{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}",
        disable=None if is_first else True,
    )


def answering_bar(total: int, is_shown: bool) -> tqdm:
    """The bar of kdfast.predict, which counts fractions of questions."""
    return tqdm(
        total=total,
        disable=None if is_shown else True,
        bar_format="{l_bar}{bar}| {n:.0f}/{total_fmt} questions [{elapsed}<{remaining}]",
    )


def reading_bar(what: str, items: Iterable[Item], is_first: bool) -> Iterable[Item]:
    """A bar of the questions that are read while features are prepared, as `passing_bar`."""
    return tqdm(
        items,
        desc=printable(f"features of {what}"),
        unit="question",
        leave=False,
        dynamic_ncols=True,
        disable=None if is_first else True,
    )
