"""The Reader against what the pipeline of transformers 4 answered, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import kdfast
from kdfast import reader as reader_module
from kdfast.common.errors import UserError
from kdfast.demo import TEACHER
from kdfast.evaluation.reader_settings import ReaderSettings
from kdfast.reader import Reader
from tests import readers

HERE = Path(__file__).parent / "golden"
GOLDEN = json.loads((HERE / "pipeline_answers.json").read_text(encoding="utf-8"))
TEXTS = GOLDEN["texts"]
FOLDERS = {"teacher": TEACHER, "roberta": HERE / "roberta", "xlm-roberta": HERE / "xlm-roberta"}
ALL_SETTINGS = [
    dict(each) for each in dict.fromkeys(tuple(c["settings"].items()) for c in GOLDEN["cases"])
]
NOTHING = {"score": 0.0, "start": 0, "end": 0, "answer": ""}
SCHOOL = TEXTS["short"][1]


@pytest.fixture(scope="module")
def loaded():
    """A function that gives the reader of a name, loaded once."""
    known = {}

    def get(name="teacher"):
        if name not in known:
            known[name] = Reader(FOLDERS[name], device="cpu")
        return known[name]

    return get


def rows(result):
    return result if isinstance(result, list) else [result]


def as_ours(answers):
    """Golden answers less what transformers 4 fills a list up with: spans of probability 0, over
    tokens that are not the context's, of which it may also give none where there is no other."""
    return [row for row in rows(answers) if row["score"] > 0] or [NOTHING]


def assert_same(ours, golden):
    assert isinstance(ours, dict) == (len(golden) == 1)
    ours = rows(ours)
    assert [(r["start"], r["end"], r["answer"]) for r in ours] == [
        (r["start"], r["end"], r["answer"]) for r in golden
    ]
    assert [r["score"] for r in ours] == pytest.approx(
        [r["score"] for r in golden], rel=1e-4, abs=1e-9
    )


@pytest.mark.parametrize("settings", ALL_SETTINGS, ids=str)
@pytest.mark.parametrize("name", FOLDERS)
def test_answers_of_transformers_4(loaded, name, settings):
    cases = [c for c in GOLDEN["cases"] if c["reader"] == name and c["settings"] == settings]
    assert len(cases) >= len(TEXTS) - 1
    question, context = zip(*(TEXTS[case["text"]] for case in cases), strict=True)
    together = loaded(name)(question=list(question), context=list(context), **settings)
    for case, ours in zip(cases, together, strict=True):
        assert_same(ours, as_ours(case["answers"]))


def test_golden_answers_are_of_transformers_4_and_hold_what_they_should():
    assert GOLDEN["versions"]["transformers"].startswith("4.")
    assert len(GOLDEN["cases"]) > 300
    answers = [row for case in GOLDEN["cases"] for row in rows(case["answers"])]
    assert any(row["answer"] == "" and row["score"] > 0.5 for row in answers)
    for case in GOLDEN["cases"]:
        context = TEXTS[case["text"]][1]
        assert all(context[r["start"] : r["end"]] == r["answer"] for r in rows(case["answers"]))


def test_forms_of_a_call(loaded):
    forms = GOLDEN["forms"]
    ask = loaded(forms["reader"])
    question, context = map(list, zip(*TEXTS.values(), strict=True))
    for ours, golden in zip(ask(question=question, context=context), forms["list"], strict=True):
        assert_same(ours, as_ours(golden))
    two = ["Who is the head?", "Where?"]
    one_context = ask(question=two, context=SCHOOL)
    for ours, golden in zip(one_context, forms["one context"], strict=True):
        assert_same(ours, [golden])
    assert_same(ask(question=two[:1], context=[SCHOOL]), [forms["list of one"]])
    assert ask(question=[], context=[]) == forms["empty list"] == []
    first, second = ({"question": q, "context": SCHOOL} for q in two)
    assert ask(first) == ask([first]) == ask(two[0], SCHOOL) == one_context[0]
    assert ask([first, second]) == ask(first, second) == one_context
    assert list(ask(each for each in (first, second))) == one_context


