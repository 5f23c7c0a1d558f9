"""Which contexts of a source questions are made for."""

import json
from collections import Counter

import pytest

from kdfast.common.errors import UserError
from kdfast.synthetic.contexts import read_paragraphs
from tests import corpora


def test_squad_with_and_without_questions(tmp_path):
    article = corpora.article(1)
    bare = {
        "title": "Bare",
        "paragraphs": [{"context": "No question.", "qas": []}, {"context": ""}],
    }
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"data": [article, bare]}))
    counts = Counter()
    asked, unasked = read_paragraphs(str(path), counts)
    assert (asked.title, list(asked.answers)) == ("T1", ["Harald"])
    assert list(asked.questions) == ["Who was the leader of Denmark?", "What did the winter cost?"]
    assert (unasked.title, unasked.context, unasked.answers) == ("Bare", "No question.", {})
    assert counts == {"the context is empty or no text": 1}


def test_lines_records_and_tables(tmp_path):
    lines = tmp_path / "a.jsonl"
    record = {"question": "Who?", "context": "One.", "answers": ["One"], "title": "A"}
    lines.write_text("\n".join(map(json.dumps, [{"context": "Two."}, record, record])))
    two, one = read_paragraphs(str(lines), Counter())
    assert (two.context, one.context, list(one.answers)) == ("Two.", "One.", ["One"])
    table = tmp_path / "a.csv"
    table.write_text("title,context\nA,One.\nB,Two.\n")
    assert [each.title for each in read_paragraphs(str(table), Counter())] == ["A", "B"]


def test_plain_text(tmp_path):
    path = tmp_path / "town.txt"
    path.write_text("\n\nOne\nline.\n \n\nTwo.", encoding="utf-8-sig")
    found = read_paragraphs(str(path), Counter())
    assert [(each.title, each.context) for each in found] == [
        ("town", "One\nline."),
        ("town", "Two."),
    ]


def test_real_data():
    (path, questions) = (corpora.shared("newwiki_dev.json"), Counter())
    found = read_paragraphs(str(path), questions)
    data = json.loads(path.read_text(encoding="utf-8"))["data"]
    contexts = {p["context"] for article in data for p in article["paragraphs"]}
    assert {each.context for each in found} == contexts and not questions


@pytest.mark.parametrize(
    "name, content",
    [("a.json", "[]"), ("a.json", '{"context": 3.5e400}'), ("a.txt", "\n"), ("a.txt", "\xff")],
)
def test_nothing_to_use(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match="a\\."):
        read_paragraphs(str(tmp_path / name), Counter())
    with pytest.raises(UserError):
        read_paragraphs(str(tmp_path / "none.txt"), Counter())
