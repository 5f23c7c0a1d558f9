"""A question with its context and answers, and where in the context an answer stands."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

# How far a stated place may be from an answer that stands more than once in its context. In public
# sets with wrong places (Turkish, Indonesian, Chinese) they are 1 to 3 characters off, where blanks
# or quotation marks were dropped.
NEARBY = 5


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer as a record states it."""

    text: str
    start: int | None = None  # characters from the start of the context, right or wrong


@dataclass(frozen=True, slots=True)
class Example:
    """One question with its context and answers."""

    id: str
    title: str
    question: str
    context: str
    answers: tuple[Answer, ...] | None  # None: unlabelled; (): the context has no answer
    numbered: bool = False  # the record has no id, and `id` is its number in the file, from 0
    renamed_from: str | None = None  # the record's id, where an earlier question has the same


@dataclass(frozen=True, slots=True)
class Place:
    """Where an answer stands: context[start:end], without outer blanks."""

    start: int
    end: int
    moved: bool  # True where the record named another place


class Lost(Enum):
    """Why an answer has no place in its context."""

    ABSENT = "absent"
    AMBIGUOUS = "ambiguous"


def locate(context: str, answer: Answer) -> Place | Lost:
    """Finds an answer, less its outer blanks, in its context. The first of these that holds:

    1. It is where the record says, its blanks counted or not.
    2. It is where the record says in UTF-16 units, in which JavaScript and Java count.
    3. An occurrence is at most NEARBY characters from the stated place, and every other one more
       than twice as far.
    4. It is where the record says in UTF-8 bytes, or in characters of the context with each run of
       blanks folded into one.
    5. As 3, where blanks in the answer stand for any run of blanks (double, no-break, line ends).
    6. It stands in the context once; if never as written, once with any run of blanks.

    2 comes before 3, as a place that is exact in other units is seldom so by chance. Bytes come
    later: in a language with accents they would be, for a short answer.
    """
    text = answer.text.strip()
    if not text:
        return Lost.ABSENT
    lead = len(answer.text) - len(answer.text.lstrip())

    def at(place: int, moved: bool = True) -> Place | None:
        for start in (place + lead, place):
            if context.startswith(text, start):
                return Place(start, start + len(text), moved)
        return None

    stated = -1 if answer.start is None else answer.start
    if stated >= 0:
        found = at(stated, moved=False) or at(_from_units(context, stated, "utf-16-le", 2))
        if found:
            return found
    written = _occurrences(context, re.escape(text))
    folded = _occurrences(context, r"\s+".join(map(re.escape, text.split())))
    if stated >= 0:
        found = (
            _clearly_nearest(written, stated + lead)
            or at(_from_units(context, stated, "utf-8", 1))
            or at(_from_folded(context, stated))
            or _clearly_nearest(folded, stated + lead)
        )
        if found:
            return found
    for places in (written, folded):
        if len(places) == 1:
            return places[0]
        if places:
            return Lost.AMBIGUOUS
    return Lost.ABSENT


def first_place(context: str, answers: Sequence[Answer]) -> tuple[int, Place] | Lost:
    """The first of `answers` that has a place in `context`.

    Returns:
        Its number and its place. Where none has a place: AMBIGUOUS if one of them stands in the
        context more than once, else ABSENT.
    """
    lost = Lost.ABSENT
    for number, answer in enumerate(answers):
        place = locate(context, answer)
        if isinstance(place, Place):
            return number, place
        if place is Lost.AMBIGUOUS:
            lost = place
    return lost


def _from_units(context: str, stated: int, encoding: str, size: int) -> int:
    """The character before which `stated` units of an encoding stand, each of `size` bytes."""
    if context.isascii():
        return stated
    units = context.encode(encoding, "surrogatepass")[: size * stated]
    return len(units.decode(encoding, "ignore"))


def _from_folded(context: str, stated: int) -> int:
    """The character that is number `stated` of " ".join(context.split())."""
    dropped = 0
    for run in re.finditer(r"^\s+|\s\s+", context):
        kept = 1 if run.start() else 0
        if run.start() + kept - dropped > stated:
            break
        dropped += len(run[0]) - kept
    return stated + dropped


def _occurrences(context: str, pattern: str) -> list[Place]:
    """All places of a pattern, overlapping ones too."""
    return [Place(*m.span(1), moved=True) for m in re.finditer(f"(?=({pattern}))", context)]


def _clearly_nearest(found: list[Place], stated: int) -> Place | None:
    near = sorted(found, key=lambda place: abs(place.start - stated))
    off, *others = [abs(place.start - stated) for place in near[:2]] or [NEARBY + 1]
    is_clear = off <= NEARBY and all(other > 2 * off for other in others)
    return near[0] if is_clear else None
