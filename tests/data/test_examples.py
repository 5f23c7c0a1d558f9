"""The place of an answer in its context: each step of the search, and their order."""

import random

import pytest

from kdfast.data.examples import NEARBY, Answer, Lost, Place, first_place, locate


def place(context, text, start, **more):
    """What is found, as text before it and the text itself."""
    found = locate(context, Answer(text, start))
    if isinstance(found, Lost):
        return found
    return found.start, context[found.start : found.end], found.moved


def test_the_stated_place_less_blanks():
    context = "in  1066 , they came"
    assert context[2:9] == "  1066 "
    assert locate(context, Answer("  1066 ", 2)) == Place(4, 8, False)
    assert locate(context, Answer("1066", 4)) == Place(4, 8, False)
    # The blanks are in the text but the place is that of the first letter.
    assert locate(context, Answer("  1066", 4)) == Place(4, 8, False)
    # There, other occurrences do not matter.
    assert locate("Rollo and Rollo came", Answer("Rollo", 10)) == Place(10, 15, False)


@pytest.mark.parametrize("shift", range(-NEARBY, NEARBY + 1))
def test_a_place_that_is_a_few_characters_off(shift):
    """As in sets where leading blanks or marks were dropped; the text stands elsewhere too."""
    context = "Mustafa, kardeşi ve oğlu Mustafa'nın yerine geçti; sonra Mustafa öldü."
    starts = [0, 25, 57]
    for start in starts:
        if start + shift >= 0:
            expected = (start, "Mustafa", shift != 0)
            assert place(context, "Mustafa", start + shift) == expected


def test_what_is_not_clearly_nearest_is_ambiguous():
    assert place("ab" + "x" * 4 + "ab", "ab", 3) is Lost.AMBIGUOUS  # 3 and 3
    assert place("ab" + "x" * 3 + "ab", "ab", 2) is Lost.AMBIGUOUS  # 2 and 3
    assert place("ab" + "x" * 4 + "ab", "ab", 2) is Lost.AMBIGUOUS  # 2 and 4: twice as far
    assert place("ab" + "x" * 5 + "ab", "ab", 2) == (0, "ab", True)  # 2 and 5
    assert place("ab" + "x" * 90 + "ab", "ab", NEARBY) == (0, "ab", True)
    assert place("ab" + "x" * 90 + "ab", "ab", NEARBY + 1) is Lost.AMBIGUOUS
    assert place("aaab", "aa", 5) is Lost.AMBIGUOUS  # overlapping occurrences count


@pytest.mark.parametrize("before", [1, 3, 40])
def test_places_in_utf_16_units(before):
    """As JavaScript counts, in which a character beyond U+FFFF is two."""
    context = f"{'😀' * before} Anna met 🚀 Anna and 🚀 Anna"
    for start in [i for i in range(len(context)) if context.startswith("Anna", i)]:
        units = len(context[:start].encode("utf-16-le")) // 2
        assert place(context, "Anna", units) == (start, "Anna", True)


def test_places_in_bytes():
    context = "Çağ öğretmeni şöyle dedi: Ayşe gülümsedi, Ayşe yürüdü, ığdır üzüm İÖÜ Ayşe."
    for start in [i for i in range(len(context)) if context.startswith("Ayşe", i)]:
        stated = len(context[:start].encode())
        assert place(context, "Ayşe", stated) == (start, "Ayşe", True)


def test_blanks_stand_for_any_run_of_blanks():
    context = "The  Duke\u00a0of  Normandy came. The Duke of\nNormandy left."
    assert place(context, "The Duke of Normandy", 0) == (0, context[:22], True)
    assert place(context, "The Duke of Normandy", 31) == (29, "The Duke of\nNormandy", True)
    assert place(context, "The Duke of Normandy", 12) is Lost.AMBIGUOUS
    assert place(context, "of\tNormandy came", None) == (10, "of  Normandy came", True)
    assert place("Duke of Normandy", "Duke  of\u00a0Normandy", 0) == (0, "Duke of Normandy", True)


def test_places_in_a_context_whose_blanks_were_folded():
    draw = random.Random(5)
    words = ["Rollo" if n % 31 == 0 else draw.choice(["came", "in", "1066"]) for n in range(160)]
    context = "  " + "".join(word + draw.choice([" ", "  ", "\n\n ", "\t"]) for word in words)
    folded = " ".join(context.split())
    right = [i for i in range(len(context)) if context.startswith("Rollo", i)]
    stated = [i for i in range(len(folded)) if folded.startswith("Rollo", i)]
    found = [place(context, "Rollo", each)[0] for each in stated[-5:]]
    assert stated[-5] + 20 < right[-5] and found == right[-5:]


def test_a_text_that_stands_once_is_found_from_anywhere():
    context = "a" * 300 + " Rollo " + "b" * 300
    for stated in (None, -1, 0, 100, 502, 10**6, 10**400):
        assert place(context, "Rollo", stated) == (301, "Rollo", True)
    # Once as written: with other blanks it does not count.
    assert place("in 1066 or in  1066", "in 1066", None) == (0, "in 1066", True)


def test_absent_and_ambiguous():
    for stated in (None, -1, 0, 9999):
        assert place("Rollo came", "Robert", stated) is Lost.ABSENT
        assert place("Rollo came", "rollo", stated) is Lost.ABSENT
        assert place("Rollo came", " ", stated) is Lost.ABSENT
        assert place("it Rollo or Rollo", "Rollo", None) is Lost.AMBIGUOUS


def test_the_next_answer_of_the_list():
    context = "Rollo and Rollo came to Normandy"
    absent, several, once = Answer("Robert", 0), Answer("Rollo", None), Answer("Normandy", None)
    assert first_place(context, [absent, several, once]) == (2, Place(24, 32, True))
    assert first_place(context, [once, absent]) == (0, Place(24, 32, True))
    assert first_place(context, [absent, several]) is Lost.AMBIGUOUS
    assert first_place(context, [absent]) is Lost.ABSENT
