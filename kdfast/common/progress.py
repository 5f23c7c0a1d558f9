"""Progress bars: on a terminal or in a notebook, none elsewhere."""

from collections.abc import Iterable
from typing import TypeVar

from tqdm.auto import tqdm

Item = TypeVar("Item")


def passing_bar(what: str, unit: str, total: int | None, is_first: bool = True) -> tqdm:
    """A bar of something that takes a while, gone when it is done. is_first: this rank shows it."""
    return tqdm(
        total=total,
        desc=what,
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


def reading_bar(what: str, items: Iterable[Item], is_first: bool) -> Iterable[Item]:
    """A bar of the questions that are read while features are prepared, as `passing_bar`."""
    return tqdm(
        items,
        desc=f"features of {what}",
        unit="question",
        leave=False,
        dynamic_ncols=True,
        disable=None if is_first else True,
    )
