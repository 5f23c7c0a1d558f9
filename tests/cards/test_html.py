"""report.html: whole, without outer parts, and proof against what the data hold."""

import json
from html.parser import HTMLParser

import pytest

from kdfast.cards import html, render, run_files
from kdfast.common.files import sha256_of
from kdfast.data.examples import Answer, Example
from tests.browser import Browser
from tests.programs import edit

HOSTILE = [
    "</script><script>document.title = 'taken'</script> & &amp; &lt;b&gt;",
    "\"><img src=x onerror=\"document.title = 'taken'\"> ' quotes `${1}` {{ 7 * 7 }} {% raw %}",
    "<!-- <style>article{display:none} ]]> </textarea></article></body>",
    "\u202eright to left\u202c שלום עולם \u2067 and no end",
    "emoji 👩‍👩‍👧 e\u0301 combining, CJK 東京, a tab\tand\nlines",
]


class Page(HTMLParser):
    """Tags with their attributes, and the text of each element of a class."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.contexts, self.questions, self.inside = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if attributes.get("class") == "context":
            self.contexts.append("")
        if tag == "h3":
            self.questions.append("")
        self.inside.append("context" if attributes.get("class") == "context" else tag)

    def handle_endtag(self, tag):
        if self.inside and tag in (self.inside[-1], "p"):
            self.inside.pop()

    def handle_data(self, data):
        if "context" in self.inside:
            self.contexts[-1] += data
        elif "h3" in self.inside:
            self.questions[-1] += data


@pytest.fixture
def hostile(finished):
    """The finished run, with hostile questions, contexts and answers instead of its data's."""
    data, lines = [], {}
    for number, text in enumerate(HOSTILE):
        context = f"{text} The gold is here, {number}. {text}"
        answers = [{"text": "gold", "answer_start": context.index("gold")}] if number % 2 else []
        asked = {"id": f"h{number}", "question": f"{text}?", "answers": answers}
        asked["is_impossible"] = not answers
        data.append({"title": text, "paragraphs": [{"context": context, "qas": [asked]}]})
        wrong = {"answer": text, "best_span": text, "null_odds": 0.0, "exact": 0.0, "f1": 0.0}
        right = {**wrong, "answer": "gold" if answers else "", "exact": 1.0, "f1": 1.0}
        own, other = (wrong, right) if number < 3 else (right, wrong)
        lines[f"h{number}"] = {**own, "compared": other}
    path = finished.folder.parent / "dev.json"
    path.write_text(json.dumps({"data": data}))
    answers = finished.folder / "eval" / "dev.questions.json"
    answers.write_text(json.dumps(lines))
    edit(finished.folder, "run.json", config__validation_file=str(path))
    edit(finished.folder, "eval/dev.eval.json", file=str(path), questions_sha256=sha256_of(answers))
    finished.contexts = [each["paragraphs"][0]["context"] for each in data]
    return finished


def written(finished):
    files = run_files.read_run(finished.folder)
    plots = {"figures/loss.png": "loss"} if (finished.folder / "figures").is_dir() else {}
    return html.write(files, plots)


def test_nothing_comes_from_outside(finished):
    page = Page((finished.folder / "report.html").read_text())
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"link", "iframe", "object", "embed", "base"}
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert name not in ("srcset", "href", "action") and not name.startswith("on")
            assert name != "src" or (tag == "img" and value.startswith("data:image/png;base64,"))
    styles = (html.TEMPLATES / "report.css").read_text()
    assert "url(" not in styles and "@import" not in styles
    assert len(page.contexts) == 10  # every question of the run's validation data


def test_hostile_text_stays_text(hostile):
    page = Page(written(hostile).read_text())
    assert sorted(page.contexts) == sorted(map(render.shown_in_html, hostile.contexts))
    assert sorted(page.questions) == sorted(render.shown_in_html(f"{text}?") for text in HOSTILE)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert [tag for tag, _ in page.tags].count("img") == 1  # the picture
    assert all(
        "dir" in attributes
        for tag, attributes in page.tags
        if tag in ("h3", "p") and (tag == "h3" or attributes.get("class") == "context")
    )


def test_a_lone_surrogate(finished):
    path = finished.folder / "eval" / "dev.questions.json"
    lines = json.loads(path.read_text())
    next(iter(lines.values()))["answer"] = "\ud83d"
    path.write_text(json.dumps(lines))
    edit(finished.folder, "eval/dev.eval.json", questions_sha256=sha256_of(path))
    assert "\\ud83d" in written(finished).read_text("utf-8")


