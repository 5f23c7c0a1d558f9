"""The one exception that a user's mistake raises."""

from collections.abc import Sequence
from difflib import get_close_matches


class UserError(ValueError):
    """One sentence that names the file or argument, the fault and the remedy.

    Programs print it without a traceback and exit with status 2. is_repeated: another rank of the
    run says the same, so that this one need not.
    """

    is_repeated = False


def unknown_name(role: str, name: str, known: Sequence[str]) -> UserError:
    """The error for a `name` that is none of `known`: it says the nearest one, or else all.

    role: what holds the name, such as "--recipe".
    """
    nearest = get_close_matches(name, known, n=1)
    remedy = f"did you mean {nearest[0]}?" if nearest else f"give one of {', '.join(known)}."
    return UserError(f"{role} {name} is not known: {remedy}")
