"""What a generator is asked, and the questions in its reply."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from kdfast.data.records import unwritable
from kdfast.synthetic.contexts import Paragraph

PROMPT = """\
Read the passage, and write {count} questions that it answers.

- The answer to each question is a short span of the passage, copied word for word.
- Each question makes sense to somebody who does not see the passage, and names what it is about.
- Do not take over whole phrases of the passage into a question.
- Write in the language of the passage.

Reply with {count} lines and nothing else. Each line is one JSON object: \
{"question": "...", "answer": "..."}

Title: {title}
Passage:
{context}
"""
# Longer ones are no questions; the reply of a broken endpoint has no end.
MOST_CHARACTERS = 2000
MOST_OF_REPLY = 1 << 20


class Candidate(NamedTuple):
    """A generated question. answer: the generator's own, "" where it gave none."""

    question: str
    answer: str


def prompts_of(paragraph: Paragraph, template: str, count: int) -> list[tuple[str, str]]:
    """(prompt, answer) of a paragraph: one with the answer "", unless the template has {answer}.

    Then one for each answer that stands in the context once; {before} and {after} are the context
    before and after it.
    """
    names = {"title": paragraph.title, "context": paragraph.context, "count": str(count)}
    if "{answer}" not in template:
        return [(_filled(template, names), "")]
    found = []
    for answer in map(str.strip, paragraph.answers):
        if answer and paragraph.context.count(answer) == 1:
            before, _, after = paragraph.context.partition(answer)
            own = {"answer": answer, "before": before, "after": after}
            found.append((_filled(template, names | own), answer))
    return found


def candidates_of(reply: str, answer: str, counts: Counter[str]) -> list[Candidate]:
    """The questions in a reply.

    Args:
        reply: JSON objects with `question` and perhaps `answer`: one a line, or in one list, at any
            depth; other lines are left out. Where the prompt held an answer: its question.
        answer: That of the prompt, or "".
        counts: Counts what is dropped, by reason.
    """
    if len(reply) > MOST_OF_REPLY:
        counts["a reply is longer than a megabyte"] += 1
        return []
    reply = reply.rpartition("</think>")[2].strip()
    if not reply:
        counts["a reply is empty"] += 1
        return []
    if answer:
        pairs = [(reply.splitlines()[0], answer)]
    else:
        pairs = list(_pairs(reply))
        if not pairs:
            counts["a reply holds no question in JSON"] += 1
    found = []
    for question, own in pairs:
        if fault := _fault(question) or _fault(own, may_be_empty=True):
            counts[f"the question or its answer {fault}"] += 1
        else:
            found.append(Candidate(" ".join(question.split()), (own or "").strip()))
    return found


def _filled(template: str, names: dict[str, str]) -> str:
    """The template with {name} replaced, once: braces of the context stay, and those of JSON."""
    return re.sub(r"\{(\w+)\}", lambda found: names.get(found[1], found[0]), template)


def _pairs(reply: str) -> Iterator[tuple[Any, Any]]:
    """(question, answer), as they stand there."""
    lines = [_decoded(line.strip().rstrip(",")) for line in reply.splitlines()]
    found = list(_objects(lines))
    if not found:  # one value over several lines, perhaps in a fence
        begin = min((at for at in map(reply.find, "[{") if at >= 0), default=len(reply))
        end = max(map(reply.rfind, "]}"))
        found = list(_objects(_decoded(reply[begin : end + 1])))
    for each in found:
        yield each["question"], each.get("answer")


def _decoded(text: str) -> Any:
    if text[:1] not in ("{", "["):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _objects(value: Any, depth: int = 0) -> Iterator[dict[str, Any]]:
    """The objects with a question in a JSON value."""
    if isinstance(value, dict) and "question" in value:
        yield value
    elif isinstance(value, (dict, list)) and depth < 8:
        for each in value.values() if isinstance(value, dict) else value:
            yield from _objects(each, depth + 1)


def _fault(text: Any, may_be_empty: bool = False) -> str:
    """Why a text is left out; "" where it can be used."""
    if may_be_empty and text is None:
        return ""
    if not isinstance(text, str):
        return "is no text"
    folded = " ".join(text.split())
    if not folded and not may_be_empty:
        return "is empty"
    if len(folded) > MOST_CHARACTERS:
        return f"is longer than {MOST_CHARACTERS} characters"
    if unwritable(folded) or any(unicodedata.category(each) == "Cc" for each in folded):
        return "holds control characters"
    return ""
