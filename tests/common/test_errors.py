"""What UserError makes of a sentence, and what is said of an error of the system."""

import errno
import os

from kdfast.common.errors import LONGEST, UserError, of_system, unknown_name


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


def test_what_the_system_refuses_has_the_file_the_cause_and_a_remedy(tmp_path):
    def sentence(code, name=None):
        return str(of_system(OSError(code, os.strerror(code), name)))

    assert sentence(errno.EMFILE, "a\x1b") == (
        r"a\u001b: Too many open files: raise the limit of open files (ulimit -n)."
    )
    assert sentence(errno.ESTALE).endswith("handle: see to the disk or network mount, and retry.")
    remedy = "check that it is there, and that you may use it."
    assert sentence(errno.EACCES, "a") == f"a: Permission denied: {remedy}"
    assert sentence(errno.EROFS, "a").startswith("a: Read-only file system: ")
    assert str(of_system(OSError("Of a library\nand more"))).startswith("Of a library: ")
    assert "free memory" in str(of_system(MemoryError()))
