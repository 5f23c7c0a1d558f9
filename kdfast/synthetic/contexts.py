"""The paragraphs that questions are made for, with or without questions of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdfast.common.errors import UserError
from kdfast.data.parsing import CONTEXTS, PARTS, Parser, first_of
from kdfast.data.read import source_items
from kdfast.data.records import text_of, usable
from kdfast.data.tally import Tally


@dataclass
class Paragraph:
    """A context. answers, questions: the texts that its source has with it, each once, in order."""

    title: str
    context: str
    answers: dict[str, None] = field(default_factory=dict)
    questions: dict[str, None] = field(default_factory=dict)


def read_paragraphs(source: str, counts: Counter[str]) -> list[Paragraph]:
    """The distinct contexts of a source, in their order.

    Args:
        source: What docs/data.md lists, where a record needs no question here; or a .txt file,
            whose paragraphs stand between blank lines and are one article.
        counts: Counts what is left out.

    Raises:
        UserError: For a source that cannot be read, or holds no context.
    """
    found: dict[str, Paragraph] = {}
    parser = Parser(source, Tally())
    items = _plain(Path(source)) if source.lower().endswith(".txt") else source_items(source)
    try:
        for where, item in items:
            for title, context in _contexts(item, "", counts):
                found.setdefault(context, Paragraph(title, context))
            for example in parser.examples(where, item):
                paragraph = found[example.context]
                paragraph.questions[example.question] = None
                for answer in example.answers or ():
                    paragraph.answers[answer.text] = None
    except RecursionError:
        raise UserError(
            f"{source}: nested too deeply: give a file as docs/data.md has it."
        ) from None
    if not found:
        raise UserError(f"{source}: no context in it that can be used: see docs/data.md.")
    return list(found.values())


def _contexts(node: Any, title: str, counts: Counter[str]) -> Iterator[tuple[str, str]]:
    """(title, context) of each context in a record, at any depth."""
    if not isinstance(node, dict):
        return
    title = text_of(node.get("title")) or title
    key = first_of(node, CONTEXTS)
    if key is not None and node[key] is not None:
        context, fault = usable("context", node[key])
        if fault:
            counts["the context is empty or no text"] += 1
        else:
            yield title, context
    for part in PARTS:
        held = node.get(part)
        for each in held if isinstance(held, list) else [held]:
            yield from _contexts(each, title, counts)


def _plain(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    path = path.expanduser()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): check it.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text: save it as UTF-8.") from None
    lines: list[str] = []
    for line in [*text.splitlines(), ""]:
        if line.strip():
            lines.append(line)
        elif lines:
            yield "", {"title": path.stem, "context": "\n".join(lines)}
            lines = []
