"""A small SQuAD 2.0 file for tests, and the way to the real ones."""

import json
from pathlib import Path

import pytest

SHARED = Path(__file__).parents[2] / "shared" / "data"

PLACES = ("Normandy", "Denmark", "France", "Iceland", "Bavaria", "Galicia", "Moravia", "Savoy")
PEOPLE = ("Rollo", "Harald", "Anna", "Cyril", "Otto", "Ines", "Marek", "Amadeus", "Berta")


def shared(name: str) -> Path:
    """A file of ../shared/data; skips the test where there is none."""
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"../shared/data/{name} is not there")
    return path


def article(number: int, *, labelled: bool = True) -> dict:
    """One article: a paragraph of varied length, an answerable and an unanswerable question."""
    place, person = PLACES[number % len(PLACES)], PEOPLE[number % len(PEOPLE)]
    filler = "They were descended from raiders and pirates. " * (number % 5)
    context = (
        f"{filler}In the year {900 + number} the leader of {place} was {person}. Then winter came."
    )
    answers = [{"text": person, "answer_start": context.index(person)}]
    asked = {"id": f"q{number}", "question": f"Who was the leader of {place}?"}
    if labelled:
        asked |= {"answers": answers, "is_impossible": False}
    never = {
        "id": f"n{number}",
        "question": "What did the winter cost?",
        "answers": [],
        "is_impossible": True,
    }
    return {"title": f"T{number}", "paragraphs": [{"context": context, "qas": [asked, never]}]}


def write(path: Path, count: int = 12, **arguments) -> str:
    """A file of `count` articles; returns its name as a program takes it."""
    data = [article(number, **arguments) for number in range(count)]
    path.write_text(json.dumps({"version": "v2.0", "data": data}), encoding="utf-8")
    return str(path)
