"""Answers by question, from the files that programs leave them in."""

import json

import pytest

from kdfast.common.errors import UserError
from kdfast.data.examples import Example
from kdfast.evaluation.predictions import read_answers, read_odds
from tests.data.source_files import lines

ANSWERS = {"a": "Rollo", "7": ""}
RECORDS = [{"id": "a", "prediction_text": "Rollo", "no_answer_probability": 0.25}]
RECORDS += [{"id": 7, "prediction_text": "", "no_answer_probability": 1}]
LINE = {"question": "?", "score": 0.5, "start": 0, "end": 5}
# What kdfast.predict writes, without and with --top_k.
OWN = [{"id": "a", **LINE, "answer": "Rollo"}, {"id": 7, **LINE, "answer": ""}]
BEST = [
    {"id": "a", "question": "?", "answers": [{"answer": "Rollo"}, {"answer": "Otto"}]},
    {"id": 7, "question": "?", "answers": [{"answer": ""}]},
]
FILES = {
    "official.json": json.dumps(ANSWERS),
    "mark.json": "\ufeff" + json.dumps(ANSWERS, indent=4),
    "hf.json": json.dumps(RECORDS),
    "hf.jsonl": lines(RECORDS),
    "own.jsonl": lines(OWN),
    "best.jsonl": lines(BEST),
    "twice.jsonl": lines(OWN + OWN),
}


@pytest.mark.parametrize("form", FILES)
def test_every_form_gives_the_same_answers(tmp_path, form):
    (tmp_path / form).write_text(FILES[form], encoding="utf-8")
    assert read_answers(str(tmp_path / form), []) == ANSWERS


def test_null_odds(tmp_path):
    (tmp_path / "odds.json").write_text(json.dumps({"a": 0.25, "7": 1}))
    (tmp_path / "hf.json").write_text(json.dumps(RECORDS))
    for name in ("odds.json", "hf.json"):
        assert read_odds(str(tmp_path / name), []) == {"a": 0.25, "7": 1}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (["x"], r"no object at \[0\]"),
        ([{"a": "Rollo"}], r"no answer by an id at \[0\]: .*prediction_text"),
        ([{"id": "a"}, {"id": "b"}], "no answer by an id"),
        ([{"id": "a", "answer": None}], "holds None for question a: give a text"),
        ([{"id": [], "answer": "x"}], "for question None"),
        (OWN + [{**OWN[0], "answer": "Otto"}] * 2, "two values of 1 questions, such as a"),
    ],
)
def test_what_is_none(tmp_path, content, words):
    (tmp_path / "bad.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=words):
        read_answers(str(tmp_path / "bad.json"), [])


def test_questions_that_share_an_id_share_its_answer(tmp_path):
    def named(name, renamed_from=None):
        return Example(name, "", "?", "c", (), renamed_from=renamed_from)

    examples = [named("a"), named("a#2", "a"), named("b#2", "b"), named("c")]
    found = {"a": "Rollo", "b": "Otto", "b#2": "Ines"}
    (tmp_path / "found.json").write_text(json.dumps(found))
    assert read_answers(str(tmp_path / "found.json"), examples) == {**found, "a#2": "Rollo"}
