"""Forward passes on the pretended device: the second GPU, precision by card, out of memory."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import kdfast
from kdfast import train
from kdfast.common.errors import UserError
from kdfast.common.precision import resolve
from kdfast.common.run import Run
from kdfast.config import WindowSettings
from kdfast.data.prepare import prepare_windows
from kdfast.data.read import read_examples
from kdfast.demo import TEACHER
from kdfast.evaluation import evaluated_model, scoring
from kdfast.models import inference
from kdfast.models.load import load_reader
from kdfast.teachers import cache, targets, teacher_pass
from tests import corpora, readers
from tests.pretended.device import pretended

pytestmark = pytest.mark.pretended

QUESTIONS = ["Who built the bridge?", "When was it built?", "What does the bridge cross?"]
CONTEXT = "The old bridge was built by Anna Berg in 1881. It crosses the river Elm. " * 3
WINDOWS = {"max_seq_len": 48, "doc_stride": 12}


def answers(device, **arguments):
    ask = kdfast.Reader(TEACHER, device=device, **arguments)
    return ask(question=QUESTIONS, context=CONTEXT, **WINDOWS)


def assert_same(found, wanted, rel=1e-4):
    assert [each["answer"] for each in found] == [each["answer"] for each in wanted]
    scores = [each["score"] for each in wanted]
    assert [each["score"] for each in found] == pytest.approx(scores, rel=rel)


@pytest.mark.parametrize("name", ["cuda:0", "cuda:1", 1])
def test_a_reader_answers_on_any_gpu_and_leaves_the_current_one(name):
    wanted = answers("cpu")
    with pretended() as device:
        assert_same(answers(name), wanted)
        assert torch.cuda.current_device() == 0
        other = device.cards[0 if name != "cuda:0" else 1]
        assert other.peak == 0 and not other.queues  # nothing was there, and nobody waited for it


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_reader_in_half_precision_casts_no_weights(dtype):
    wanted = answers("cpu")
    with pretended(capability=(8, 0)) as device:
        ask = kdfast.Reader(TEACHER, device="cuda:1", dtype=dtype)
        device.clear()
        assert_same(ask(question=QUESTIONS, context=CONTEXT, **WINDOWS), wanted, rel=0.2)
        casts = device.launches["_to_copy"]
        ask.model.float()
        device.clear()
        ask(question=QUESTIONS, context=CONTEXT, **WINDOWS)
        linear = 6 * ask.model.reader.config.num_hidden_layers
        assert device.launches["_to_copy"] >= casts + linear


def test_a_card_without_bf16_is_not_asked_for_it():
    with pretended(capability=(7, 0)):
        gpu = torch.device("cuda:1")
        assert resolve(None, gpu, ["roberta"]) == "fp16" and resolve(None, gpu, ["deberta"]) == "no"
        with pytest.raises(UserError, match="precision bf16: Pretended sm_70 has no bf16"):
            kdfast.Reader(TEACHER, device="cuda:1", dtype=torch.bfloat16)


def test_a_reader_that_runs_out_of_memory_goes_on_with_less():
    wanted = answers("cpu")
    with pretended() as device:
        ask = kdfast.Reader(TEACHER, device="cuda:1")
        device.run_out_above(100)
        for launched in (1, 0):  # what it has learnt holds for the next call
            device.clear()
            assert_same(ask(question=QUESTIONS, context=CONTEXT, **WINDOWS), wanted)
            assert (device.calls["empty_cache"] > 1) == launched
        device.run_out_above(20)
        with pytest.raises(UserError, match=r"memory on cuda:1 for a single window of \d+ tokens"):
            ask(question=QUESTIONS, context=CONTEXT, **WINDOWS)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a model, and a file of questions."""
    home = tmp_path_factory.mktemp("forward")
    readers.save(home / "model", "roberta")
    corpora.write(home / "data.json", 12)
    return home


def windows_of(home, tokenizer, split="validation"):
    settings = WindowSettings(60, 16, 24)
    return prepare_windows(
        str(home / "data.json"), tokenizer, settings, split=split, cache_dir=home
    )


def test_an_evaluation_that_runs_out_of_memory_has_the_same_figures(world):
    loaded = load_reader(str(world / "model"), "--model")
    windows = windows_of(world, loaded.tokenizer)
    examples = read_examples(str(world / "data.json"), split="validation")
    validation = scoring.Validation(windows, examples, 30, 5)
    wanted = validation.score(loaded.model, Run())
    with pretended() as device:
        run = Run(torch.device("cuda:1"))
        loaded.model.to(run.device)
        device.run_out_above(300)
        found = validation.score(loaded.model, run)
        assert device.calls["empty_cache"] > 1
    assert found.metrics == wanted.metrics
    assert found.answers.never_null == wanted.answers.never_null


def test_a_latency_is_measured_with_less_where_memory_runs_out(world):
    settings = evaluated_model.AnswerSettings(60, 16, 24, 30, 5, world)
    with pretended() as device:
        run = Run(torch.device("cuda:1"))
        model = evaluated_model.EvaluatedModel(str(world / "model"), "--model", settings, run)
        assert model.run.precision == "fp16"
        device.run_out_above(64)  # a window of 60 with its padding
        assert model.describe(str(world / "data.json"))["latency"]["passes"] > 0


