"""What UserError makes of a sentence that is long or that a terminal would not print."""

from kdfast.common.errors import LONGEST, UserError, unknown_name


def test_a_sentence_of_the_longest_length_stays_whole():
    sentence = "a" * (LONGEST - 1) + "b"
    assert str(UserError(sentence)) == sentence


def test_of_a_longer_sentence_both_ends_stay():
    """They hold the file and the remedy; one more character is enough."""
    half = LONGEST // 2
    for middle in ("x", "x" * 10_000):
        sentence = "a" + "b" * (half - 1) + middle + "c" * (half - 1) + "d"
        cut = str(UserError(sentence))
        assert cut == "a" + "b" * (half - 1) + " … " + "c" * (half - 1) + "d"


def test_what_a_terminal_would_not_print_is_escaped():
    assert str(UserError("a\x1b[2Jb\nc … 桥\u202e")) == r"a\u001b[2Jb\nc … 桥\u202e"


def test_an_unknown_name_gets_the_nearest_one_or_all():
    known = ("cosine", "linear")
    assert str(unknown_name("--x", "linar", known)).endswith("not known: did you mean linear?")
    assert str(unknown_name("--x", "?", known)).endswith("not known: give one of cosine, linear.")
