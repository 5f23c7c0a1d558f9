"""A question with its context and answers, and where in the context an answer stands."""

from __future__ import annotations

from dataclasses import dataclass

NEARBY = 200  # characters around the stated place in which a misplaced answer is looked for


@dataclass(frozen=True, slots=True)
class Answer:
    text: str
    start: int  # characters from the start of the context


@dataclass(frozen=True, slots=True)
class Example:
    """One question. `answers` is None where unlabelled and () where it has no answer."""

    id: str
    title: str
    question: str
    context: str
    answers: tuple[Answer, ...] | None


@dataclass(frozen=True, slots=True)
class Place:
    """Where an answer stands: context[start:end], without outer blanks."""

    start: int
    end: int
    moved: bool  # True where the record named another place


def locate(context: str, answer: Answer) -> Place | None:
    """Finds an answer in its context.

    The text, less its outer blanks, counts as being where the record says (its blanks counted or
    not). Otherwise it is taken from elsewhere if it occurs exactly once among the places that
    start at most NEARBY characters away from the stated one. None: not found, not unique, or
    blank.
    """
    text = answer.text.strip()
    if not text:
        return None
    stated = answer.start + len(answer.text) - len(answer.text.lstrip())
    for start in (stated, answer.start):
        if context.startswith(text, start):
            return Place(start, start + len(text), moved=False)
    low, high = max(0, stated - NEARBY), stated + NEARBY + len(text)
    start = context.find(text, low, high)
    if start < 0 or context.find(text, start + 1, high) >= 0:
        return None
    return Place(start, start + len(text), moved=True)