def test_no_questions_without_answers_to_them(finished):
    for path in (finished.folder / "eval").iterdir():
        path.unlink()
    text = written(finished).read_text()
    assert "No question was answered" in text and "<article" not in text
    run = json.loads((finished.folder / "run.json").read_text())
    assert f"F1 {run['metrics']['f1']:.2f}" in text


def test_the_worst_come_first_and_not_all(monkeypatch):
    def line(f1, other):
        return {
            "answer": "a",
            "f1": f1,
            "exact": float(f1 == 1),
            "compared": {"answer": "b", "f1": other, "exact": float(other == 1)},
        }

    lines = {
        "right": line(1, 0),
        "half": line(0.5, 1),
        "both": line(0, 0),
        "teacher": line(0, 1),
        "right2": line(1, 1),
        "unknown": line(0, 1),
    }
    examples = [Example(key, "", key, "a b", ()) for key in lines if key != "unknown"]

    def shown():
        return [each["question"] for each in html.questions_of(lines, examples)]

    assert shown() == ["teacher", "both", "half", "right2", "right"]
    monkeypatch.setattr(html, "WRONG_SHOWN", 1)
    monkeypatch.setattr(html, "RIGHT_SHOWN", 1)
    assert shown() == ["teacher", "right2"]


def test_an_answer_is_marked_where_it_meets_gold():
    context = "Rome, old Rome, new Rome"
    assert html.find(context, "Rome", []) == (0, 4)
    assert html.find(context, "Rome", [(6, 14)]) == (10, 14)
    assert html.find(context, "Rome", [(4, 5)]) == (0, 4)
    assert html.find(context, "Paris", []) is None and html.find(context, "", []) is None


def test_marks_overlap():
    spans = [(2, 6, "gold"), (4, 8, "own"), (4, 6, "other")]
    found = [(each["text"], each["marks"]) for each in html.pieces("0123456789", spans)]
    assert found == [
        ("01", ""),
        ("23", "gold"),
        ("45", "gold other own"),
        ("67", "own"),
        ("89", ""),
    ]


def test_a_long_context_is_cut_outside_its_marks():
    context = "a" * 5000 + "gold" + "b" * 500_000
    example = Example("x", "", "?", context, (Answer("gold", 5000),))
    line = {"answer": "gold", "f1": 1.0, "exact": 1.0}
    (shown,) = html.questions_of({"x": line}, [example])
    texts = [each["text"] for each in shown["pieces"]]
    assert texts[1] == "gold" and sum(map(len, texts)) < 5000
    assert texts[0].startswith("a" * 1000 + " […] ") and texts[2].endswith("b" * 1000)


def test_in_a_browser(hostile, tmp_path):
    browser = Browser(tmp_path / "profile", written(hostile).as_uri())
    try:
        evaluate = browser.evaluate
        assert evaluate("document.title").startswith("finished: report")  # no hostile text ran
        contexts = evaluate("[...document.querySelectorAll('.context')].map(e => e.textContent)")
        assert sorted(contexts) == sorted(map(render.shown_in_html, hostile.contexts))
        assert evaluate("document.querySelector('img').naturalWidth") > 500
        style = "getComputedStyle(document.querySelector('mark.own')).backgroundColor"
        assert evaluate(style) == "rgb(169, 200, 234)"

        def shown(**choices):
            for name, value in choices.items():
                evaluate(f"form.elements.{name}.value = {json.dumps(value)}")
            evaluate("form.elements.text.dispatchEvent(new Event('input', {bubbles: true}))")
            visible = "[...document.querySelectorAll('article')].filter(e => e.offsetHeight > 0)"
            count = evaluate("form.elements.count.value")
            found = evaluate(f"{visible}.map(e => e.querySelector('h3').textContent)")
            assert count == f"{len(found)} of 5 shown"
            asked = [render.shown_in_html(f"{text}?") for text in HOSTILE]
            return {asked.index(each) for each in found}

        assert shown() == {0, 1, 2, 3, 4}
        assert shown(kind="answerable") == {1, 3}
        assert shown(kind="unanswerable") == {0, 2, 4}
        assert shown(kind="", own="wrong") == {0, 1, 2}
        assert shown(own="right") == {3, 4}
        assert shown(own="", other="wrong") == {3, 4}
        assert shown(other="", text="  東京 ") == {4}
        assert shown(text="</SCRIPT>") == {0}
        assert shown(text="nowhere") == set()
        asked = [
            each["params"]["request"]["url"].partition(":")[0]
            for each in browser.events
            if each["method"] == "Network.requestWillBeSent"
        ]
        assert set(asked) == {"file", "data"}
        faults = [each for each in browser.events if each["method"] == "Log.entryAdded"]
        assert not faults
    finally:
        browser.close()
