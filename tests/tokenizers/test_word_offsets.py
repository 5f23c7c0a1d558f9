"""Words against what the tokenizers library says of each of its encodings."""

import numpy as np
import pytest

from kdfast.tokenizers.word_offsets import WordOffsets
from tests.data.made_up import random_examples
from tests.small_tokenizers import FAMILIES, of_family

TEXTS = [
    *(example.context for example in random_examples(4, 12, 1)),
    "unknowable",
    "unknowable",  # one word each: neither goes on in the other
    " \n ",
    "The </s> head [SEP] is <mask> Rollo [MASK].",
]


@pytest.mark.parametrize("family", FAMILIES)
def test_words_are_those_of_the_library(family):
    tokenizer = of_family(family)
    words = WordOffsets.encode(tokenizer, TEXTS)
    for number, text in enumerate(TEXTS):
        encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        begin, end = words.starts[number : number + 2]
        assert end - begin == len(encoding.ids)
        assert words.offsets[begin:end].tolist() == [list(pair) for pair in encoding.offsets]
        for token, word in enumerate(encoding.word_ids):
            first, past = encoding.word_to_tokens(word)
            assert (words.first[begin + token], words.last[begin + token]) == (
                begin + first,
                begin + past - 1,
            )


def test_characters_of_whole_words_and_of_what_a_window_holds_of_them():
    words = WordOffsets.encode(of_family("roberta"), ["a", "the unknowable people"])
    begin = int(words.starts[1])
    middle = begin + 3  # a piece of the second word
    low, high = int(words.first[middle]), int(words.last[middle])
    assert low < middle < high
    spans = [(middle, middle, 0, 99), (middle, middle, middle, 99), (middle, middle, 0, middle)]
    first, past = words.characters(*np.array(spans).T)
    inner = words.offsets[middle].tolist()
    assert first.tolist() == [4, inner[0], 4]
    assert past.tolist() == [14, 14, inner[1]]
