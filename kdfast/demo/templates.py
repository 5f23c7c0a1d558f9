"""The templates of the corpus: a YAML file per domain, read once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

DOMAINS = Path(__file__).with_name("domains")


@dataclass(frozen=True, slots=True)
class Relation:
    name: str
    kind: str  # of the answer
    say: tuple[str, ...]  # statements, with {S} for the subject and {A} for the answer
    ask: tuple[str, ...]  # questions
    held_out: tuple[str, ...]  # a wording of the question that the training side never sees


@dataclass(frozen=True, slots=True)
class Domain:
    name: str
    subject: str
    noun: str
    intro: tuple[str, ...]
    aside: tuple[str, ...]
    relations: tuple[Relation, ...]


@cache
def domains() -> tuple[Domain, ...]:
    """All domains, by file name."""
    return tuple(_read_domain(path) for path in sorted(DOMAINS.glob("*.yaml")))


def _read_domain(path: Path) -> Domain:
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    relations = tuple(
        Relation(
            name,
            entry["answer"],
            tuple(entry["say"]),
            tuple(entry["ask"]),
            (entry["held_out"],) if "held_out" in entry else (),
        )
        for name, entry in data["relations"].items()
    )
    return Domain(
        path.stem,
        data["subject"],
        data["noun"],
        tuple(data["intro"]),
        tuple(data["aside"]),
        relations,
    )
