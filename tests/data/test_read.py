"""Reading: every dialect of docs/data.md gives the same examples, from a file of any kind."""

import csv
import gzip
import io
import json
import os
import threading
import tracemalloc

import pytest

from kdfast.data import read
from kdfast.data.examples import Answer, Example
from kdfast.data.read import fingerprint, read_examples
from kdfast.data.tally import Tally
from tests.corpora import shared
from tests.data.source_files import CONTEXT, OTHER, flat, lines, official, write_parquet

EXAMPLES = [
    Example("a", "Normans", "Who led?", CONTEXT, (Answer("Rollo", 0),)),
    Example("b", "Normans", "When?", CONTEXT, ()),
    Example("7", "Normans", "Where is Sis?", OTHER, None),
]


def cells(rows, answers=json.dumps):
    """Rows as a table has them: answers as a text, and an empty cell for null."""
    for row in rows:
        told = row["answers"]
        yield {**row, "answers": "" if told is None else answers(told)}


def table(rows, mark=","):
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), delimiter=mark)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def paragraphs():
    return official()["data"][0]["paragraphs"]


def renamed(records, **names):
    """Records under other keys."""
    return [{names.get(key, key): value for key, value in each.items()} for each in records]


def mrqa():
    """As MRQA's shared task has them; its qid is what figures go by."""
    rows = [{"header": {"dataset": "made up", "split": "dev"}}]
    for paragraph in paragraphs():
        for n, qa in enumerate(paragraph["qas"]):
            qa["qid"], qa["id"] = str(qa["id"]), f"not this {n}"
            if "answers" in qa:
                qa["answers"] = [each["text"] for each in qa["answers"]]
                spans = [[0, 4]]  # the last character's number, not the one after it
                found = [{"text": text, "char_spans": spans} for text in qa["answers"]]
                qa["detected_answers"] = found
        rows.append({**paragraph, "context_tokens": [["Rollo", 0]]})
    return rows


def korquad2():
    """One context an article, answers in the singular, with places in its HTML too."""
    data = []
    for paragraph in paragraphs():
        for qa in paragraph["qas"]:
            if qa.get("answers"):
                (answer,) = qa.pop("answers")
                qa["answer"] = {**answer, "html_answer_start": 90, "html_answer_text": "<b>R</b>"}
        data.append({"title": "Normans", "url": "https://", "raw_html": "<html>", **paragraph})
    return {"version": "KorQuAD_2.0", "data": data}


def cmrc():
    """CMRC 2018's own form; its answers are texts."""
    return [
        {
            "context_id": "1",
            "context_text": paragraph["context"],
            "title": "Normans",
            "qas": renamed(paragraph["qas"], id="query_id", question="query_text"),
        }
        for paragraph in paragraphs()
    ]


def numpy_text(answers):
    """As a pandas table of a hub's data set writes a cell."""
    texts, starts = answers["text"], answers["answer_start"]
    return f"{{'text': array({texts}, dtype=object), 'answer_start': array({starts}, dtype=int32)}}"


def text_column(rows):
    """A table with one answer a row, as chaii on Kaggle has it."""
    for row in rows:
        told = row["answers"] or {"text": [], "answer_start": []}
        yield {
            **{key: value for key, value in row.items() if key != "answers"},
            "answer_text": (told["text"] or [""])[0],
            "answer_start": (told["answer_start"] or [""])[0],
        }


# What cannot say that nobody labelled the last question, says that it has no answer.
LABELLED = [*EXAMPLES[:2], Example("7", "Normans", "Where is Sis?", OTHER, ())]
UNTITLED = [Example(e.id, "", e.question, e.context, e.answers) for e in EXAMPLES]

