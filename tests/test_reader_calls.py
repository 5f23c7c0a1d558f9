"""Forms of a call to a Reader: those of transformers 4, with what they gave there, and others."""

import json
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForQuestionAnswering

from kdfast.common.errors import UserError
from kdfast.demo import TEACHER
from kdfast.evaluation.reader_settings import ReaderSettings
from kdfast.reader import Reader
from tests import readers
from tests.golden import pipeline_calls
from tests.golden.pipeline_calls import ASKED, ASKED_TOO, CONTEXT, QUESTION, READER

GOLDEN = json.loads((pipeline_calls.HERE / "pipeline_calls.json").read_text(encoding="utf-8"))


def made(**arguments):
    return Reader(READER, **{"device": "cpu", **arguments})


@pytest.fixture(scope="module")
def make():
    """Reader with arguments; without any, always the same one."""
    known = made()
    return lambda **arguments: made(**arguments) if arguments else known


def approximately(outcome):
    """An outcome to compare with: scores to rounding, all else as it is."""
    if isinstance(outcome, list):
        return [approximately(each) for each in outcome]
    if isinstance(outcome, dict) and "score" in outcome:
        return {**outcome, "score": pytest.approx(outcome["score"], rel=1e-4, abs=1e-9)}
    if isinstance(outcome, dict):
        return {key: approximately(value) for key, value in outcome.items()}
    return outcome


def test_the_golden_calls_are_of_transformers_4():
    assert GOLDEN["versions"]["transformers"] == "4.57.6"
    assert list(GOLDEN["outcomes"]) == list(pipeline_calls.CALLS)
    assert sum(outcome == "refused" for outcome in GOLDEN["outcomes"].values()) == 14


@pytest.mark.parametrize("name", pipeline_calls.CALLS)
def test_a_call_gives_what_transformers_4_gave(make, name):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "max_seq_length is no argument")
        ours = pipeline_calls.outcome(pipeline_calls.CALLS[name], make)
    assert ours == approximately(GOLDEN["outcomes"][name])


def test_what_is_refused_is_a_users_mistake(make):
    for name, outcome in GOLDEN["outcomes"].items():
        if outcome == "refused":
            with pytest.raises(UserError):
                pipeline_calls.CALLS[name](make)


def test_forms_that_transformers_4_refused(make):
    """Because of their type alone: they can only mean one thing."""
    ask = make()
    one, two = ask(**ASKED), ask([ASKED, ASKED_TOO])
    alike = SimpleNamespace(question_text=QUESTION, context_text=CONTEXT)
    pair = (QUESTION, CONTEXT)
    assert one == ask(alike) == ask(pair) == ask([pair]) == ask({**ASKED, "id": "a", "answers": []})
    assert two == ask([alike, ASKED_TOO]) == ask([pair, ASKED_TOO]) == ask(pair, ASKED_TOO)
    assert two == ask({"question": [QUESTION, ASKED_TOO["question"]], "context": CONTEXT})
    assert two == ask(question=(QUESTION, ASKED_TOO["question"]), context=(CONTEXT, CONTEXT))
    assert ask(**ASKED, top_k=2.0) == ask(**ASKED, top_k=torch.tensor(2))
    small = {"max_seq_len": 60.0, "doc_stride": np.float32(9)}
    assert ask(**ASKED, **small) == ask(**ASKED, max_seq_len=60, doc_stride=9)


def test_an_unknown_argument_is_named(make):
    """Transformers 4 ignored it in silence."""
    with pytest.warns(UserWarning, match="max_seq_length is no argument .* mean max_seq_len?"):
        make()(**ASKED, max_seq_length=20)
    with pytest.warns(UserWarning, match="handle_imposible_answer .* mean handle_impossible"):
        made(handle_imposible_answer=True)
    with pytest.warns(UserWarning, match="trust_remote_code is no argument"):
        made(trust_remote_code=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"handle_impossible_answer": "False"}, "give True or False"),
        ({"max_answer_len": 2.5}, "max_answer_len is 2.5"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"device": 1.5}, "device is 1.5"),
        ({"revision": "v2"}, "revision is 'v2'"),
        ({"tokenizer": "/no/such"}, "tokenizer /no/such"),
    ],
)
def test_what_a_reader_cannot_be_made_with(arguments, words):
    with pytest.raises(UserError, match=words):
        made(**arguments)


