"""The one exception that a user's mistake raises."""

from collections.abc import Sequence
from difflib import get_close_matches

LONGEST = 1500  # characters


class UserError(ValueError):
    """One sentence that names the file or argument, the fault and the remedy.

    Programs print it without a traceback and exit with status 2. What it quotes may come from a
    hostile file: what a terminal would not print is escaped, and the middle of a long one left out.
    is_repeated: another rank of the run says the same, so that this one need not.
    """

    is_repeated = False

    def __init__(self, sentence: str):
        if len(sentence) > LONGEST:
            sentence = f"{sentence[: LONGEST // 2]} … {sentence[-LONGEST // 2 :]}"
        if not sentence.isprintable():
            escaped = (c if c.isprintable() else ascii(c)[1:-1] for c in sentence)
            sentence = "".join(escaped)
        super().__init__(sentence)


def unknown_name(role: str, name: str, known: Sequence[str]) -> UserError:
    """The error for a `name` that is none of `known`: it says the nearest one, or else all.

    role: what holds the name, such as "--recipe".
    """
    nearest = get_close_matches(name, known, n=1)
    remedy = f"did you mean {nearest[0]}?" if nearest else f"give one of {', '.join(known)}."
    return UserError(f"{role} {name} is not known: {remedy}")
