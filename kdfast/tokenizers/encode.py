"""Several texts as tokens after one another, with the characters that each token stands for."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tokenizers import Tokenizer

_BLANK, _MARK = 1, 2


def ragged(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The indices of many runs after one another: starts[0], starts[0] + 1, … int64."""
    ends = np.cumsum(lengths, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(total)


def starts_of(lengths: np.ndarray | Sequence[int]) -> np.ndarray:
    """Offsets of runs of the given lengths: int64, one more than lengths."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


@dataclass
class Tokens:
    """The tokens of several texts after one another."""

    starts: np.ndarray  # int64 (texts + 1,), where each text's tokens begin
    ids: np.ndarray  # int32 (tokens,)
    offsets: np.ndarray  # int32 (tokens, 2), [first, past the last) character of each

    @classmethod
    def encode(cls, backend: Tokenizer, texts: list[str], limit: int | None = None) -> Tokens:
        """The first `limit` tokens of each text, or all.

        backend: a `tokenizers` object, its truncation and padding off; it uses threads of its own.
        """
        encodings = backend.encode_batch(texts, add_special_tokens=False)
        ids = [np.array(e.ids[:limit], dtype=np.int32) for e in encodings]
        pairs = [np.array(e.offsets[:limit], dtype=np.int32).reshape(-1, 2) for e in encodings]
        starts = starts_of([len(i) for i in ids])
        empty = np.empty(0, dtype=np.int32)
        return cls(
            starts, np.concatenate([empty, *ids]), np.concatenate([empty.reshape(0, 2), *pairs])
        )

    def exact(self, texts: list[str]) -> Tokens:
        """Corrects the characters where tokenizers are loose about them, in place.

        The first character moves past blanks, which some count to a word's token (a token of
        blanks alone keeps them). The end moves past combining marks that no token holds, since
        they were composed or stripped before the text was split: "e" and an accent are one.
        """
        code = np.frombuffer("".join(texts).encode("utf-32-le"), dtype=np.uint32)
        table, n = _kinds(), len(code)
        kind = table[np.minimum(code, len(table) - 1)]
        base = np.repeat(starts_of([len(t) for t in texts])[:-1], np.diff(self.starts))
        first, past = (self.offsets + base[:, None]).T
        after_blanks = _next(kind != _BLANK)[first]
        first = np.where(after_blanks < past, after_blanks, first)
        opened = np.bincount(first, minlength=n + 1) - np.bincount(past, minlength=n + 1)
        held = np.cumsum(opened)[:n] > 0
        # A text's marks belong to its own letters: no context begins with a loose mark of another.
        loose = (kind == _MARK) & ~held
        begins = starts_of([len(t) for t in texts])[:-1]
        loose[begins[begins < n]] = False
        solid = _next(~loose)
        self.offsets = np.stack([first, np.where(past > first, solid[past], past)], 1)
        self.offsets = (self.offsets - base[:, None]).astype(np.int32)
        return self


def _next(wanted: np.ndarray) -> np.ndarray:
    """For each place, and the one past the end, the first place from there on that is wanted."""
    n = len(wanted)
    places = np.append(np.where(wanted, np.arange(n), n), n)
    return np.minimum.accumulate(places[::-1])[::-1]


@cache
def _kinds() -> np.ndarray:
    """What each code point below 0x10000 is: a blank, a combining mark, or something else (0);
    the last entry also speaks for all code points above."""
    kinds = np.zeros(0x10000, dtype=np.uint8)
    for c in range(0xFFFF):
        if chr(c).isspace():
            kinds[c] = _BLANK
        elif unicodedata.category(chr(c))[0] == "M":
            kinds[c] = _MARK
    return kinds
