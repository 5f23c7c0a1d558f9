"""Every supported type of model on the pretended device: a first day on a GPU, in small."""

import contextlib
import io
import json
import shutil
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from kdfast import Reader, evaluate
from kdfast.training import assemble
from kdfast.training.checkpoint import OPTIMIZER_FILE
from kdfast.training.step import span_objective
from tests import corpora, published, readers
from tests.pretended.device import pretended
from tests.pretended.steps import FEW, LAUNCHES, LAYOUTS, launches_of, run_of, watched
from tests.programs import World, log_of

pytestmark = [pytest.mark.pretended, pytest.mark.program]

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ASKED = {
    "question": ["Who was the leader of Normandy?", "When did the winter come?"],
    "context": 3 * "They were raiders. In the year 900 their leader was Rollo. Then winter came. ",
    "max_seq_len": 48,
    "doc_stride": 8,
}


def types(first):
    """All types from the one of that name on, so that each test's sample is another."""
    start = published.TYPES.index(first)
    return [*published.TYPES[start:], *published.TYPES[:start]]


@pytest.mark.sample(4)
@pytest.mark.parametrize(("name", "packing"), LAYOUTS)
def test_a_run_ends_in_its_card_and_reads_the_device_once_a_step(tmp_path, name, packing):
    world, steps = run_of(tmp_path, name, packing)
    assert "Pretended sm_70" in (world.output / "run.json").read_text()
    assert (world.output / "README.md").exists() and len(steps) == 3
    assert launches_of(steps) <= json.loads(LAUNCHES.read_text())[name][packing]
    for step in steps:
        assert len(step.micro_batches) > 1
        assert not any(done.reads for done in step.micro_batches)
        assert sum(step.reads.values()) == 1, step.reads


def _plant(fault):
    """A loss with a fault in it."""

    def objective(settings):
        right = span_objective(settings)

        def loss(logits, batch):
            return right.loss(fault(logits), batch)

        return replace(right, loss=loss)

    return mock.patch.object(assemble, "span_objective", objective)


def test_a_planted_host_read_is_seen_in_its_micro_batch(tmp_path):
    with _plant(lambda logits: logits + 0 * logits.sum().item()):
        _, steps = run_of(tmp_path, "bert", "off")
    for step in steps:
        assert sum(step.reads.values()) == 1 + len(step.micro_batches)
        for done in step.micro_batches:
            ((where, count),) = done.reads.items()
            assert "tests/pretended/test_types.py:" in where and count == 1


def test_a_planted_kernel_is_counted(tmp_path):
    with _plant(lambda logits: logits + 1):
        _, steps = run_of(tmp_path, "bert", "off")
    assert launches_of(steps) == json.loads(LAUNCHES.read_text())["bert"]["off"] + 1


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_a_planted_tensor_of_another_device_ends_the_run(tmp_path, device):
    with (
        _plant(lambda logits: logits + torch.zeros(2, device=device)),
        pytest.raises(RuntimeError, match="to be on the same device"),
    ):
        run_of(tmp_path, "bert", "off")


def numbers_of(folder):
    """The numbers of a run that do not depend on a clock, as rows of the log."""
    kept = ("loss", "soft", "hard", "hidden", "attention", "grad_norm")
    return [[line[key] for key in kept if key in line] for line in log_of(folder) if "loss" in line]


