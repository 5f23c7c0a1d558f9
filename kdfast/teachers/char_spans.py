"""Which characters of a text each of its tokens stands for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from kdfast.data.windows import Windows
from kdfast.tokenizers.encode import ragged, starts_of

# Texts are searched all at once: each has a range of keys of its own, wider than any text.
_WIDE = 1 << 32


@dataclass(frozen=True)
class CharSpans:
    """The characters of the tokens of several texts after one another.

    starts int64 (texts + 1,): where each text's tokens begin. first, past int64 (tokens,): a
    token's characters, [first, past) of its text; an empty one stands between two characters.
    """

    starts: np.ndarray
    first: np.ndarray
    past: np.ndarray

    @cached_property
    def text(self) -> np.ndarray:
        """Each token's text: int64 (tokens,)."""
        return np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))

    @cached_property
    def solid(self) -> np.ndarray:
        """The tokens that are not empty: int64, rising."""
        return np.flatnonzero(self.past > self.first)

    @cached_property
    def holders(self) -> CharSpans:
        """Those tokens alone, which hold characters."""
        starts = np.searchsorted(self.solid, self.starts)
        return CharSpans(starts, self.first[self.solid], self.past[self.solid])

    # Running maxima keep keys sorted where a token begins or ends before an earlier one.
    @cached_property
    def _begins(self) -> np.ndarray:
        return np.maximum.accumulate(_WIDE * self.text + self.first)

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.maximum.accumulate(_WIDE * self.text + self.past)

    def ending_after(self, text: np.ndarray, char: np.ndarray) -> np.ndarray:
        """The first token of each text that ends after its `char`, or the one past its last."""
        return np.searchsorted(self._ends, _WIDE * text + char, side="right")

    def beginning_after(self, text: np.ndarray, char: np.ndarray) -> np.ndarray:
        """The first token of each text that begins after its `char`, or the one past its last."""
        return np.searchsorted(self._begins, _WIDE * text + char, side="right")

    def nearest_held(self, text: np.ndarray, char: np.ndarray, *, later: bool) -> np.ndarray:
        """The nearest character that a token of the text holds, of two the `later` or the earlier.

        No token may be empty, and no text of `text` without tokens.
        """
        first, past = self.starts[text], self.starts[text + 1]
        token = self.ending_after(text, char)
        above = np.maximum(char, self.first[np.minimum(token, past - 1)])
        below = self._ends[np.maximum(token - 1, first)] - _WIDE * text - 1
        up, down = above - char, char - below
        rise = (token < past) & ((token == first) | (up < down) | (later & (up == down)))
        return np.where(rise, above, below)


def spans_of(
    windows: Windows, part: Literal["question", "context"], texts: np.ndarray
) -> CharSpans:
    """The tokens that `windows` keeps of the questions, or of the contexts, numbered `texts`."""
    starts = getattr(windows, f"{part}_token_start")
    lengths = starts[texts + 1] - starts[texts]
    at = ragged(starts[texts], lengths)
    first = getattr(windows, f"{part}_char_start")[at].astype(np.int64)
    return CharSpans(starts_of(lengths), first, first + getattr(windows, f"{part}_char_count")[at])