# File name -> (content, the examples).
FORMS = {
    "official.json": (json.dumps(official()), EXAMPLES),
    "byte_order_mark.json": ("\ufeff" + json.dumps(official()), EXAMPLES),
    "indented.json": (json.dumps(official(), indent=2), EXAMPLES),
    "indented.jsonl": ("\n\n" + json.dumps(official(), indent=2), EXAMPLES),
    "whole on a line.jsonl": (json.dumps(official()) + "\n", EXAMPLES),
    "articles.jsonl": (lines(official()["data"]), EXAMPLES),
    "paragraphs.json": (json.dumps(paragraphs()), UNTITLED),
    "paragraphs.jsonl": (lines(paragraphs()), UNTITLED),
    "one article.json": (json.dumps(official()["data"][0]), EXAMPLES),
    "list.json": (json.dumps(flat()), EXAMPLES),
    "list on a line.jsonl": (json.dumps(flat()), EXAMPLES),
    "data.json": (json.dumps({"version": 1.5, "data": flat(), "n": 12}), EXAMPLES),
    "lines.jsonl": (lines(flat()), EXAMPLES),
    "blank lines.jsonl": (lines(flat()).replace("\n", "\r\n \r\n"), EXAMPLES),
    "lines.json": (lines(flat()), EXAMPLES),
    "mrqa.jsonl": (lines(mrqa()), UNTITLED),
    "korquad2.json": (json.dumps(korquad2()), EXAMPLES),
    "cmrc.json": (json.dumps(cmrc()), EXAMPLES),
    "guid.json": (json.dumps(renamed(flat(), id="guid")), EXAMPLES),
    "question_id.json": (json.dumps(renamed(flat(), id="question_id")), EXAMPLES),
    "answers as text.jsonl": (lines(cells(flat())), LABELLED),
    "table.csv": (table([*cells(flat())]), LABELLED),
    "table.tsv": (table([*cells(flat())], "\t"), LABELLED),
    "semicolons.csv": (table([*cells(flat())], ";"), LABELLED),
    "python.csv": (table([*cells(flat(), str)]), LABELLED),
    "numpy.csv": (table([*cells(flat(), numpy_text)]), LABELLED),
    "one answer a row.csv": (table([*text_column(flat())]), LABELLED),
    "Headings.csv": (table(renamed([*cells(flat())], question=" Question ")), LABELLED),
    "table.txt": (table([*cells(flat())]), LABELLED),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_examples(tmp_path, form, packed):
    text, expected = FORMS[form]
    path = tmp_path / (form + ".gz" if packed else form)
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    tally = Tally()
    found = read_examples(str(path), tally=tally)
    assert found == expected
    assert found[0].context is found[1].context
    assert tally.counts.pop("read") == 3 and set(tally.counts) <= {"empty_answer"}


@pytest.mark.parametrize("packed", [False, True])
def test_parquet(tmp_path, packed):
    path = tmp_path / "rows.parquet"
    write_parquet(path, flat())
    if packed:
        path.write_bytes(gzip.compress(path.read_bytes()))
    assert read_examples(str(path)) == EXAMPLES


def test_the_hub_s_form_of_mrqa(tmp_path):
    detected = {
        "text": ["rollo", "Normans"],
        "char_spans": [{"start": [0], "end": [4]}, {"start": [14], "end": [20]}],
        "token_spans": [{"start": [0], "end": [0]}, {"start": [3], "end": [3]}],
    }
    row = {"qid": "a", "question": "Who?", "context": CONTEXT, "answers": ["Rollo", "Rolf"]}
    write_parquet(tmp_path / "rows.parquet", [row | {"detected_answers": detected}])
    (found,) = read_examples(str(tmp_path / "rows.parquet"))
    # The first text is the span's, which differs in case; the last one is not in the context.
    assert found.answers == (Answer("Rollo", 0), Answer("Normans", 14), Answer("Rolf"))


def test_a_pipe_is_read_once(tmp_path):
    write_parquet(tmp_path / "rows.parquet", flat())
    for content in ((tmp_path / "rows.parquet").read_bytes(), json.dumps(official()).encode()):
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        writer = threading.Thread(target=pipe.write_bytes, args=(content,))
        writer.start()
        assert read_examples(str(pipe)) == EXAMPLES
        writer.join()
        pipe.unlink()


def test_utf_16_with_its_mark(tmp_path):
    """As a spreadsheet saves "Unicode text"."""
    path = tmp_path / "sheet.txt"
    path.write_bytes(table([*cells(flat())], "\t").encode("utf-16"))
    assert read_examples(str(path)) == LABELLED


def test_missing_answers_column_is_unlabelled(tmp_path):
    rows = [{k: v for k, v in row.items() if k not in ("answers", "title")} for row in flat()]
    write_parquet(tmp_path / "rows.parquet", rows)
    found = read_examples(str(tmp_path / "rows.parquet"))
    assert [(e.answers, e.title) for e in found] == [(None, "")] * 3


def one(tmp_path, **changes):
    """The answers to a question whose record has these fields, and the tally."""
    row = {"id": "a", "question": "Who?", "context": CONTEXT, **changes}
    (tmp_path / "one.json").write_text(json.dumps([row]))
    tally = Tally()
    (found,) = read_examples(str(tmp_path / "one.json"), tally=tally)
    del tally.counts["read"]
    return found.answers, tally.counts


@pytest.mark.parametrize(
    ("stated", "start"),
    [
        (3, 3),
        (3.0, 3),
        ("3", 3),
        (" 3.0 ", 3),
        (-1, -1),
        ("-1", -1),
        (None, None),
        ("", None),
        (3.5, None),
        (True, None),
        ([], None),
        ("three", None),
        (float("nan"), None),
        (10**400, None),
    ],
)
def test_a_place_is_a_whole_number_or_none(tmp_path, stated, start):
    answers, _ = one(tmp_path, answers=[{"text": "Rollo", "answer_start": stated}])
    assert answers == (Answer("Rollo", start),)


@pytest.mark.parametrize(
    ("told", "texts"),
    [
        ({"answers": ["Rollo", "Rolf"]}, ["Rollo", "Rolf"]),
        ({"answers": "Rollo"}, ["Rollo"]),
        ({"answers": "[Rollo"}, ["[Rollo"]),
        ({"answers": {"text": "Rollo", "answer_start": 0}}, ["Rollo"]),
        ({"answers": {"text": ["Rollo", "Rolf"], "answer_start": [0]}}, ["Rollo", "Rolf"]),
        ({"answers": [{"text": ["Rollo"], "answer_start": [0]}]}, ["Rollo"]),
        ({"answers": [{"text": 1066, "answer_start": 0}]}, ["1066"]),
        ({"answers": [{"text": 1066.0}, {"text": 2.5}]}, ["1066", "2.5"]),
        ({"answers": [{"text": ["x", []]}, {"text": "Rollo"}]}, ["x", "Rollo"]),
        ({"answer": "Rollo", "answer_start": 0}, ["Rollo"]),
        ({"answers": [], "answer": {"text": "Rollo"}}, ["Rollo"]),
        ({"answers": [], "is_impossible": False}, []),
        ({"is_impossible": True}, []),
        ({"is_impossible": "True"}, []),
        ({"is_impossible": 1}, []),
        ({"is_impossible": "1", "answers": None}, []),
        ({"is_impossible": 0}, None),
        ({"is_impossible": "false"}, None),
        ({"plausible_answers": [{"text": "x", "answer_start": 0}]}, None),
        ({}, None),
    ],
)
def test_answers_and_the_lack_of_them(tmp_path, told, texts):
    answers, counts = one(tmp_path, **told)
    assert (answers and [each.text for each in answers]) == (texts or answers)
    assert (answers is None) == (texts is None) and counts == {}


def test_the_answers_count_and_not_the_mark(tmp_path):
    """As in the official script, whose make_qid_to_has_ans looks at answers alone."""
    told = [{"text": "Rollo", "answer_start": 0}]
    answers, counts = one(tmp_path, answers=told, is_impossible=True)
    assert answers == (Answer("Rollo", 0),) and counts == {"impossible_with_answers": 1}


@pytest.mark.parametrize("text", ["", " \n", None])
def test_an_answer_without_a_text_is_none(tmp_path, text):
    """As Haystack 1.x exports questions without an answer."""
    answers, counts = one(tmp_path, answers=[{"text": text, "answer_start": -1}])
    assert answers == () and counts == {"empty_answer": 1}
    told = [{"text": text, "answer_start": 0}, {"text": "Rollo", "answer_start": 0}]
    answers, counts = one(tmp_path, answers=told)
    assert answers == (Answer("Rollo", 0),) and counts == {}


def test_ids_are_texts_made_where_there_are_none_and_made_unlike(tmp_path):
    ids = [1.0, 7, None, "a", True, "a", "a#2", "a", "", "\ud800"]
    rows = [{"id": each, "question": f"{n}?", "context": "c"} for n, each in enumerate(ids)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    tally = Tally()
    found = read_examples(str(tmp_path / "rows.json"), tally=tally)
    assert [e.id for e in found] == ["1", "7", "2", "a", "4", "a#2", "a#2#2", "a#3", "8", "9"]
    assert [e.numbered for e in found].count(True) == 4 and found[2].numbered
    assert [e.renamed_from for e in found if e.renamed_from] == ["a", "a#2", "a"]
    assert tally.counts["same_id"] == 3 and tally.first["same_id"] == ["a", "a#2", "a"]
    (note,) = tally.notes({})
    assert note.startswith("3 of 10 questions have an id that an earlier one has")


def test_titles_are_never_checked(tmp_path):
    for title, text in {7: "7", 2.5: "2.5", None: "", True: "", "T": "T"}.items():
        data = official()
        data["data"][0]["title"] = title
        (tmp_path / "titles.json").write_text(json.dumps(data))
        assert {e.title for e in read_examples(str(tmp_path / "titles.json"))} == {text}


def test_lines_are_not_held_together(tmp_path):
    row = {"context": "x " * 500, "question": "y"}
    path = tmp_path / "long.jsonl"
    path.write_text(lines([{**row, "id": str(i)} for i in range(10_000)]))
    tracemalloc.start()
    try:
        count = sum(1 for _ in read.iter_examples(str(path)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 10_000
    assert path.stat().st_size > 10e6
    assert peak < 4e6


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


def read_lines(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tally = Tally()
    return read_examples(str(path), tally=tally), tally


def test_a_number_that_is_anothers_id_is_not_given_again(tmp_path):
    row = {"question": "Who?", "context": CONTEXT, "answers": []}
    (first, second), tally = read_lines(tmp_path, {**row, "id": "1"}, row)
    assert (first.id, second.id, second.renamed_from) == ("1", "1#2", None)
    assert tally.counts["same_id"] == 1


def test_a_record_that_is_no_object_has_its_number_too(tmp_path):
    row = {"question": "Who?", "context": CONTEXT}
    found, _ = read_lines(tmp_path, row, 5, row)
    assert [each.id for each in found] == ["0", "2"]


def test_a_null_does_not_hide_the_context_of_the_paragraph(tmp_path):
    asked = {"id": "a", "question": "Who?", "context": None}
    (found,), _ = read_lines(tmp_path, {"context": CONTEXT, "qas": [asked]})
    assert found.context == CONTEXT


@pytest.mark.parametrize("empty", [{"text": [], "answer_start": []}, [], "", "[]", {"text": [""]}])
def test_an_empty_form_of_answers_does_not_hide_another(tmp_path, empty):
    row = {"id": "a", "question": "Who?", "context": CONTEXT, "answers": empty, "answer": "Rollo"}
    (found,), _ = read_lines(tmp_path, row)
    assert [each.text for each in found.answers] == ["Rollo"]


def test_a_text_that_stands_in_the_context_is_no_json(tmp_path):
    row = {"id": "a", "question": "Which note?", "context": "As Smith [1] says.", "answer": "[1]"}
    (found,), _ = read_lines(tmp_path, row)
    assert [each.text for each in found.answers] == ["[1]"]
    (found,), _ = read_lines(tmp_path, {**row, "context": "The empty list is [].", "answer": "[]"})
    assert found.answers == ()
