"""Writes pipeline_answers.json: what the question-answering pipeline of transformers 4 answers.

    python -m venv v4
    v4/bin/pip install torch==2.13.0 transformers==4.57.6
    v4/bin/python tests/golden/make_pipeline_answers.py

Every call is made in float32 and in float64, and must give the same answers, so that no golden
answer hangs on rounding. The last reader is also asked for all texts at once, and what it refuses.
"""

import importlib.metadata
import json
import sys
import warnings
from pathlib import Path

import torch
from transformers import pipeline

HERE = Path(__file__).parent
READERS = {
    "teacher": HERE.parents[1] / "kdfast" / "demo" / "teacher",
    "roberta": HERE / "roberta",
    "xlm-roberta": HERE / "xlm-roberta",
}

SCHOOL = (
    "The school in Dornow was founded in 1902. Its head is Anna Weber, and its motto is old. "
    "It has 340 pupils, who come from Dornow and from the villages around it."
)
YEARS = " ".join(
    f"In {1900 + 7 * n} the head of the school was {first} {last}, who came from {place}."
    for n, (first, last, place) in enumerate(
        zip(
            ("Anna", "Otto", "Ines", "Marek", "Berta", "Cyril", "Harald", "Rollo") * 3,
            ("Weber", "Novak", "Lind", "Sommer", "Adler", "Rossi", "Kovacs", "Bauer") * 3,
            ("Dornow", "Bavaria", "Moravia", "Galicia", "Savoy", "Norway") * 4,
            strict=True,
        )
    )
)
TEXTS = {
    "short": ("Who is the head of the school?", SCHOOL),
    "not in it": ("What is the height of the bridge?", SCHOOL),
    "many windows": ("Who was the head of the school in 1949?", YEARS),
    "one text in two cases": (
        "Where is it?",
        "DORNOW is in Dornow, and dornow is near Dornow; DORNOW, they say, is where Dornow was.",
    ),
    "emoji": (
        "Who flew? 🚀",
        "👩\u200d🚀 Anna Weber flew 🚀🚀 to the Moon 🌕,"
        " and 👨\u200d👩\u200d👧\u200d👦 stayed at home in Dornow 🏠 with 🇩🇪 flags.",
    ),
    "combining marks": (
        "Where is the cafe\u0301?",
        "The cafe\u0301 of Rene\u0301e Nu\u0308n\u0303ez is in Malmo\u0308, "
        "the naïve re\u0301sume\u0301 says.",
    ),
    "right to left": (
        "ما هي عاصمة فرنسا؟",
        "عاصمة فرنسا هي باريس، وعاصمة ألمانيا هي برلين. בירת ישראל היא ירושלים.",
    ),
    "no blanks": (
        "谁来了？",
        "在罗洛大军到来之前，它的人口与皮卡第没有差别。首都是巴黎，東京は日本の首都です。",
    ),
    "odd blanks": (
        "  Who\tis the head? ",
        "\n\n The head\u00a0is  Anna\r\nWeber.\t It is\u3000in Dornow .  ",
    ),
    "special tokens": (
        "Who is the head?",
        "The <s> head </s> is [SEP] Anna <mask> Weber [MASK], she said [CLS].",
    ),
    "blank question": (" ", SCHOOL),
    "blank context": ("Who is the head of the school?", " \n "),
}
SETTINGS = (
    {},
    {"align_to_words": False},
    {"handle_impossible_answer": True},
    {"handle_impossible_answer": True, "align_to_words": False, "top_k": 3},
    {"top_k": 4},
    {"top_k": 4, "align_to_words": False, "max_answer_len": 4},
    {"top_k": 2, "max_answer_len": 1},
    {"top_k": 3, "max_seq_len": 40, "doc_stride": 9, "handle_impossible_answer": True},
    {"top_k": 3, "max_seq_len": 60, "doc_stride": 0, "max_answer_len": 30},
)
# Questions and contexts that are refused.
REFUSED = (("", "text"), ("text", ""), (None, "text"), ("text", None))


def close(one: float, other: float) -> bool:
    return abs(one - other) <= 1e-5 * abs(other) + 1e-9


def same(one, other) -> bool:
    if isinstance(one, dict):
        one, other = [one], [other]
    return len(one) == len(other) and all(
        all(a[key] == b[key] for key in ("start", "end", "answer"))
        and close(a["score"], b["score"])
        for a, b in zip(one, other, strict=True)
    )


def main() -> None:
    warnings.simplefilter("ignore")
    cases, unstable = [], []
    for name, folder in READERS.items():
        single, double = (
            pipeline("question-answering", str(folder), device="cpu", dtype=dtype)
            for dtype in (torch.float32, torch.float64)
        )
        for settings in SETTINGS:
            for text, (question, context) in TEXTS.items():
                pair = {"question": question, "context": context}
                answers = single(**pair, **settings)
                case = {"reader": name, "text": text, "settings": settings, "answers": answers}
                if same(answers, double(**pair, **settings)):
                    cases.append(case)
                else:
                    unstable.append((name, text, settings))
    refusals = []
    for question, context in REFUSED:
        try:
            single(question=question, context=context)
        except Exception as error:
            refusals.append([question, context, f"{type(error).__name__}: {error}"])
    together = single(
        question=[question for question, _ in TEXTS.values()],
        context=[context for _, context in TEXTS.values()],
    )
    forms = {
        "list": together,
        "one context": single(question=["Who is the head?", "Where?"], context=SCHOOL),
        "list of one": single(question=["Who is the head?"], context=[SCHOOL]),
        "empty list": single(question=[], context=[]),
    }
    content = {
        "versions": {
            "python": sys.version.split()[0],
            **{p: importlib.metadata.version(p) for p in ("transformers", "tokenizers", "torch")},
        },
        "texts": {text: list(pair) for text, pair in TEXTS.items()},
        "cases": cases,
        "forms": {"reader": name, **forms},
        "refusals": refusals,
    }
    path = HERE / "pipeline_answers.json"
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{len(cases)} cases; left out, as they hang on rounding: {unstable}")


if __name__ == "__main__":
    main()