@pytest.mark.parametrize(
    ("inputs", "named", "words"),
    [
        ((), {"question": "", "context": "c"}, "question is empty"),
        ((), {"question": "q", "context": ""}, "context is empty"),
        ((), {"question": ["q", ""], "context": "c"}, "question[1] is empty"),
        ((), {"question": "q", "context": ["c"]}, "give one context"),
        ((), {"question": ["q", "q"], "context": ["c"]}, "2 questions and 1 contexts"),
        ((), {"question": ["q", 3], "context": "c"}, "question[1] is int"),
        ((), {"question": 3, "context": "c"}, "are int and str"),
        ((), {"question": "q"}, "context is missing"),
        ((), {"context": "c"}, "question is missing"),
        ((), {}, "question is missing"),
        ((), {"question": "half \ud83d", "context": "c"}, "half a surrogate pair"),
        (("q",), {}, "input 0 is no dict"),
        ((3,), {}, "input 0 is no dict"),
        (({"question": "q"},), {}, "input 0 is no dict"),
        (([{"question": "q", "context": None}],), {}, "context of input 0 is NoneType"),
        (("q", "c"), {"question": "q", "context": "c"}, "either"),
    ],
)
def test_questions_that_are_none(loaded, inputs, named, words):
    with pytest.raises(UserError, match=words.replace("[", r"\[")):
        loaded()(*inputs, **named)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"max_answer_len": 0}, "max_answer_len is 0"),
        ({"max_question_len": -3}, "max_question_len is -3"),
        ({"max_seq_len": 0}, "max_seq_len is 0"),
        ({"max_seq_len": 161}, "reads 160 tokens"),
        ({"max_seq_len": 8}, "leaves 0 of 8"),
        ({"doc_stride": -1}, "doc_stride is -1"),
        ({"doc_stride": 159}, "smaller doc_stride"),
    ],
)
def test_settings_out_of_range(loaded, settings, words):
    with pytest.raises(UserError, match=words):
        loaded()(question=TEXTS["many windows"][0], context=TEXTS["many windows"][1], **settings)


def test_a_long_question_is_cut(loaded):
    ask, (question, context) = loaded(), TEXTS["short"]
    assert ask(question + " the" * 500, context, max_question_len=8) == ask(question, context)


def test_more_answers_than_there_are(loaded):
    found = loaded("roberta")(question="Who?", context="Anna W", top_k=10**9, align_to_words=False)
    tokens = len(loaded("roberta").tokenizer("Anna W", add_special_tokens=False).input_ids)
    assert 1 < len(found) <= tokens * (tokens + 1) // 2
    assert [row["score"] for row in found] == sorted((r["score"] for r in found), reverse=True)


def test_chunks_give_what_one_batch_gives(loaded, monkeypatch):
    ask, pairs = loaded(), [tuple(pair) for pair in TEXTS.values()]
    settings = ReaderSettings(top_k=2, max_seq_len=60, doc_stride=10)
    whole = list(ask.stream(pairs, settings))
    monkeypatch.setattr(reader_module, "CHUNK_CHARACTERS", 300)
    taken, told = [], []

    def one_by_one():
        for pair in pairs:
            taken.append(pair)
            yield pair

    chunked = ask.stream(one_by_one(), settings, progress=told.append)
    first = next(chunked)
    assert len(taken) < len(pairs)  # the rest is not in memory yet
    for ours, golden in zip([first, *chunked], whole, strict=True):
        assert_same(ours, rows(golden))
    assert sum(told) == pytest.approx(len(pairs)) and len(told) > 3


def test_a_hundred_thousand_words_are_read_to_their_end():
    """By a model that likes one word most, and where a window lacks it the first token."""
    ask = Reader(FOLDERS["roberta"], device="cpu")
    _, first, last = ask.tokenizer(" Rollo", add_special_tokens=False).input_ids
    words = np.random.default_rng(0).choice(["the", "people", "of", "France"], size=100_000)
    words[-3] = "Rollo"
    context = " ".join(words)

    def likes(input_ids, **_):
        liked = torch.stack([input_ids == first, input_ids == last], dim=-1) * 40.0
        liked[:, 0] = 20.0
        return liked

    ask.model.forward = likes
    found = ask(question="Who?", context=context, max_seq_len=90, doc_stride=20)
    assert (found["answer"], found["start"]) == ("Rollo", context.index("Rollo"))


def test_a_model_without_a_head(tmp_path):
    with pytest.raises(UserError, match="no question-answering head"):
        Reader(readers.save(tmp_path, head=False))
    with pytest.raises(UserError, match="neither a folder nor"):
        Reader(tmp_path / "no")


def test_devices_and_precisions_that_are_none():
    with pytest.raises(UserError, match="device 'toaster'"):
        Reader(TEACHER, device="toaster")
    with pytest.raises(UserError, match="give one of no, fp16, bf16"):
        Reader(TEACHER, mixed_precision="fp8")


def test_weights_that_are_broken():
    ask = Reader(FOLDERS["roberta"], device="cpu")
    torch.nn.init.constant_(ask.model.reader.qa_outputs.bias, float("nan"))
    with pytest.raises(UserError, match="'Who\\?' hold NaN or infinity"):
        ask("Who?", SCHOOL)


@pytest.mark.gpu
def test_a_gpu_answers_the_same(loaded):
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device here")
    question, context = map(list, zip(*TEXTS.values(), strict=True))
    asked = {"question": question, "context": context, "top_k": 3}
    for ours, golden in zip(
        kdfast.Reader(TEACHER, device="cuda")(**asked), loaded()(**asked), strict=True
    ):
        assert_same(ours, rows(golden))
