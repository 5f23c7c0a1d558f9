"""Reading: every accepted form gives the same examples, without holding the file."""

import json
import random

import pytest

from kdfast.squad import json_items, records
from kdfast.squad.records import Answer, Example, fingerprint, read_examples
from tests.corpora import shared
from tests.squad.source_files import CONTEXT, OTHER, flat, lines, official, write_parquet

EXAMPLES = [
    Example("a", "Normans", "Who led?", CONTEXT, (Answer("Rollo", 0),)),
    Example("b", "Normans", "When?", CONTEXT, ()),
    Example("7", "Normans", "Where is Sis?", OTHER, None),
]


FORMS = {
    "official.json": lambda p: p.write_text(json.dumps(official())),
    "byte_order_mark.json": lambda p: p.write_text(json.dumps(official()), encoding="utf-8-sig"),
    "indented.json": lambda p: p.write_text(json.dumps(official(), indent=2)),
    "articles.jsonl": lambda p: p.write_text(lines(official()["data"])),
    "list.json": lambda p: p.write_text(json.dumps(flat())),
    "data.json": lambda p: p.write_text(json.dumps({"version": 1.5, "data": flat(), "n": 12})),
    "lines.jsonl": lambda p: p.write_text(lines(flat())),
    "lines.json": lambda p: p.write_text(lines(flat())),
    "rows.parquet": lambda p: write_parquet(p, flat()),
}


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_examples(tmp_path, monkeypatch, form, chunk):
    monkeypatch.setattr(json_items, "_CHUNK", chunk)
    path = tmp_path / form
    FORMS[form](path)
    found = read_examples(str(path))
    assert found == EXAMPLES
    assert found[0].context is found[1].context


def test_missing_answers_column_is_unlabelled(tmp_path):
    rows = [{k: v for k, v in row.items() if k not in ("answers", "title")} for row in flat()]
    write_parquet(tmp_path / "rows.parquet", rows)
    found = read_examples(str(tmp_path / "rows.parquet"))
    assert [(e.answers, e.title) for e in found] == [(None, "")] * 3


def test_a_question_marked_impossible_has_no_answer(tmp_path):
    data = official()
    qas = data["data"][0]["paragraphs"][0]["qas"]
    qas[1]["answers"] = qas[1]["plausible_answers"]
    (tmp_path / "plausible.json").write_text(json.dumps(data))
    assert read_examples(str(tmp_path / "plausible.json")) == EXAMPLES


def test_streaming_agrees_with_json_on_random_values(tmp_path, monkeypatch):
    draw = random.Random(0)

    def value(depth):
        kind = draw.randrange(8 if depth else 5)
        if kind < 5:
            return draw.choice(
                [None, True, -12.5e3, 10**20, 0, "", 'a"]},{\\', "\n\t ä😀 [", draw.random()]
            )
        if kind < 7:
            return [value(depth - 1) for _ in range(draw.randrange(4))]
        return {f"k{i}": value(depth - 1) for i in range(draw.randrange(4))}

    path = tmp_path / "values.json"
    for round_ in range(60):
        monkeypatch.setattr(json_items, "_CHUNK", draw.choice([1, 2, 3, 5, 64]))
        items = [value(3) for _ in range(draw.randrange(6))]
        indent, ascii_ = draw.choice([None, 1]), draw.choice([True, False])
        whole = {"before": value(2), "data": items, "after": value(2)} if round_ % 2 else items
        path.write_text(json.dumps(whole, indent=indent, ensure_ascii=ascii_), encoding="utf-8")
        assert [item for _, item in json_items.json_items(path)] == items


def test_a_file_is_not_held_whole(tmp_path):
    import tracemalloc

    row = {"context": "x " * 500, "question": "y"}
    path = tmp_path / "long.json"
    path.write_text(json.dumps([{**row, "id": str(i)} for i in range(10_000)]))
    tracemalloc.start()
    try:
        count = sum(1 for _ in records.iter_examples(str(path)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 10_000
    assert path.stat().st_size > 10e6
    assert peak < 8e6


def test_a_folder_is_read_by_load_dataset(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    write_parquet(folder / "train.parquet", flat())
    write_parquet(folder / "validation.parquet", flat()[1:])
    assert read_examples(str(folder)) == EXAMPLES
    assert read_examples(str(folder), split="validation") == EXAMPLES[1:]
    assert read_examples(f"{folder}::validation", split="train") == EXAMPLES[1:]
    prints = [fingerprint(str(folder), split=s) for s in (None, "train", "validation")]
    assert prints[0] == prints[1] != prints[2]


def test_fingerprint_is_that_of_the_bytes(tmp_path):
    import hashlib

    text = json.dumps(official()).encode()
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_bytes(text)
        assert fingerprint(str(tmp_path / name)) == hashlib.sha256(text).hexdigest()


@pytest.mark.parametrize(
    ("name", "questions"),
    [("squad2_dev", 889), ("newwiki_dev", 466), ("xquad_zh", 731), ("covidqa_long_dev", 68)],
)
def test_real_files(name, questions):
    path = shared(f"{name}.json")
    raw = json.loads(path.read_text(encoding="utf-8"))["data"]
    expected = [
        (str(qa["id"]), paragraph["context"], () if qa.get("is_impossible") else qa["answers"])
        for article in raw
        for paragraph in article["paragraphs"]
        for qa in paragraph["qas"]
    ]
    found = read_examples(str(path))
    assert len(found) == questions
    for example, (id_, context, answers) in zip(found, expected, strict=True):
        assert (example.id, example.context) == (id_, context)
        assert [(a.text, a.start) for a in example.answers] == [
            (a["text"], a["answer_start"]) for a in answers
        ]
