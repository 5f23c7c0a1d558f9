"""Names and values that fill the templates, on two sides that never share a name.

Every invented name is joined from parts, so that a reader of the training side knows the parts of
a validation name but has not met the name. Which side a name is on depends on the name alone,
never on a seed: a model trained on any training corpus has seen no name of any validation corpus.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import yaml

SIDES = ("train", "validation")
YEARS = range(1780, 2016)
UNITS = ("metres", "kilometres", "grams")
NAME_WORDS = ("Bridge", "Castle", "College", "Expedition", "Festival", "Mount", "Museum")


@cache
def word_lists() -> dict[str, dict[str, list[str]]]:
    """The lists of names.yaml: "parts" of invented names, and "values" by kind of answer."""
    return yaml.safe_load(Path(__file__).with_name("names.yaml").read_text(encoding="utf-8"))


def side_of(name: str) -> str:
    """The side of an invented name: one name in four belongs to the validation."""
    return "validation" if zlib.crc32(name.lower().encode()) % 4 == 0 else "train"


class Names:
    """Draws names of one side, and plain values (colours, lengths), which belong to no side."""

    def __init__(self, side: str, rng: random.Random):
        self.side = side
        self.drawn: set[str] = set()  # every invented name so far, to compare the sides
        self._rng = rng
        self._parts = word_lists()["parts"]
        self._values = word_lists()["values"]

    def subject(self, kind: str) -> tuple[str, str]:
        """A subject of a passage: its name as it stands within a sentence, and its pronoun."""
        return self._person() if kind == "person" else (self._invented(kind), "it")

    def value(self, kind: str) -> str:
        """An answer of `kind`, years apart (their order matters); KeyError for an unknown kind."""
        if kind in self._values:
            return self._rng.choice(self._values[kind])
        if kind == "person":
            return self._person()[0]
        if kind == "count":
            return str(self._rng.randrange(20, 990))
        if kind in UNITS:
            return f"{self._rng.randrange(20, 990)} {kind}"
        if kind == "knots":
            return f"{self._part('number')} knots"
        if kind == "price":
            return f"{self._part('number')} {self._part('currency')}"
        if kind == "duration":
            return f"{self._part('number')} {self._part('time')}"
        return self._invented(kind)

    def _invented(self, kind: str) -> str:
        make = {
            "bird": lambda: f"the {self._join('town')} {self._part('bird')}",
            "bridge": lambda: f"{self._join('town')} Bridge",
            "castle": lambda: f"{self._join('town')} Castle",
            "company": lambda: f"{self._join('surname')} {self._part('company')}",
            "expedition": lambda: f"the {self._join('surname')} Expedition",
            "festival": lambda: f"the {self._join('town')} {self._part('festival')} Festival",
            "mineral": lambda: self._join("mineral").lower(),
            "mountain": lambda: f"Mount {self._join('mountain')}",
            "museum": lambda: f"the {self._join('town')} {self._part('museum')} Museum",
            "newspaper": lambda: f"the {self._join('town')} {self._part('newspaper')}",
            "novel": lambda: f"The {self._two_words()}",
            "river": lambda: self._join("river"),
            "school": lambda: f"{self._join('surname')} College",
            "ship": lambda: f"the {self._two_words()}",
            "town": lambda: self._join("town"),
        }
        return make[kind]()

    def _person(self) -> tuple[str, str]:
        first, pronoun = self._rng.choice((("woman", "she"), ("man", "he")))
        return f"{self._part(first)} {self._join('surname')}", pronoun

    def _join(self, kind: str) -> str:
        return self._draw(lambda: self._part(f"{kind}_head") + self._part(f"{kind}_tail"))

    def _two_words(self) -> str:
        return self._draw(lambda: f"{self._part('quality')} {self._part('thing')}")

    def _draw(self, make: Callable[[], str]) -> str:
        while True:
            name = make()
            if side_of(name) == self.side:
                self.drawn.add(name.lower())
                return name

    def _part(self, kind: str) -> str:
        return self._rng.choice(self._parts[kind])
