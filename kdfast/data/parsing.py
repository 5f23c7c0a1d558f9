"""Decoded records of every dialect to examples; docs/data.md has the table of them."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from kdfast.common.errors import UserError
from kdfast.data.examples import Answer, Example
from kdfast.data.records import integer_of, is_true, kind_of, text_of, unwritable, usable
from kdfast.data.tally import Tally

# Keys under which a thing stands, the usual one first.
IDS = ("qid", "id", "guid", "question_id", "query_id")  # MRQA's figures go by qid where it has both
QUESTIONS = ("question", "query_text")
CONTEXTS = ("context", "context_text")
ANSWERS = ("answers", "answer", "answer_text")
TEXTS = ("text", "answer_text", "answer")
STARTS = ("answer_start", "start")
PARTS = ("data", "paragraphs", "qas")  # what holds records in turn


@dataclass(frozen=True, slots=True)
class _Context:
    text: str = ""
    fault: str = "no 'context'"  # why it cannot be used; "" where it can


@dataclass
class Parser:
    """Makes examples of the records of one source, in their order."""

    source: str
    tally: Tally  # counts what a user should hear, and what could not be used
    fault: str | None = None  # what was wrong with the first record that could not be used
    _number: int = 0
    _ids: set[str] = field(default_factory=set)
    _context: str = ""

    def examples(self, where: str, node: Any) -> Iterator[Example]:
        """Yields the questions in a record, or in an object that holds records at any depth.

        Args:
            where: what a message calls it.
            node: the decoded value.

        Raises:
            UserError: for a form that is not read.
        """
        return self._walk(where, node, "", _Context())

    def _walk(self, where: str, node: Any, title: str, context: _Context) -> Iterator[Example]:
        if not isinstance(node, dict):
            self.tally.add("read")
            self._number += 1
            self._leave_out(where, "unreadable", f"{kind_of(node)} where an object belongs")
            return
        if form := unread_form(node):
            raise UserError(f"{self.source}: {form}")
        title = text_of(node.get("title")) or title
        key = first_of(node, CONTEXTS)
        # A question's null does not hide the context of its paragraph.
        if key is not None and (node[key] is not None or context.fault):
            context = self._shared(node[key])
        parts = [part for part in PARTS if isinstance(node.get(part), (list, dict))]
        if parts == ["data"] and first_of(node, QUESTIONS):
            parts = []
        for part in parts[:1]:
            held = node[part] if isinstance(node[part], list) else [node[part]]
            for number, each in enumerate(held):
                at = f"{where}, {part}[{number}]" if where else f"{part}[{number}]"
                yield from self._walk(at, each, title, context)
        is_header = set(node) == {"header"}  # MRQA's first line
        example = None if parts or is_header else self._example(where, node, title, context)
        if example:
            yield example

    def _shared(self, value: Any) -> _Context:
        text, fault = usable("context", value)
        if text == self._context:
            text = self._context
        self._context = text
        return _Context(text, fault)

    def _example(self, where: str, node: dict, title: str, context: _Context) -> Example | None:
        self.tally.add("read")
        number, self._number = self._number, self._number + 1
        id_key = first_of(node, IDS)
        given = text_of(node[id_key]) if id_key else None
        if not given or unwritable(given):
            given = None
        at = where if given is None else f'{where} (id "{given}")'.strip()
        key = first_of(node, QUESTIONS)
        question, fault = usable("question", node[key]) if key else ("", "no 'question'")
        for reason, why in (("no_question", fault), ("no_context", context.fault)):
            if why:
                if why.startswith("no "):
                    why += f" (it has {', '.join(map(str, node)) or 'nothing'})"
                self._leave_out(at, reason, why, given)
                return None
        try:
            answers = self._answers(given or where, node, context.text)
        except ValueError as error:
            self._leave_out(at, "unreadable", str(error), given)
            return None
        name = str(number) if given is None else given
        renamed_from = None
        if name in self._ids:
            # A question without an id has no claim to what was predicted under this one.
            base, renamed_from, copy = name, given, 2
            self.tally.add("same_id", name)
            while name in self._ids:
                name, copy = f"{base}#{copy}", copy + 1
        self._ids.add(name)
        return Example(name, title, question, context.text, answers, given is None, renamed_from)

    def _leave_out(self, where: str, reason: str, why: str, name: str | None = None) -> None:
        self.tally.add(reason, name or where or "the first")
        self.fault = self.fault or (f"{where}: {why}" if where else why)

    def _answers(self, name: str, node: dict, context: str) -> tuple[Answer, ...] | None:
        """None: unlabelled. Raises ValueError where there are answers and none can be read."""
        held = [node[key] for key in ANSWERS if node.get(key) is not None]
        # An empty form of one key does not hide what another holds.
        filled = (
            each
            for each in held
            if any(text not in (None, "") for text, _ in _pairs(each, context))
        )
        raw = next(filled, held[0] if held else None)
        detected = node.get("detected_answers")
        impossible = is_true(node.get("is_impossible"))
        if raw is None and detected is None:
            return () if impossible else None
        found: list[Answer] = []
        texts: set[str] = set()
        empty, strange = 0, None
        for text, start in [
            *_detected(detected, context),
            *_pairs(raw, context, _of(node, STARTS)),
        ]:
            written = text_of(text)
            if written is None and text is not None:
                strange = text
            elif written is None or not written.strip():
                empty += 1
            else:
                answer = Answer(written, integer_of(start))
                # MRQA names each text, and again where it was found.
                if answer.start is not None or written not in texts:
                    found.append(answer)
                    texts.add(written)
        if strange is not None and not found:
            raise ValueError(f"its answers hold {kind_of(strange)} where a text belongs")
        if empty and not found:
            self.tally.add("empty_answer", name)
        if impossible and found:
            self.tally.add("impossible_with_answers", name)
        return tuple(found)


def _pairs(raw: Any, context: str, start: Any = None) -> Iterator[tuple[Any, Any]]:
    """(text, place) of each answer in a value of ANSWERS.

    Lists of {text, answer_start}, {text: [...], answer_start: [...]}, one {text, answer_start},
    texts, one text, and each of these as JSON or as Python prints it, unless the text itself, such
    as "[1]", stands in the context. start: the place, or places, that stand next to the
    value.
    """
    if isinstance(raw, str):
        decoded = _decoded(raw)
        if not decoded or raw.strip() not in context:
            raw = decoded
    items = raw if isinstance(raw, list) else [] if raw is None else [raw]
    starts = start if isinstance(start, list) else [start]
    for item, place in zip_longest(items, starts[: len(items)]):
        if not isinstance(item, dict):
            yield item, place
            continue
        key = first_of(item, TEXTS)
        texts, places = (item[key] if key else [item]), _of(item, STARTS)
        if not isinstance(texts, list):
            yield texts, places
            continue
        places = places if isinstance(places, list) else [places]
        yield from zip_longest(texts, places[: len(texts)])


def _detected(raw: Any, context: str) -> Iterator[tuple[Any, Any]]:
    """(text, place) of each span in MRQA's detected_answers, or in the hub's form of them."""
    if isinstance(raw, dict):
        keys = [key for key in raw if isinstance(raw[key], list)]
        raw = [
            dict(zip(keys, row, strict=True)) for row in zip_longest(*(raw[key] for key in keys))
        ]
    for item in raw if isinstance(raw, list) else []:
        if not isinstance(item, dict):
            yield item, None
            continue
        text, spans = item.get("text"), item.get("char_spans")
        if isinstance(spans, dict):
            spans = list(zip(*(_list(spans.get(key)) for key in ("start", "end")), strict=False))
        for span in _list(spans) or [()]:
            bounds = [integer_of(each) for each in span] if isinstance(span, (list, tuple)) else []
            first, last = bounds if len(bounds) == 2 else ((*bounds, None)[0], None)
            if first is None or last is None or not isinstance(text, str):
                yield text, first
                continue
            # The text may be one that is equal to the span but for case and blanks.
            found = context[max(first, 0) : max(last + 1, 0)]
            is_same = found.casefold().split() == text.casefold().split()
            yield found if is_same else text, first


def _decoded(text: str) -> Any:
    """What a text holds as JSON, or as Python or numpy prints it; the text where it is neither."""
    if text.lstrip()[:1] not in ("[", "{"):
        return text
    plain = re.sub(r"array\((\[.*?\])(?:,\s*dtype=\w+)?\)", r"\1", text, flags=re.DOTALL)
    for decode, each in ((json.loads, text), (ast.literal_eval, text), (ast.literal_eval, plain)):
        try:
            return decode(each.strip())
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    return text


def unread_form(node: dict) -> str | None:
    """What a record is, and the remedy, where it is of a known form that is not read."""
    question, context = first_of(node, QUESTIONS), first_of(node, CONTEXTS)
    if question and context:
        if all(isinstance(node[key], (dict, list)) for key in (question, context)):
            return 'a table written by columns: write it by rows, as to_json(orient="records") does'
        return None
    if isinstance(node.get("columns"), list) and isinstance(node.get("data"), list):
        return 'a table without keys: write it by rows, as to_json(orient="records") does'
    if question and isinstance(node.get("documents"), list):
        return (
            "DuReader's form, with several documents for a question: take DuReader-robust, which "
            "has SQuAD's form, or write a record with a context for each document"
        )
    if isinstance(node.get("data"), dict) and {"annotations", "completions"} & node.keys():
        return (
            "a JSON export of Label Studio: choose JSON-MIN there, in a project whose fields are "
            "named context, question and answer"
        )
    if {"annotation_id", "lead_time"} & node.keys():
        return (
            "an export of Label Studio without context and question: name the fields of the "
            "project context, question and answer, and export it as JSON-MIN"
        )
    marks = {"label", "labels", "entities", "annotations"} & node.keys()
    if marks and isinstance(node.get("text"), str) and not question:
        return (
            "an export of doccano, which has spans and no questions: choose JSONL there, and write "
            "a record with id, question, context and answers for each span"
        )
    return None


def first_of(node: dict, keys: tuple[str, ...]) -> str | None:
    """The first of `keys` that the object has, those that hold something before others."""
    empty = None
    for key in keys:
        if node.get(key) is not None:
            return key
        if empty is None and key in node:
            empty = key
    return empty


def _of(node: dict, keys: tuple[str, ...]) -> Any:
    key = first_of(node, keys)
    return node[key] if key else None


def _list(value: Any) -> list:
    return value if isinstance(value, list) else []
