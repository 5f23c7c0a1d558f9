"""Words of a text, what a vocabulary's words are, and a text with some of its words replaced."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

WORD = re.compile(r"\w+(?:['’]\w+)*")


def words_of(text: str) -> list[re.Match[str]]:
    """The runs of letters and digits in a text; "don't" is one word."""
    return list(WORD.finditer(text))


def is_other(proposal: str, word: str) -> bool:
    """Whether a proposal may stand for a word: another one, and letters for letters."""
    return proposal.casefold() != word.casefold() and proposal.isalpha() == word.isalpha()


def recased(proposal: str, word: str) -> str:
    """A proposal with the capitals of the word that it replaces."""
    if len(word) > 1 and word.isupper():
        return proposal.upper()
    return proposal[:1].upper() + proposal[1:] if word[:1].isupper() else proposal


def vocabulary_words(tokenizer: PreTrainedTokenizerFast) -> dict[int, str]:
    """The entries of a vocabulary that are words as they stand in a sentence: id -> word.

    Such a word, behind a blank, is encoded as this one token. The rule holds for WordPiece ("##ing"
    is none), byte-level BPE and SentencePiece alike.
    """
    ids = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    decoded = zip(ids, tokenizer.batch_decode([[each] for each in ids]), strict=True)
    texts = {each: text.strip() for each, text in decoded if WORD.fullmatch(text.strip())}
    encoded = tokenizer([f" {text}" for text in texts.values()], add_special_tokens=False)
    pairs = zip(texts.items(), encoded["input_ids"], strict=True)
    return {each: text for (each, text), tokens in pairs if tokens == [each]}


class Proposed(NamedTuple):
    """A text, its words, and what may stand for each of them."""

    text: str
    words: Sequence[re.Match[str]]
    proposals: Sequence[Sequence[str]]


@dataclass
class Edited:
    """A text with some words replaced.

    Attributes:
        text: What it is now.
        edits: (start, end) in the old text of each word that was replaced, and by how many
            characters what follows has moved; in their order.
    """

    text: str
    edits: list[tuple[int, int, int]] = field(default_factory=list)

    def place(self, start: int, end: int) -> int | None:
        """Where old characters start to end now start; None where one of them was replaced."""
        moved = 0
        for edit_start, edit_end, shift in self.edits:
            if edit_start >= end:
                break
            if edit_end > start:
                return None
            moved = shift
        return start + moved


def replace_words(source: Proposed, probability: float, draw: np.random.Generator) -> Edited:
    """Replace each word that has proposals with `probability` by one of them, drawn evenly."""
    text, words, proposals = source
    chances = draw.random((len(words), 2))
    parts, edits, end, moved = [], [], 0, 0
    for word, choices, (chance, which) in zip(words, proposals, chances, strict=True):
        if not choices or chance >= probability:
            continue
        new = recased(choices[int(which * len(choices))], word[0])
        parts += [text[end : word.start()], new]
        end = word.end()
        moved += len(new) - len(word[0])
        edits.append((word.start(), end, moved))
    return Edited("".join([*parts, text[end:]]), edits)