def test_a_batch_has_at_most_batch_size_windows(make, monkeypatch):
    from kdfast import reader as module

    seen = []

    def watched(model, windows, batches, *others):
        seen.append([len(batch) for batch in batches])
        return forward(model, windows, batches, *others)

    forward = module.forward_windows
    monkeypatch.setattr(module, "forward_windows", watched)
    asked = {**ASKED, "context": CONTEXT * 5, "max_seq_len": 60, "doc_stride": 9}
    whole = make()(**asked)
    assert make()(**asked, batch_size=2) == approximately(whole)
    (whole_sizes, sizes) = seen
    assert max(whole_sizes) > 2 and max(sizes) == 2 and sum(sizes) == sum(whole_sizes)


def test_models_and_tokenizers_that_are_loaded_already(make):
    known = make()
    model = readers.transformers.AutoModelForQuestionAnswering.from_pretrained(
        READER, dtype=torch.float32
    )
    ask = Reader(model, known.tokenizer, device="cpu", top_k=2)
    assert ask(**ASKED) == known(**ASKED, top_k=2)
    with pytest.raises(UserError, match="tokenizer is missing"):
        Reader(model)
    with pytest.raises(UserError, match="model is RobertaModel: give a folder"):
        Reader(model.roberta, known.tokenizer)
    folder_alone = Reader(READER, tokenizer=READER, device="cpu")
    assert folder_alone(**ASKED) == known(**ASKED)


def test_a_model_folder_without_a_tokenizer(tmp_path, make):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((READER / name).read_bytes())
    with pytest.raises(UserError, match="tokenizer"):
        Reader(tmp_path)
    assert Reader(tmp_path, READER, device="cpu")(**ASKED) == make()(**ASKED)


def types_of(ask):
    """Of the span head's weights, those of a linear layer, and the embeddings."""
    reader = ask.model.reader
    layer = reader.base_model.encoder.layer[0].intermediate.dense
    embeddings = reader.get_input_embeddings()
    return tuple(each.weight.dtype for each in (reader.qa_outputs, layer, embeddings))


FP32 = (torch.float32,) * 3
FP16 = (torch.float32, torch.float16, torch.float32)


