"""What cannot be used: a record is left out and counted, a file is refused in one sentence."""

import gzip
import json
import os
import pickle
import zipfile

import pytest

from kdfast.common.errors import UserError
from kdfast.data.read import check_ids, fingerprint, read_examples
from kdfast.data.tally import UNREAD, Tally
from tests.data.source_files import CONTEXT, flat, lines, official, write_parquet


def _set(container, key, value):
    container[key] = value


def refused(source, *parts, **options):
    with pytest.raises(UserError) as caught:
        read_examples(str(source), **options)
    message = str(caught.value)
    for part in (str(source), *parts):
        assert part in message
    assert "\n" not in message
    return message


# What is done to the paragraphs of a file of three questions -> what is read, why the rest is not,
# and how the rest is named.
LEFT_OUT = {
    "no qas": (lambda p: p[1].pop("qas"), "ab", "no_question", ["data[0], paragraphs[1]"]),
    "qas text": (lambda p: _set(p[1], "qas", "x"), "ab", "no_question", ["data[0], paragraphs[1]"]),
    "paragraph": (lambda p: _set(p, 1, [[]]), "ab", "unreadable", ["data[0], paragraphs[1]"]),
    "question": (lambda p: _set(p[1], "qas", [7]), "ab", "unreadable", ["…paragraphs[1], qas[0]"]),
    "no context": (lambda p: p[0].pop("context"), "7", "no_context", ["a", "b"]),
    "null context": (lambda p: _set(p[0], "context", None), "7", "no_context", ["a", "b"]),
    "list context": (lambda p: _set(p[0], "context", ["x"]), "7", "no_context", ["a", "b"]),
    "empty context": (lambda p: _set(p[0], "context", ""), "7", "no_context", ["a", "b"]),
    "blank context": (lambda p: _set(p[0], "context", " \n"), "7", "no_context", ["a", "b"]),
    "half a pair": (lambda p: _set(p[0], "context", "a\ud83d"), "7", "no_context", ["a", "b"]),
    "no question": (lambda p: p[0]["qas"][1].pop("question"), "a7", "no_question", ["b"]),
    "list question": (lambda p: _set(p[1]["qas"][0], "question", []), "ab", "no_question", ["7"]),
    "null question": (lambda p: _set(p[1]["qas"][0], "question", None), "ab", "no_question", ["7"]),
    "answers": (lambda p: _set(p[0]["qas"][0], "answers", [[1]]), "b7", "unreadable", ["a"]),
    "answer": (lambda p: _set(p[0]["qas"][0], "answers", True), "b7", "unreadable", ["a"]),
    "no text": (
        lambda p: p[0]["qas"][0]["answers"][0].pop("text"),
        "b7",
        "unreadable",
        ["a"],
    ),
}


@pytest.mark.parametrize("fault", LEFT_OUT)
def test_a_record_that_cannot_be_used_is_left_out_and_counted(tmp_path, fault):
    change, kept, reason, names = LEFT_OUT[fault]
    data = official()
    change(data["data"][0]["paragraphs"])
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(data))
    tally = Tally()
    assert "".join(e.id for e in read_examples(str(path), tally=tally)) == kept
    first = [name.replace("data[0], paragraphs", "…paragraphs") for name in tally.first[reason]]
    assert first == [name.replace("data[0], paragraphs", "…paragraphs") for name in names]
    assert {key: tally.counts.get(key, 0) for key in UNREAD if key != reason} == {
        key: 0 for key in UNREAD if key != reason
    }
    assert tally.counts == {"read": 3, reason: 3 - len(kept)}
    (note,) = tally.notes({})
    assert note.startswith(f"{len(names)} of 3 questions") and note.endswith(
        f"left out ({', '.join(tally.first[reason])})."
    )


