"""Every broken source is refused in one sentence that names the record."""

import json
import os

import pytest

from kdfast.errors import UserError
from kdfast.squad.records import fingerprint, read_examples
from tests.squad.source_files import CONTEXT, flat, lines, official, write_parquet


def broken(change):
    data = official()
    change(data["data"][0]["paragraphs"], data)
    return data


def _set(container, key, value):
    container[key] = value


BROKEN = {
    "no qas": (lambda p, d: p[1].pop("qas"), ["paragraphs[1]", "'qas'"]),
    "qas not a list": (lambda p, d: _set(p[1], "qas", {}), ["paragraphs[1]", "'qas' is dict"]),
    "no paragraphs": (lambda p, d: d["data"][0].pop("paragraphs"), ["data[0]", "'paragraphs'"]),
    "article": (lambda p, d: _set(d, "data", [[]]), ["data[0]", "list where an object"]),
    "data": (lambda p, d: _set(d, "data", {}), ['no list under "data"']),
    "no data": (lambda p, d: d.pop("data"), ['no list under "data"']),
    "no context": (lambda p, d: p[0].pop("context"), ["paragraphs[0]", "'context'"]),
    "null context": (lambda p, d: _set(p[0], "context", None), ["'context' is null"]),
    "empty context": (lambda p, d: _set(p[0], "context", ""), ["paragraphs[0]", "is empty"]),
    "blank context": (lambda p, d: _set(p[0], "context", " \n"), ["paragraphs[0]", "is empty"]),
    "half a pair": (lambda p, d: _set(p[0], "context", "a\ud83d"), ["paragraphs[0]", "surrogate"]),
    "no question": (lambda p, d: p[0]["qas"][1].pop("question"), ['id "b"', "'question'"]),
    "no id": (lambda p, d: p[0]["qas"][1].pop("id"), ["qas[1]", "'id'"]),
    "id": (lambda p, d: _set(p[0]["qas"][1], "id", True), ["qas[1]", "give str or int"]),
    "same id": (lambda p, d: _set(p[1]["qas"][0], "id", "a"), ["paragraphs[1]", '"a" is used']),
    "answers": (lambda p, d: _set(p[0]["qas"][0], "answers", "x"), ['id "a"', "answers is str"]),
    "no text": (lambda p, d: p[0]["qas"][0]["answers"][0].pop("text"), ["answers[0]", "'text'"]),
    "start": (
        lambda p, d: _set(p[0]["qas"][0]["answers"][0], "answer_start", "3"),
        ["answers[0]", "'answer_start' is str"],
    ),
    "start beyond": (
        lambda p, d: _set(p[0]["qas"][0]["answers"][0], "answer_start", len(CONTEXT)),
        ['id "a"', f"answer_start {len(CONTEXT)} lies outside"],
    ),
    "start before": (
        lambda p, d: _set(p[0]["qas"][0]["answers"][0], "answer_start", -1),
        ['id "a"', "answer_start -1 lies outside"],
    ),
    "no questions": (lambda p, d: _set(d, "data", []), ["no question"]),
    "empty qas": (lambda p, d: [_set(x, "qas", []) for x in p], ["no question"]),
}


def refused(source, *parts, **options):
    with pytest.raises(UserError) as caught:
        read_examples(str(source), **options)
    message = str(caught.value)
    for part in (str(source), *parts):
        assert part in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_official_files_name_the_record(tmp_path, fault):
    change, parts = BROKEN[fault]
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(broken(change)))
    refused(path, *parts)


FLAT_FAULTS = {
    "context": (lambda r: r.pop("context"), ["no 'context'"]),
    "question": (lambda r: r.pop("question"), ["no 'question'"]),
    "id": (lambda r: r.pop("id"), ["no 'id'"]),
    "half an id": (lambda r: _set(r, "id", "\ud800"), ["its id holds half"]),
    "no starts": (lambda r: _set(r, "answers", {"text": ["Rollo"]}), ["no 'answer_start'"]),
    "lengths": (
        lambda r: _set(r, "answers", {"text": ["Rollo"], "answer_start": []}),
        ["1 text but 0 answer_start"],
    ),
    "beyond": (
        lambda r: _set(r, "answers", {"text": ["x"], "answer_start": [99]}),
        ["answer_start 99 lies outside"],
    ),
}


@pytest.mark.parametrize("fault", FLAT_FAULTS)
def test_broken_flat_files_name_the_record(tmp_path, fault):
    change, parts = FLAT_FAULTS[fault]
    rows = flat()
    change(rows[1])
    for name, where in {"rows.json": "[1]", "rows.jsonl": "record 2"}.items():
        path = tmp_path / name
        path.write_text(json.dumps(rows) if name == "rows.json" else lines(rows))
        refused(path, where, *parts)


def test_missing_column_of_parquet_names_what_there_is(tmp_path):
    path = tmp_path / "rows.parquet"
    write_parquet(path, [{"id": "a", "passage": CONTEXT, "question": "Who?"}])
    refused(path, "row 0", "no 'context' (it has id, passage, question)")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "not JSON"),
        ("hello", "not JSON"),
        ('{"data": [{"paragraphs": [', "not JSON"),
        ('{"data": [{"paragraphs": []}', "not JSON"),
        ('{"data": []} x', "text after the end"),
        ('{"data" []}', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('[{"id": ' + "1" * 5000 + "}]", "not JSON"),
        ('{"id": "a", "question": "?", "context": "b"} {', "not JSON"),
    ],
)
def test_text_that_is_not_json(tmp_path, text, part):
    path = tmp_path / "bad.json"
    path.write_text(text)
    refused(path, part)


def test_unreadable_files(tmp_path):
    refused(tmp_path / "missing.json", "no such file")
    refused("missing.jsonl", "no such file")
    refused("some/where/else", "no such file")
    latin = tmp_path / "latin.json"
    latin.write_bytes('[{"context": "Küste"}]'.encode("latin-1"))
    refused(latin, "not UTF-8")
    parquet = tmp_path / "rows.parquet"
    parquet.write_text("[]")
    refused(parquet, "not a Parquet file")
    refused("x" * 300, "not a path")
    with pytest.raises(UserError, match="no such file"):
        fingerprint(str(tmp_path / "missing.json"))


def test_file_without_rights(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may read every file")
    path = tmp_path / "secret.json"
    path.write_text(json.dumps(official()))
    path.chmod(0)
    refused(path, "cannot be read")
    with pytest.raises(UserError, match="cannot be read"):
        fingerprint(str(path))


def test_a_dataset_that_cannot_be_reached(monkeypatch):
    import datasets

    asked = []

    def unreachable(*args, **options):
        asked.append((args, options))
        raise ConnectionError("Couldn't reach the hub\nand a second line")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    refused("squad_v2", "ConnectionError", "local .json")
    refused("owner/name:plain:validation", "Couldn't reach the hub")
    refused("owner/name::test", "Couldn't reach", split="train")
    refused("owner/name:plain", "Couldn't reach", split="validation")
    with pytest.raises(UserError, match="local"):
        fingerprint("squad_v2")
    assert asked == [
        (("squad_v2", None), {"split": "train", "revision": None}),
        (("owner/name", "plain"), {"split": "validation", "revision": None}),
        (("owner/name", None), {"split": "test", "revision": None}),
        (("owner/name", "plain"), {"split": "validation", "revision": None}),
        (("squad_v2", None), {"split": "train", "revision": None}),
    ]


def test_a_split_that_is_not_there(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    write_parquet(folder / "train.parquet", flat())
    refused(folder, "could be loaded", "test", split="test")