def test_types_of_numbers_that_transformers_calls_dtype(tmp_path):
    whole, half = made(), made(dtype=torch.bfloat16)
    assert half(**ASKED) == made(mixed_precision="bf16")(**ASKED) != whole(**ASKED)
    assert types_of(half) == (torch.float32, torch.bfloat16, torch.float32)
    assert types_of(whole) == FP32 == types_of(made(dtype=torch.float32))
    assert types_of(made(dtype="float16")) == FP16 == types_of(made(torch_dtype="torch.float16"))
    assert half(**ASKED)["score"] == pytest.approx(whole(**ASKED)["score"], rel=0.1)
    # READER is saved in fp16, as its config.json says; without that, its weights do.
    assert types_of(made(dtype="auto")) == FP16
    for path in READER.iterdir():
        tmp_path.joinpath(path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("dtype") == "float16"
    tmp_path.joinpath("config.json").write_text(json.dumps(config))
    assert types_of(Reader(tmp_path, device="cpu", dtype="auto")) == FP16


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"dtype": "float8"}, "dtype is 'float8': give one of float32, float16, bfloat16 or auto"),
        ({"dtype": torch.float64}, "dtype is torch.float64: give one of"),
        ({"torch_dtype": 16}, "dtype is 16: give one of"),
        (
            {"dtype": "float16", "mixed_precision": "no"},
            "dtype is float16 and mixed_precision is no: give one of the two",
        ),
        ({"mixed_precision": "float16"}, "give one of no, fp16, bf16"),
    ],
)
def test_types_of_numbers_that_there_are_not(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        made(**arguments)


def test_a_type_that_does_not_compute_in_half_precision(tmp_path):
    folder = readers.save(tmp_path, "deberta")
    for dtype in (torch.float16, "bfloat16"):
        with pytest.raises(
            UserError, match=r"precision ..16: deberta .*: leave it out or use no\."
        ):
            Reader(folder, device="cpu", dtype=dtype)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float16"}))
    ask = Reader(folder, device="cpu", dtype="auto")
    assert "is saved in float16, and computes in float32: deberta is not" in ask.notes[-1]
    assert ask("Who?", "Anna is there.") == Reader(folder, device="cpu")("Who?", "Anna is there.")


def test_a_model_of_transformers_keeps_its_type_unless_another_is_asked_for():
    def half():
        return AutoModelForQuestionAnswering.from_pretrained(READER, dtype=torch.float16)

    for given in ({}, {"dtype": "auto"}):
        ask = Reader(half(), READER, device="cpu", **given)
        assert types_of(ask) == (torch.float16,) * 3
        assert ask(**ASKED)["answer"] == made()(**ASKED)["answer"]
    assert Reader(half(), READER, device="cpu", dtype="float32")(**ASKED) == made()(**ASKED)
    cast = Reader(half(), READER, device="cpu", dtype=torch.float16)
    assert types_of(cast) == FP16 and cast(**ASKED) == made(dtype=torch.float16)(**ASKED)


def test_gpu_0_is_the_cpu_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert made(device=0).device == made(device=np.int64(-1)).device == torch.device("cpu")


def test_a_large_doc_stride_is_refused_at_once(make):
    """Before any answer, however short the context is, and before the first item is asked for."""
    ask = make()
    specials = 4
    length = len(ask.tokenizer(QUESTION, add_special_tokens=False).input_ids)
    left = 60 - specials - length
    with pytest.raises(UserError, match=f"doc_stride is {left}, .* has {left} of its context"):
        ask(**ASKED, max_seq_len=60, doc_stride=left)
    assert ask(QUESTION, "Anna", max_seq_len=60, doc_stride=left - 1)["answer"] == "Anna"
    with pytest.raises(UserError, match="smaller doc_stride"):
        ask((each for each in [ASKED]), doc_stride=96)
    with pytest.raises(UserError, match="smaller doc_stride"):
        ask.stream([], ReaderSettings(doc_stride=96))


def test_the_usual_doc_stride_gives_way_to_a_long_question(make):
    """Transformers 4 panics there."""
    ask = make()
    question = "Who is the head of the old school in the village of Dornow near the hills?"
    length = len(ask.tokenizer(question, add_special_tokens=False).input_ids)
    size = length + 4 + 6  # six tokens of the context
    found = ask(question, CONTEXT, max_seq_len=size, top_k=3)
    assert found == ask(question, CONTEXT, max_seq_len=size, top_k=3, doc_stride=3)


def test_a_question_that_is_cut_is_warned_of_once():
    """A question in Arabic of 25 words has several hundred tokens of a byte-level tokenizer."""
    ask = made()
    arabic = "ما هي المدينة التي ولد فيها مدير المدرسة القديمة؟ " * 3
    with pytest.warns(UserWarning, match="max_question_len is 64, and a question of more") as told:
        ask(arabic, CONTEXT)
        ask(arabic, CONTEXT)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made()(**ASKED)


def test_golden_teacher_with_defaults_of_its_own():
    ask = Reader(TEACHER, device="cpu", top_k=3, handle_impossible_answer=True)
    assert len(ask(**ASKED)) == 3 and isinstance(ask(**ASKED, top_k=1), dict)