def test_of_many_the_first_three_are_named(tmp_path):
    rows = [{"id": n, "question": "?", "context": None if n else "c"} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text(lines(rows))
    tally = Tally()
    assert len(read_examples(str(tmp_path / "rows.jsonl"), tally=tally)) == 1
    assert tally.notes({}) == ["5 of 6 questions have no context: left out (1, 2, 3, …)."]


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ([], ["no question in it", "at least one"]),
        ([{"paragraphs": []}], ["no question in it", "at least one"]),
        ([{"id": "a", "question": "?"}], ["[0] (id \"a\"): no 'context' (it has id, question)"]),
        ([{"context": "c", "text": "?"}], ["[0]: no 'question' (it has context, text)"]),
        ([{"context": None, "question": "?"}], ["[0]: its context is null"]),
        (["Who?", {}], ["[0]: str where an object belongs"]),
        ({"q1": "Rollo"}, ["no 'question' (it has q1)"]),
        ({}, ["no 'question' (it has nothing)"]),
    ],
)
def test_a_file_without_a_question_says_what_is_wrong_with_the_first(tmp_path, rows, parts):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    refused(path, *parts)


def test_columns_under_other_names(tmp_path):
    path = tmp_path / "rows.parquet"
    write_parquet(path, [{"id": "a", "passage": CONTEXT, "question": "Who?"}])
    refused(path, "row 0", "no 'context' (it has id, passage, question)")
    path = tmp_path / "rows.csv"
    path.write_text("id,passage,question\na,b,c\n")
    refused(path, 'line 2 (id "a")', "no 'context' (it has id, passage, question)")


# Exports of other programs, shortened, as their own pages show them.
FOREIGN = {
    "Label Studio": (
        [
            {
                "id": 1,
                "data": {"text": "Anna Weber leads.", "question": "Who?"},
                "annotations": [{"id": 3, "result": [{"value": {"start": 0, "end": 10}}]}],
                "predictions": [],
            }
        ],
        ["Label Studio", "JSON-MIN"],
    ),
    "Label Studio, short": (
        [{"text": "Anna leads.", "label": [{"start": 0}], "annotator": 1, "annotation_id": 2}],
        ["Label Studio", "context, question and answer", "JSON-MIN"],
    ),
    "doccano": ([{"id": 1, "text": "Anna leads.", "label": [[0, 4, "A"]]}], ["doccano", "JSONL"]),
    "doccano 1": (
        [{"id": 1, "text": "Anna.", "annotations": [{"start_offset": 0}], "meta": {}}],
        ["doccano"],
    ),
    "DuReader": (
        [{"question_id": 1, "question": "?", "documents": [{"paragraphs": ["a"]}], "answers": []}],
        ["DuReader", "DuReader-robust"],
    ),
    "pandas": (
        {"id": {"0": "a"}, "question": {"0": "?"}, "context": {"0": "c"}},
        ["by columns", 'to_json(orient="records")'],
    ),
    "columns": ({"question": ["?"], "context": ["c"]}, ['to_json(orient="records")']),
    "pandas split": (
        {"columns": ["question", "context"], "index": [0], "data": [["?", "c"]]},
        ['to_json(orient="records")'],
    ),
}


@pytest.mark.parametrize("form", FOREIGN)
def test_forms_that_are_not_read_are_named(tmp_path, form):
    content, parts = FOREIGN[form]
    path = tmp_path / "export.json"
    path.write_text(json.dumps(content))
    refused(path, *parts)


def test_an_export_with_the_fields_that_are_asked_for_is_read(tmp_path):
    row = {
        "id": 5,
        "context": "Anna Weber leads.",
        "question": "Who?",
        "answer": [{"start": 0, "end": 10, "text": "Anna Weber", "labels": ["Answer"]}],
        "annotator": 1,
        "annotation_id": 2,
        "lead_time": 3.5,
    }
    (tmp_path / "min.json").write_text(json.dumps([row]))
    (example,) = read_examples(str(tmp_path / "min.json"))
    assert (example.answers[0].text, example.answers[0].start) == ("Anna Weber", 0)


