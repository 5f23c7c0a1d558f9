"""What a run's files hold stays text: in the card, its front matter, the report and pictures."""

import json
import re
import shutil
import types
from html.parser import HTMLParser

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

pytest.importorskip("matplotlib")

from kdfast.cards import figures, html, model_card, render, run_files
from kdfast.common.files import sha256_of
from kdfast.data.examples import Answer, Example
from tests.programs import edit

HOSTILE = [
    "a`b``c``` *d* _e_ __f__ ~~g~~ # h | i || j $k$ $$l$$ \\(m\\) &amp; &lt;n",
    "</script><script>alert(1)</script><img src=x onerror=alert(1)><!--",
    "[link](https://evil.example) ![picture](https://evil.example/p.png) <https://evil.example>",
    "https://evil.example www.evil.example \\`x\\` \\| \\[y](z) [r]: https://evil.example",
    "x\n---\nlicense: evil\n---\n\n# h\n\n- item\n\n| a | b |\n|--|--|\n| c | d |\n\n```\ncode",
    "\u202eright\u2066 to\u200b left\ufeff \x1b[31mr\x07 \x00n \u2028l \x85x \ud83d \U000e0041",
    "'\"{{ 7 * 7 }}{% raw %}: - ? ! % @ & * > # `",
    "|",
    "$x_{$",
]
BENIGN = "plain text"
UNSEEN = re.compile(
    "[\u202a-\u202e\u2066-\u2069\u200b\ufeff\x00-\x08\x1b\x7f\x85\u2028\ud800-\udfff]"
)


def with_strings(content, text):
    """JSON with every string but the key of the weights replaced by `text`."""
    if isinstance(content, dict):
        kept = "weights_sha256"
        return {k: each if k == kept else with_strings(each, text) for k, each in content.items()}
    if isinstance(content, list):
        return [with_strings(each, text) for each in content]
    return text if isinstance(content, str) else content


class Elements(HTMLParser):
    """The elements of a page in their order, without their text."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, sorted(name for name, _ in attributes)))

    def handle_comment(self, data):
        self.found.append("comment")


def markdown_elements(text):
    """Types of all that a parser finds in Markdown, with tables, but for text."""
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    found = []
    for token in parser.parse(text):
        inner = (each.type for each in token.children or [])
        found += [token.type, *(each for each in inner if not each.startswith("text"))]
    return found


def shape(content):
    """A value of YAML without its strings."""
    if isinstance(content, dict):
        return {name: shape(each) for name, each in content.items()}
    if isinstance(content, list):
        return [shape(each) for each in content]
    return str if isinstance(content, str) else content


def shown(finished, text, monkeypatch):
    """Elements of the card, shape of its front matter, elements of the report, and all their text,
    of a run in whose files every string is `text`."""
    folder = finished.folder.rename(finished.folder.with_name(re.sub(r"[/\0\ud83d]", " ", text)))
    finished.folder = folder
    paths = [folder / "run.json", folder / "eval" / "dev.eval.json"]
    questions = json.loads((folder / "eval" / "dev.questions.json").read_text())
    for path in paths:
        path.write_text(json.dumps(with_strings(json.loads(path.read_text()), text)))
    name = re.sub(r"[\x00-\x1f\x7f/\\\ud83d]", " ", text)
    answers = folder / "eval" / f"{name}.questions.json"
    answers.write_text(json.dumps(with_strings(questions, text)))
    edit(folder, "eval/dev.eval.json", name=name, questions_sha256=sha256_of(answers))
    examples = [Example(key, text, text, f"{text} {text}", (Answer(text, 0),)) for key in questions]
    monkeypatch.setattr(html, "read_examples", lambda *_, **__: examples)
    files = run_files.read_run(folder)
    plots = dict.fromkeys((f"figures/{each.name}" for each in (folder / "figures").iterdir()), "")
    if text != BENIGN:
        assert figures.save(files).keys() == plots.keys() and len(plots) == 4
    card = model_card.card_of(files, plots, None, text, text)
    report = html.write(files, plots).read_text()
    _, front, body = re.split("^---\n", card, maxsplit=2, flags=re.M)
    assert ModelCard(card).text.strip() == body.strip()
    assert not UNSEEN.search(card + report)
    return markdown_elements(body), shape(yaml.safe_load(front)), Elements(report).found, card


@pytest.mark.parametrize("text", HOSTILE)
def test_text_adds_no_element(finished, monkeypatch, text, tmp_path):
    again = types.SimpleNamespace(folder=shutil.copytree(finished.folder, tmp_path / "again"))
    expected = shown(finished, BENIGN, monkeypatch)
    found = shown(again, text, monkeypatch)
    for mine, other in zip(expected[:3], found[:3], strict=True):
        assert mine == other


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_says_what_was_given(text):
    """A parser reads the text itself again, in a line, in code marks and in a cell."""
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    wanted = render.plain(text).strip()
    inline = parser.parse(f"a {render.markdown(text)} z")[1].children
    assert "".join(each.content for each in inline) == f"a {wanted} z".replace("  ", " ")
    (before, code, after) = parser.parse(f"a {render.code(text)} z")[1].children
    assert (before.content, code.type, after.content) == ("a ", "code_inline", " z")
    assert code.content.strip() == wanted
    table = parser.parse(f"| a | b |\n|--|--|\n| {render.markdown(text)} | 1 |\n")
    cells = [each for each in table if each.type == "inline"]
    assert len(cells) == 4 and "".join(e.content for e in cells[2].children) == wanted


def test_bare_links_are_none():
    for link in ("https://a.example", "WWW.a.example", "ftp://a.example"):
        assert link not in render.markdown(link)
    assert render.markdown("squad_v2: a.b (c)") == "squad_v2: a.b (c)"


def test_a_dollar_in_a_name_begins_no_formula(finished):
    edit(finished.folder, "eval/dev.eval.json", compared_with__name="$x_{$ $\\nothing$" + "y" * 99)
    drawn = figures.save(run_files.read_run(finished.folder))
    assert "figures/tradeoff.png" in drawn
