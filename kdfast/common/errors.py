"""UserError, which a user's mistake raises; causes and remedies; what a terminal may be given."""

import errno
import json
from collections.abc import Sequence
from difflib import get_close_matches

LONGEST = 1500  # characters


def printable(text: str, kept: str = "") -> str:
    """`text`, which may come from a hostile file, with what a terminal would not print escaped.

    These are control characters, among them those that move the cursor, change the direction of
    writing or take no room, and lone surrogates. Escapes are those of JSON, so that a text that is
    JSON still says the same. kept: characters that stay.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in kept else json.dumps(c)[1:-1] for c in text)


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
        super().__init__(printable(sentence))


class WriteError(UserError):
    """A disk that cannot be written: not of what was to be written."""


_REMEDIES = {
    "make room": (errno.ENOSPC, errno.EDQUOT),
    "raise the limit of open files (ulimit -n)": (errno.EMFILE, errno.ENFILE),
    "see to the disk or network mount, and retry": (
        *(errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV, errno.EBUSY),
        *(errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH),
    ),
    "free some memory": (errno.ENOMEM,),
}


def cause_of(error: OSError) -> str:
    """What the system says, and of which file."""
    return ": ".join(str(part) for part in (error.strerror or error, error.filename) if part)


def remedy(number: int | None) -> str | None:
    """What helps against an errno that says nothing of the file; None for the others."""
    return next((text for text, numbers in _REMEDIES.items() if number in numbers), None)


def of_system(error: OSError | MemoryError) -> UserError:
    """The sentence for what the system has refused, by which a program ends."""
    if isinstance(error, MemoryError):
        return UserError("This machine has too little free memory: free some, and retry.")
    what = error.strerror or first_line(error)
    where = f"{error.filename}: " if error.filename is not None else ""
    hint = remedy(error.errno) or "check that it is there, and that you may use it"
    return UserError(f"{where}{what}: {hint}.")


def unknown_name(role: str, name: str, known: Sequence[str]) -> UserError:
    """The error for a `name` that is none of `known`: it says the nearest one, or else all.

    role: what holds the name, such as "--recipe".
    """
    nearest = get_close_matches(name, known, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"give one of {', '.join(known)}."
    return UserError(f"{role} {name} is not known: {hint}")


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for a one-sentence message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
