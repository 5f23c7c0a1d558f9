"""Ways to call the question-answering pipeline, and what transformers 4 answered.

    v4/bin/python -m tests.golden.pipeline_calls

writes pipeline_calls.json, in the environment that make_pipeline_answers.py describes. The calls
are plain functions, so that a test can make the same ones on kdfast.Reader. Every call is made in
float32 and in float64, and must give the same.
"""

import importlib.metadata
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

try:
    from transformers.data.processors.squad import SquadExample
except ImportError:  # transformers 5

    class SquadExample:
        def __init__(self, _, question_text, context_text, *__):
            self.question_text, self.context_text = question_text, context_text


HERE = Path(__file__).parent
READER = HERE / "roberta"
QUESTION = "Who is the head of the school?"
OTHER = "Where?"
CONTEXT = (
    "The school in Dornow was founded in 1902. Its head is Anna Weber, and its motto is old. "
    "It has 340 pupils, who come from Dornow and from the villages around it."
)
ASKED = {"question": QUESTION, "context": CONTEXT}
ASKED_TOO = {"question": OTHER, "context": CONTEXT}
SHORT = {"max_seq_len": 60, "doc_stride": 9}


class Questions(torch.utils.data.Dataset):
    """A data set that Python cannot iterate by itself, but for its IndexError at the end."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return (ASKED, ASKED_TOO)[index]


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter((ASKED, ASKED_TOO))


def example(asked):
    return SquadExample(None, asked["question"], asked["context"], None, None, None)


def each(*asked):
    yield from asked


def interleaved(ask) -> list[str]:
    """Which questions a generator was asked for before each answer."""
    order = []

    def questions():
        for asked in (ASKED, ASKED_TOO, ASKED):
            order.append(asked["question"])
            yield asked

    for _ in ask(questions()):
        order.append("answer")
    return order


# Name -> a function of `make`, which makes a pipeline with the given arguments.
CALLS: dict[str, Callable] = {
    "X": lambda make: make()(X=ASKED),
    "X, a list": lambda make: make()(X=[ASKED, ASKED_TOO]),
    "X, a list of one": lambda make: make()(X=[ASKED]),
    "X, a generator": lambda make: make()(X=each(ASKED)),
    "X and data": lambda make: make()(X=ASKED, data=ASKED_TOO),
    "data": lambda make: make()(data=ASKED),
    "data, a list": lambda make: make()(data=[ASKED, ASKED_TOO]),
    "tuple": lambda make: make()((ASKED, ASKED_TOO)),
    "tuple of one": lambda make: make()((ASKED,)),
    "map": lambda make: make()(map(dict, [ASKED, ASKED_TOO])),
    "iterator of one": lambda make: make()(iter([ASKED])),
    "generator": lambda make: make()(each(ASKED, ASKED_TOO)),
    "generator of one": lambda make: make()(each(ASKED)),
    "generator of none": lambda make: make()(each()),
    "generator in batches": lambda make: make()(each(ASKED, ASKED_TOO, ASKED), batch_size=2),
    "generator of examples": lambda make: make()(each(example(ASKED), example(ASKED_TOO))),
    "generator with ids": lambda make: make()(each({**ASKED, "id": 3})),
    "generator of an empty question": lambda make: make()(each({**ASKED, "question": ""})),
    "generator that waits": lambda make: interleaved(make()),
    "data set": lambda make: make()(Questions()),
    "iterable data set": lambda make: make()(Endless(), top_k=2),
    "examples": lambda make: make()([example(ASKED), example(ASKED_TOO)]),
    "list of one example": lambda make: make()([example(ASKED)]),
    "two examples": lambda make: make()(example(ASKED), example(ASKED_TOO)),
    "dict of lists": lambda make: make()({k: [ASKED[k], ASKED_TOO[k]] for k in ASKED}),
    "dict of lists of one": lambda make: make()({k: [ASKED[k]] for k in ASKED}),
    "no question": lambda make: make()([]),
    "top_k None": lambda make: make()(**ASKED, top_k=None),
    "topk": lambda make: make()(**ASKED, topk=2),
    "topk and top_k": lambda make: make()(**ASKED, topk=3, top_k=2),
    "top_k int64": lambda make: make()(**ASKED, top_k=np.int64(2)),
    "top_k True": lambda make: make()(**ASKED, top_k=True),
    "max_answer_len int32": lambda make: make()(**ASKED, max_answer_len=np.int32(3)),
    "max_answer_len float": lambda make: make()(**ASKED, max_answer_len=2.0),
    "max_answer_len float64": lambda make: make()(**ASKED, max_answer_len=np.float64(2)),
    "max_question_len None": lambda make: make()(**ASKED, max_question_len=None),
    "windows int64": lambda make: make()(
        **ASKED, max_seq_len=np.int64(60), doc_stride=np.int64(9), top_k=2
    ),
    "impossible None": lambda make: make()(**ASKED, handle_impossible_answer=None),
    "impossible 1": lambda make: make()(**ASKED, handle_impossible_answer=1, top_k=3),
    "impossible bool_": lambda make: make()(**ASKED, handle_impossible_answer=np.True_),
    "words None": lambda make: make()(**ASKED, align_to_words=None),
    "words 0": lambda make: make()(**ASKED, align_to_words=0),
    "padding": lambda make: make()(**ASKED, **SHORT, padding=True),
    "padding to the longest": lambda make: make()(**ASKED, **SHORT, padding="max_length"),
    "padding None": lambda make: make()(**ASKED, padding=None),
    "batch_size": lambda make: make()(**ASKED, **SHORT, batch_size=2),
    "batch_size None": lambda make: make()(**ASKED, batch_size=None),
    "num_workers": lambda make: make()(**ASKED, num_workers=1),
    "num_workers None": lambda make: make()(**ASKED, num_workers=None),
    "unknown": lambda make: make()(**ASKED, max_seq_length=20),
    "made with top_k": lambda make: make(top_k=2)(**ASKED),
    "made with topk": lambda make: make(topk=2)(**ASKED),
    "made with top_k, asked for 1": lambda make: make(top_k=2)(**ASKED, top_k=1),
    "made with top_k, asked for None": lambda make: make(top_k=2)(**ASKED, top_k=None),
    "made with impossible": lambda make: make(handle_impossible_answer=True, top_k=3)(**ASKED),
    "made with windows": lambda make: make(**SHORT)(**ASKED),
    "made with windows, asked for others": lambda make: make(**SHORT)(**ASKED, doc_stride=20),
    "made with answers and words": lambda make: make(
        max_answer_len=4, max_question_len=30, align_to_words=False
    )(**ASKED),
    "made with batches": lambda make: make(batch_size=4, num_workers=0)([ASKED, ASKED_TOO]),
    "made with loading": lambda make: make(
        framework="pt", use_fast=True, trust_remote_code=False, revision="main", model_kwargs={}
    )(**ASKED),
    "made with an unknown one": lambda make: make(max_seq_length=20)(**ASKED),
    "made on -1": lambda make: make(device=-1)(**ASKED),
    "made on a device": lambda make: make(device=torch.device("cpu"))(**ASKED),
    "made with a tokenizer": lambda make: make(tokenizer=str(READER))(**ASKED),
    "top_k 0": lambda make: make()(**ASKED, top_k=0),
    "top_k 2.5": lambda make: make()(**ASKED, top_k=2.5),
    "top_k text": lambda make: make()(**ASKED, top_k="2"),
    "max_answer_len 0": lambda make: make()(**ASKED, max_answer_len=0),
    "batch_size 0": lambda make: make()(**ASKED, batch_size=0),
    "doc_stride over all": lambda make: make()(**ASKED, doc_stride=500),
    "made with top_k 0": lambda make: make(top_k=0),
    "None": lambda make: make()(None),
    "a number": lambda make: make()(1),
    "None and a context": lambda make: make()(None, CONTEXT),
    "a question and None": lambda make: make()(QUESTION, None),
    "a dict in place of a text": lambda make: make()(question={"This": "is odd"}, context="text"),
    "no context": lambda make: make()({"question": QUESTION}),
    "an empty one among others": lambda make: make()([ASKED, {**ASKED, "context": ""}]),
}


def outcome(call: Callable, make: Callable) -> object:
    """What a call gives: its result, {"iterator": results}, or "refused"."""
    try:
        result = call(make)
        if not isinstance(result, (dict, list)):
            result = {"iterator": list(result)}
        return result
    except Exception:
        return "refused"


def main() -> None:
    from transformers import pipeline

    from tests.golden.make_pipeline_answers import same

    def made_of(dtype):
        return lambda **arguments: pipeline(
            "question-answering", str(READER), **{"device": "cpu", "dtype": dtype, **arguments}
        )

    def equal(one, other):
        if isinstance(one, dict) and "iterator" in one:
            return equal(one["iterator"], other["iterator"])
        if isinstance(one, list) and not all(isinstance(row, dict) for row in one):
            return len(one) == len(other) and all(map(equal, one, other))
        return one == other if isinstance(one, str) else same(one, other)

    warnings.simplefilter("ignore")
    found = {}
    for name, call in CALLS.items():
        found[name] = outcome(call, made_of(torch.float32))
        assert equal(found[name], outcome(call, made_of(torch.float64))), name
    versions = {p: importlib.metadata.version(p) for p in ("transformers", "tokenizers", "torch")}
    path = HERE / "pipeline_calls.json"
    content = {"versions": versions, "outcomes": found}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