def assert_close(ours, theirs, precision):
    """Rows of numbers of one run, step by step, and of the same run on the CPU."""
    assert len(ours) == len(theirs)
    for step, (row, expected) in enumerate(zip(ours, theirs, strict=True)):
        if precision == "no":
            # Sums in another order. Then Adam gives a gradient that is 0 but for its rounding, as
            # that of a key's bias, a step of full size, so that weights differ a little, too.
            rtol, atol = 2**-10 if step else 1e-5, 1e-6
        else:  # a rounding errs by 2**-11, of several on each path; then weights differ, too
            rtol, atol = 2**-5 if step else 2**-8, 0
        np.testing.assert_allclose(row, expected, rtol=rtol, atol=atol)


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", types("bert"))
@pytest.mark.parametrize("precision", ["no", "default"])
def test_numbers_are_the_cpus(tmp_path, name, precision):
    """Teacher pass and steps; packed there, padded here, where the type packs."""
    world = World(tmp_path, name, **NO_DROPOUT)
    flags = {**FEW, "embeds_dropout_prob": 0}
    assert world.run(**flags, output_dir=tmp_path / "cpu", cache_dir=tmp_path / "cached") == 0
    with pretended():
        given = None if precision == "default" else precision
        assert world.run(**flags, mixed_precision=given) == 0
    ours, theirs = numbers_of(world.output), numbers_of(tmp_path / "cpu")
    assert len(ours) == 3
    used = json.loads((world.output / "run.json").read_text())["precision"]
    assert used == ("no" if precision == "no" or name == "deberta" else "fp16")
    assert_close(ours, theirs, used)


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", types("camembert"))
def test_stage_layers(tmp_path, name):
    world = World(tmp_path, name, **NO_DROPOUT)
    flags = {**FEW, "stage": "layers", "validation_file": None, "mixed_precision": "no"}
    assert world.run(**flags, output_dir=tmp_path / "cpu") == 0
    with pretended() as device, watched(device) as steps:
        assert world.run(**flags) == 0
    assert_close(numbers_of(world.output), numbers_of(tmp_path / "cpu"), "no")
    assert [sum(step.reads.values()) for step in steps] == [1, 1, 1]


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", types("deberta"))
def test_a_resumed_run_ends_in_the_same_bits(tmp_path, name):
    world = World(tmp_path, name)
    flags = {**FEW, "max_steps": 4, "save_steps": 2, "validation_file": None}
    with pretended():
        assert world.run(**flags) == 0
    cut = tmp_path / "cut"
    shutil.copytree(world.output, cut)
    shutil.rmtree(cut / "checkpoint-4")
    (cut / "model.safetensors").unlink()
    with pretended():
        assert world.run(**flags, output_dir=cut, resume_from_checkpoint="last") == 0
    assert log_of(cut) == log_of(world.output)
    for file in ("model.safetensors", f"checkpoint-4/{OPTIMIZER_FILE}"):
        ours, theirs = load_file(cut / file), load_file(world.output / file)
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[key], theirs[key]) for key in ours), file


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", types("electra"))
def test_a_run_that_runs_out_of_memory_goes_on_with_less(tmp_path, name):
    """In the teacher pass, in a step and in evaluation."""
    world = World(tmp_path, name, **NO_DROPOUT)
    flags = {**FEW, "embeds_dropout_prob": 0, "mixed_precision": "no"}
    flags["max_tokens_per_micro_batch"] = 2000
    assert world.run(**flags, output_dir=tmp_path / "cpu", cache_dir=tmp_path / "cached") == 0
    with pretended() as device, watched(device) as steps:
        device.run_out_above(400)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            assert world.run(**flags) == 0
        assert device.calls["empty_cache"] > len(steps)
    assert len(steps) > 3 and len(steps[0].micro_batches) == 0
    assert "Out of memory: steps are now cut" in printed.getvalue()
    assert_close(numbers_of(world.output), numbers_of(tmp_path / "cpu"), "no")
    figures = [json.loads((f / "run.json").read_text()) for f in (world.output, tmp_path / "cpu")]
    assert figures[0]["metrics"] == pytest.approx(figures[1]["metrics"])


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", types("deberta-v2"))
def test_evaluation_gives_the_answers_of_the_cpu(tmp_path, name):
    folder = readers.save(tmp_path / "reader", name)
    data = corpora.write(tmp_path / "dev.json", 8)

    def answers_of(output):
        flags = {"model": folder, "data": data, "cache_dir": tmp_path / "cache"}
        flags |= {"output_dir": tmp_path / output, "max_seq_length": 64, "doc_stride": 16}
        flags["mixed_precision"] = "no"
        given = [str(each) for name, value in flags.items() for each in (f"--{name}", value)]
        assert evaluate.main(given) == 0
        return json.loads((tmp_path / output / "predictions.json").read_text())

    expected = answers_of("cpu")
    assert len(set(expected.values())) > 2
    with pretended():
        assert answers_of("cuda") == expected


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", types("mpnet"))
@pytest.mark.parametrize("where", ["cuda:0", "cuda:1"])
def test_the_reader_answers_as_on_the_cpu(tmp_path, name, where):
    folder = readers.save(tmp_path, name)
    expected = Reader(folder, device="cpu")(**ASKED)
    with pretended() as device:
        reader = Reader(folder, device=where)
        assert {each.device for each in reader.model.parameters()} == {torch.device(where)}
        found = [reader(**ASKED)]
        device.run_out_above(60)
        found.append(reader(**ASKED))
    for answers in found:
        for ours, theirs in zip(answers, expected, strict=True):
            assert ours["score"] == pytest.approx(theirs["score"], rel=1e-4)
            assert {**ours, "score": 0} == {**theirs, "score": 0}