def zipped(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("train.json", json.dumps(official()))
    return path.read_bytes()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"", ["an empty file"]),
        (b" \n \n", ["an empty file"]),
        (b"\xef\xbb\xbf", ["an empty file"]),
        (zipped, ["zip archive", "unpack it"]),
        (LFS, ["git-LFS pointer", "git lfs pull"]),
        (b"\n<!DOCTYPE html>\n<html>", ["HTML", "raw"]),
        (pickle.dumps({}), ["pickle", "never read"]),
        (b"BZh91AY&SY", ["bzip2"]),
        (b"ARROW1\0\0", ["Arrow", "to_parquet"]),
        (b"hello", ["neither JSON nor a table", "give a SQuAD file"]),
        ('[{"context": "Küste"}]'.encode("latin-1"), ["not UTF-8"]),
        (b"PAR1 and no more", ["not a Parquet file"]),
        (b"\x1f\x8b and no more", ["cannot be read"]),
        # Without a time, as the bytes are part of the test's name, which all workers must agree on.
        (gzip.compress(b"[" * 99, mtime=0)[:-9], ["cannot be read"]),
        (gzip.compress(LFS, mtime=0), ["git-LFS pointer"]),
    ],
)
@pytest.mark.parametrize("name", ["data.json", "data.csv", "data.parquet"])
def test_files_that_are_not_data(tmp_path, content, parts, name):
    path = tmp_path / name
    path.write_bytes(content(path) if callable(content) else content)
    if name == "data.csv" and content in (b"hello",):
        parts = ["no question"]
    refused(path, *parts)


ROW = '{"id": "a", "question": "?", "context": "b"}'


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('{"data": [{"paragraphs": [', "in line 1"),
        ('{"data": [\n{"paragraphs": []}\n', "in line 3"),
        ('\n{\n"data": []\n}\n x', "Extra data in line 5, column 2"),
        ('{"data" []}', "in line 1, column 9"),
        (f"{ROW}\n\n{ROW}\n{{", "in line 4, column 2"),
        (f"{ROW} {{", "Extra data in line 1"),
        (f'{ROW}\n{ROW[:-9]}"\n{ROW}', "in line 2"),
        ("[" * 100_000, "nested too deeply in or after line 1"),
        (f'{ROW}\n{{"a": {"[" * 100_000}', "nested too deeply in or after line 2"),
        ('[{"id": ' + "1" * 5000 + "}]", "too many digits"),
    ],
)
@pytest.mark.parametrize("name", ["bad.json", "bad.jsonl"])
def test_a_fault_in_json_names_the_line(tmp_path, text, part, name):
    path = tmp_path / name
    path.write_text(text)
    refused(path, "not JSON", part)


def test_a_row_without_its_cells_is_named_by_its_line(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('question,context\n"a\nb",c\nd\n"e","f\n')
    tally = Tally()
    found = read_examples(str(path), tally=tally)
    assert [(e.question, e.context) for e in found] == [("a\nb", "c"), ("e", "f\n")]
    assert tally.first["no_context"] == ["line 4"]


def test_data_within_data(tmp_path):
    path = tmp_path / "deep.json"
    path.write_text('{"data": ' * 900 + "[]" + "}" * 900)
    refused(path)


def test_folders_are_refused_at_once(tmp_path):
    (tmp_path / "set").mkdir()
    write_parquet(tmp_path / "set" / "train.parquet", flat())
    for name in ("set", "set::validation"):
        with pytest.raises(UserError, match="a folder: name a file in it"):
            read_examples(str(tmp_path / name))
    with pytest.raises(UserError, match="a folder"):
        fingerprint(str(tmp_path / "set"))


def test_a_folder_of_save_to_disk_is_named(tmp_path):
    import datasets

    rows = datasets.Dataset.from_list(flat()[:2])
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=rows).save_to_disk(tmp_path / "several")
    for name in ("one", "several"):
        refused(tmp_path / name, "save_to_disk", "to_parquet")


def test_an_evaluation_needs_ids(tmp_path):
    (tmp_path / "rows.jsonl").write_text(lines([{"question": "?", "context": "c"}, *flat()]))
    source = str(tmp_path / "rows.jsonl")
    found = read_examples(source)
    with pytest.raises(UserError, match=r"1 questions have no id, such as number 0.*evaluation"):
        check_ids(source, found)
    check_ids(source, found[1:])


def test_unreadable_files(tmp_path):
    refused(tmp_path / "missing.json", "no such file", ".csv")
    refused("missing.jsonl", "no such file")
    refused("missing.tsv", "no such file")
    refused("some/where/else", "no such file")
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
