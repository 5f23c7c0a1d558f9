"""The place of an answer in its context."""

from kdfast.squad.examples import Answer, Place, locate


def test_locate_accepts_the_stated_place_less_blanks():
    context = "in  1066 , they came"
    assert context[2:9] == "  1066 "
    assert locate(context, Answer("  1066 ", 2)) == Place(4, 8, False)
    assert locate(context, Answer("1066", 4)) == Place(4, 8, False)
    # The blanks are in the text but the place is that of the first letter.
    assert locate(context, Answer("  1066", 4)) == Place(4, 8, False)


def test_locate_finds_a_unique_answer_nearby():
    context = "a" * 300 + " Rollo " + "b" * 300
    for stated in (101, 290, 302, 310, 501):
        assert locate(context, Answer("Rollo", stated)) == Place(301, 306, True)
    for stated in (100, 502):  # 201 characters away
        assert locate(context, Answer("Rollo", stated)) is None


def test_locate_refuses_what_is_not_unique_or_not_there():
    assert locate("Rollo and Rollo came", Answer("Rollo", 3)) is None
    assert locate("aaab", Answer("aa", 2)) is None  # overlapping occurrences count
    assert locate("Rollo came", Answer("Robert", 0)) is None
    assert locate("Rollo came", Answer("rollo", 0)) is None
    assert locate("Rollo came", Answer(" ", 5)) is None
    # At the stated place other occurrences do not matter.
    assert locate("Rollo and Rollo came", Answer("Rollo", 10)) == Place(10, 15, False)
