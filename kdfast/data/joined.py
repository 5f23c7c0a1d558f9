"""The windows of several files as those of one, for training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kdfast.data.cache import PickledByPath
from kdfast.data.windows import Windows
from kdfast.tokenizers.encode import starts_of

# Of Windows: arrays with an entry for each window that are the same in any company.
OF_WINDOWS = ("lengths", "prefix", "start_positions", "end_positions", "trainable")


class Joined(PickledByPath):
    """Arrays, or texts, one behind the other, to be read from; they stay where they are.

    An index is an int, a slice or an array of ints, from 0; `np.array` copies all of it.
    """

    def __init__(self, parts: Sequence[Any]):
        self.parts = list(parts)
        self.starts = starts_of([len(each) for each in parts])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, places: Any) -> Any:
        if isinstance(places, slice):
            places = np.arange(*places.indices(len(self)))
        number = np.searchsorted(self.starts, places, side="right") - 1
        if np.ndim(places) == 0:
            return self.parts[number][int(places - self.starts[number])]
        first = self.parts[0]
        found = np.empty((*places.shape, *first.shape[1:]), np.result_type(*self.parts))
        for each in np.unique(number):
            here = number == each
            found[here] = self.parts[each][places[here] - self.starts[each]]
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.concatenate(self.parts, dtype=dtype)


class JoinedWindows(Windows):
    """The windows of `parts`, one behind the other: what training reads of them.

    There are no characters of tokens, and no contexts: answers cannot be found in it. It has no
    key, as `parts` have.
    """

    def __init__(self, parts: Sequence[Windows]):
        first = parts[0]
        for name in OF_WINDOWS:
            setattr(self, name, np.concatenate([getattr(each, name) for each in parts]))
        self.window_start = starts_of(self.lengths)
        asked = starts_of([len(each.question_ids) for each in parts])
        self.question = np.concatenate(
            [each.question + begin for each, begin in zip(parts, asked, strict=False)]
        )
        for name in ("input_ids", "question_ids"):
            setattr(self, name, Joined([getattr(each, name) for each in parts]))
        self.pad_token_id, self.uses_token_types = first.pad_token_id, first.uses_token_types
        self.settings = first.settings


def joined(parts: Sequence[Windows]) -> Windows:
    """The windows of `parts` together; those of one part as they are."""
    return parts[0] if len(parts) == 1 else JoinedWindows(parts)


def joined_arrays(parts: Sequence[np.ndarray]) -> Any:
    """Arrays one behind the other, not copied; a single one as it is."""
    return parts[0] if len(parts) == 1 else Joined(parts)
