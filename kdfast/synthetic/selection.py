"""Which of the generated questions are kept, as SQuAD JSON that says of each why."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from kdfast.data.examples import Answer, Lost, locate
from kdfast.evaluation.metrics import best_scores
from kdfast.synthetic.contexts import Paragraph

Record = dict[str, Any]


@dataclass(frozen=True)
class Thresholds:
    """What a question must reach; see the flags of kdfast.questions.

    margin_over: what the teacher's best span is compared with.
    """

    min_f1: float
    min_margin: float
    min_null_margin: float
    margin_over: Literal["no_answer", "second_span"]


def question_id(context: str, question: str) -> str:
    """An id that the two decide."""
    return hashlib.sha256(f"{context}\0{question}".encode()).hexdigest()[:24]


def select(
    paragraphs: list[Paragraph],
    lines: Mapping[int, Record],
    thresholds: Thresholds,
    about: Record,
    counts: Counter[str],
) -> Record:
    """The questions that are kept, in SQuAD 2.0's form, under their paragraphs.

    Args:
        paragraphs: All of them.
        lines: What was generated for each, by number.
        about: What each question says of where it is from.
        counts: Counts what is kept and what is dropped.
    """
    kept: dict[int, dict[str, Record]] = {number: {} for number in range(len(paragraphs))}
    pairs = []
    for number, paragraph in enumerate(paragraphs):
        line = lines[number]
        counts.update(line["dropped"])
        own = about | ({"revision": line["by"]} if line["by"] else {})
        for candidate in line["candidates"]:
            qa = _answerable(paragraph.context, candidate, thresholds, own, counts)
            if qa is None:
                continue
            kept[number][qa["id"]] = qa
            if candidate["pair"]:
                pairs.append((candidate["pair"], qa))
    for pair, qa in pairs:
        other = pair["paragraph"]
        unanswered = _unanswerable(paragraphs[other].context, pair, qa, thresholds, counts)
        if unanswered is not None:
            kept[other].setdefault(unanswered["id"], unanswered)
    counts["unanswerable"] = sum(
        qa["is_impossible"] for qas in kept.values() for qa in qas.values()
    )
    found = ((paragraphs[n], list(qas.values())) for n, qas in kept.items() if qas)
    return {"version": "v2.0", "data": _articles(found)}


def _answerable(
    context: str,
    candidate: Record,
    thresholds: Thresholds,
    about: Record,
    counts: Counter[str],
) -> Record | None:
    """A question with the teacher's answer; None where it is dropped."""
    verdict, given = candidate["verdict"], candidate["answer"]
    knows_null = thresholds.margin_over == "no_answer"
    margin = verdict["over_null" if knows_null else "over_second"]
    answer = verdict["answer"] if margin > 0 or not knows_null else ""
    if given and locate(context, Answer(given)) is Lost.ABSENT:
        counts["noted: its own answer is not in the passage, so the margin decides"] += 1
        given = ""
    f1 = best_scores((given,), answer)[1] if given and answer.strip() else None
    if f1 is not None and f1 >= thresholds.min_f1:
        kept_by = "agreement"
    elif answer.strip() and margin >= thresholds.min_margin:
        kept_by = "margin"
    else:
        why = "is not sure" if f1 is None else "finds another answer and is not sure"
        counts[f"the teacher {why if answer.strip() else 'finds no answer'}"] += 1
        return None
    counts[kept_by] += 1
    scores = {"answer": candidate["answer"], "f1": f1, "margin": margin}
    scores["margin_over"] = thresholds.margin_over
    return {
        "id": question_id(context, candidate["question"]),
        "question": candidate["question"],
        "answers": [{"text": answer, "answer_start": verdict["start"]}],
        "is_impossible": False,
        "synthetic": about | scores | {"kept_by": kept_by},
    }


def _unanswerable(
    context: str, pair: Record, qa: Record, thresholds: Thresholds, counts: Counter[str]
) -> Record | None:
    """A kept question asked of another passage; None where the teacher may find an answer there."""
    margin = pair["verdict"]["over_null"]
    if thresholds.margin_over != "no_answer" or -margin < thresholds.min_null_margin:
        counts["asked of another passage, the teacher is not sure that it has no answer"] += 1
        return None
    own = {"f1": None, "margin": margin, "kept_by": "no_answer", "asked_of": qa["id"]}
    return {
        "id": question_id(context, qa["question"]),
        "question": qa["question"],
        "answers": [],
        "is_impossible": True,
        "synthetic": qa["synthetic"] | own,
    }


def _articles(found: Iterable[tuple[Paragraph, list[Record]]]) -> list[Record]:
    articles: list[Record] = []
    for paragraph, qas in found:
        if not articles or not paragraph.title or articles[-1]["title"] != paragraph.title:
            articles.append({"title": paragraph.title, "paragraphs": []})
        articles[-1]["paragraphs"].append({"context": paragraph.context, "qas": qas})
    return articles
