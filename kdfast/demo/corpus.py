"""The corpus as two files in the shape of SQuAD 2.0."""

from __future__ import annotations

import json
from pathlib import Path

from kdfast.common.files import write_text
from kdfast.common.folders import subfolder
from kdfast.demo.passages import Lesson, Passage, passages


def write_corpus(
    folder: Path,
    seed: int = 0,
    *,
    train_questions: int = 3000,
    validation_questions: int = 800,
    unlabelled: float = 0.0,
    lesson: Lesson = "full",
) -> tuple[Path, Path]:
    """Write train.json and validation.json into `folder`, made if missing; returns their paths.

    unlabelled: the share of training passages whose questions have no `answers` key. The bytes
    depend on the arguments alone. The validation never depends on `train_questions`.
    """
    folder = Path(folder)
    subfolder(folder)
    paths = []
    for side, count, share in (
        ("train", train_questions, unlabelled),
        ("validation", validation_questions, 0.0),
    ):
        found, _ = passages(side, count, seed, lesson)
        hidden = round(share * len(found))
        articles = [
            _article(passage, f"{side}-{seed}-{i}", labelled=i >= hidden)
            for i, passage in enumerate(found)
        ]
        path = folder / f"{side}.json"
        data = {"version": "v2.0", "data": articles}
        write_text(path, json.dumps(data, ensure_ascii=False, indent=1) + "\n")
        paths.append(path)
    return paths[0], paths[1]


def _article(passage: Passage, key: str, *, labelled: bool) -> dict:
    qas = []
    for i, question in enumerate(passage.questions):
        qa: dict = {"id": f"{key}-{i}", "question": question.text}
        if labelled:
            found = [{"text": question.answer, "answer_start": question.start}]
            qa["answers"] = found if question.answer else []
            qa["is_impossible"] = not question.answer
        qas.append(qa)
    return {"title": passage.title, "paragraphs": [{"context": passage.text, "qas": qas}]}
