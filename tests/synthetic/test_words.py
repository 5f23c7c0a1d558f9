"""Words, what a vocabulary's words are, and where characters are after a replacement."""

import numpy as np
import pytest

from kdfast.synthetic.words import (
    Edited,
    Proposed,
    is_other,
    recased,
    replace_words,
    vocabulary_words,
    words_of,
)
from tests import small_tokenizers


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm_roberta", "deberta_v2"])
def test_words_of_a_vocabulary_are_those_that_stand_alone(family):
    tokenizer = small_tokenizers.of_family(family)
    words = vocabulary_words(tokenizer)
    assert len(words) > 20
    for number, word in list(words.items())[:200]:
        # Between other words, where a piece such as "##ing" would not come out of a blank.
        ids = tokenizer(f"a {word} a", add_special_tokens=False)["input_ids"]
        assert number in ids and tokenizer.decode([number]).strip() == word
    pieces = tokenizer.convert_ids_to_tokens(list(words))
    assert not any(piece.startswith("##") for piece in pieces)
    if family != "bert":
        assert all(piece[0] in "Ġ▁" for piece in pieces)


def test_capitals_and_kinds():
    assert recased("cat", "Dog") == "Cat" and recased("cat", "DOG") == "CAT"
    assert recased("cat", "dog") == "cat" and recased("McCoy", "dog") == "McCoy"
    assert recased("cat", "I") == "Cat"
    assert is_other("cat", "dog") and not is_other("Dog", "dog")
    assert is_other("1914", "1990") and not is_other("year", "1990")


def test_characters_keep_their_place():
    text = "The Dog, a pet, didn't see 12 dogs. Übel!"
    words = words_of(text)
    assert [word[0] for word in words] == [
        *("The", "Dog", "a", "pet", "didn't", "see", "12", "dogs", "Übel")
    ]
    proposals = [["Some"], ["elephant"], [], ["x"], ["did"], [], ["7"], ["cats"], ["bad"]]
    new = replace_words(Proposed(text, words, proposals), 1.0, np.random.default_rng(1))
    assert new.text == "Some Elephant, a x, did see 7 cats. Bad!"
    for unchanged in (", a", " see ", "!"):
        start = text.index(unchanged)
        at = new.place(start, start + len(unchanged))
        assert new.text[at : at + len(unchanged)] == unchanged
    assert new.place(0, 3) is None and new.place(4, 10) is None and new.place(11, 12) is None
    assert replace_words(Proposed(text, words, proposals), 0.0, np.random.default_rng(1)) == Edited(
        text
    )


def test_the_share_of_replaced_words():
    text = "word " * 4000
    words = words_of(text)
    new = replace_words(
        Proposed(text, words, [["other", "third"]] * 4000), 0.4, np.random.default_rng(2)
    )
    assert 0.37 < len(new.edits) / 4000 < 0.43  # four standard deviations
    assert 0.4 < new.text.count("third") / len(new.edits) < 0.6