@pytest.mark.parametrize("kind", ["no", "fp16"])
def test_a_teachers_pass_that_runs_out_of_memory_is_the_same_and_resumes(world, tmp_path, kind):
    loaded = load_reader(str(world / "model"), "--teacher")
    windows = windows_of(world, loaded.tokenizer, split="train")
    source = cache.Source("weights", "tokenizer", windows.key, kind)
    passes = {"max_tokens": 1000}
    found = {}
    with pretended() as device:
        gpu = torch.device("cuda:1")
        loaded.model.to(gpu)
        whole = teacher_pass.TeacherPass(source, loaded.model, windows, gpu, **passes)
        found["whole"] = np.array(teacher_pass.fill_cache(tmp_path / "whole", whole))
        device.run_out_above(300)
        found["parts"] = np.array(teacher_pass.fill_cache(tmp_path / "parts", whole))
        assert device.calls["empty_cache"] > 0

        # Killed by a window that does not fit, it goes on with the cuts that it began with.
        device.never_run_out()
        device.run_out_above(30)
        with pytest.raises(UserError, match="for a single window"):
            teacher_pass.fill_cache(tmp_path / "killed", whole)
        device.never_run_out()
        smaller = replace(whole, max_tokens=100)
        found["killed"] = np.array(teacher_pass.fill_cache(tmp_path / "killed", smaller))
    assert np.array_equal(found["killed"], found["whole"])
    rounding = {"rtol": 1e-3, "atol": 1e-3} if kind == "no" else {"rtol": 2e-2, "atol": 2e-2}
    np.testing.assert_allclose(found["parts"], found["whole"], **rounding)


@pytest.mark.parametrize("packing", ["auto", "off"])
def test_a_teacher_reads_packed_windows_or_widths_of_eight(world, tmp_path, packing):
    """Through the program's own way to a pass, against padded windows on the CPU."""
    tokenizer = load_reader(str(world / "model"), "--teacher").tokenizer
    windows = windows_of(world, tokenizer, split="train")
    weights = cache.weights_key(world / "model")
    source = cache.Source(weights, "tokenizer", windows.key, "fp16")
    teacher = targets.Teacher(str(world / "model"), source, windows, 60)
    found, shapes = {}, []
    with targets.loaded_pass(teacher, Run(), "auto") as (loaded, progress):
        found["cpu"] = np.array(teacher_pass.fill_cache(tmp_path / "cpu", loaded, progress))
    with (
        pretended() as device,
        targets.loaded_pass(teacher, Run(torch.device("cuda:1")), packing) as (loaded, progress),
    ):
        loaded.model.register_forward_pre_hook(
            lambda _, args, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True
        )
        loaded = replace(loaded, max_tokens=500)
        device.clear()
        found["gpu"] = np.array(teacher_pass.fill_cache(tmp_path / "gpu", loaded, progress))
        layers = loaded.model.reader.config.num_hidden_layers
        packed = device.launches["_efficient_attention_forward"]
        assert packed == (layers * len(shapes) if packing == "auto" else 0)
    assert len(shapes) > 2 and all(width % 8 == 0 for _, width in shapes)
    assert (max(n for n, _ in shapes) == 1) == (packing == "auto")
    np.testing.assert_allclose(found["gpu"], found["cpu"], rtol=2e-2, atol=2e-2)


def test_the_start_of_a_pass_is_made_of_the_cards_free_memory(world):
    taken = {}
    for free_bytes in (2 * 10**6, 10**9):
        loaded = load_reader(str(world / "model"), "--model")
        windows = windows_of(world, loaded.tokenizer)
        with pretended(free_bytes=free_bytes) as device:
            gpu = torch.device("cuda:1")
            loaded.model.to(gpu)
            most = inference.forward_tokens(loaded.model, windows, gpu, None)
            free = torch.cuda.mem_get_info(gpu)[0]
            assert free < free_bytes  # the model is there
            taken[free_bytes] = most
            batches = [np.arange(len(windows))[: most // 60]]
            list(inference.forward_windows(loaded.model, windows, batches, gpu, None))
            assert device.cards[1].peak <= free_bytes
    small, large = taken.values()
    assert 60 < small < 20_000 and large == inference.GPU_TOKENS_AT_MOST


def test_a_model_that_a_card_cannot_hold_is_a_users_sentence():
    with (
        pretended(free_bytes=10**5),
        pytest.raises(UserError, match=r"memory on cuda:1 for a model of 0\.\d\d GiB"),
    ):
        kdfast.Reader(TEACHER, device="cuda:1")


def test_a_run_makes_its_own_gpu_the_current_one(world, tmp_path):
    """Also where a caller has chosen another, which is the current one again afterwards."""
    flags = {"train_file": world / "data.json", "output_dir": tmp_path / "out"}
    flags |= {"teacher": world / "model", "student": world / "model", "cache_dir": tmp_path}
    flags |= {"max_steps": 1, "train_batch_size": 4, "max_seq_length": 60}
    flags |= {"max_query_length": 16, "doc_stride": 24}
    current = []
    with pretended() as device:
        cached = torch.cuda.empty_cache
        torch.cuda.empty_cache = lambda: (current.append(torch.cuda.current_device()), cached())
        torch.cuda.set_device(1)
        try:
            status = train.main([f"--{name}={value}" for name, value in flags.items()])
        finally:
            torch.cuda.empty_cache = cached
        assert status == 0 and torch.cuda.current_device() == 1
        assert current and not any(current) and device.cards[1].peak == 0
