"""The characters of a text that a tokenizer's tokens stand for, and the words they belong to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kdfast.tokenizers.encode import starts_of
from kdfast.tokenizers.template import whole_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class WordOffsets:
    """The tokens of several texts after one another.

    Attributes:
        starts: int64 (texts + 1,). Where each text's tokens begin.
        offsets: int32 (tokens, 2). The characters of each, [first, past the last), as the tokenizer
            gives them: unlike those of Windows they may begin with a blank.
        first, last: int64 (tokens,). The first and the last token of the word that each belongs to.
    """

    starts: np.ndarray
    offsets: np.ndarray
    first: np.ndarray
    last: np.ndarray

    @classmethod
    def encode(cls, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> WordOffsets:
        """The tokens of `texts` and their words. tokenizer: a fast one."""
        with whole_texts(tokenizer) as backend:
            encodings = backend.encode_batch(texts, add_special_tokens=False)
        starts = starts_of([len(encoding.ids) for encoding in encodings])
        tokens = int(starts[-1])
        offsets = np.empty((tokens, 2), dtype=np.int32)
        number = np.empty(tokens, dtype=np.int64)
        for begin, encoding in zip(starts.tolist(), encodings, strict=False):
            part = slice(begin, begin + len(encoding.ids))
            offsets[part] = np.array(encoding.offsets, dtype=np.int32).reshape(-1, 2)
            # Only the special tokens that are put around a pair are of no word.
            number[part] = np.array(encoding.word_ids, dtype=np.int64)
        opens = np.ones(tokens, dtype=bool)
        opens[1:] = number[1:] != number[:-1]
        opens[starts[:-1][starts[:-1] < tokens]] = True
        edges = np.append(np.flatnonzero(opens), tokens)
        run = np.cumsum(opens) - 1
        return cls(starts, offsets, edges[run], edges[run + 1] - 1)

    def characters(
        self, start: np.ndarray, end: np.ndarray, low: np.ndarray, high: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The characters of spans of tokens that are widened to whole words.

        Args:
            start, end: int64 (n,). The first and the last token of each span.
            low, high: int64 (n,). The first and the last token that it may be widened to: those of
                a window, which may hold a part of a word.

        Returns:
            The first character and the one past the last, int32 (n,) each.
        """
        start = np.maximum(self.first[start], low)
        end = np.minimum(self.last[end], high)
        return self.offsets[start, 0], self.offsets[end, 1]
