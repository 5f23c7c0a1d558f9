"""The program at numbers that go bad: what it says, and what stays as it was."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForQuestionAnswering

from kdfast.common.files import write_sums
from kdfast.data.batches import Share, TrainingOrder
from kdfast.training.optimizer import ScaledAdamW
from tests.programs import log_of, ranks_of

FLAGS = {"max_steps": 5, "save_steps": 1, "save_total_limit": 9, "eval_steps": 2}


def spoil(world, windows=(30,)):
    """NaN in the teacher's cached logits of some windows, as if it had been made so."""
    (cache,) = (world.path / "cache" / "teacher").glob("*/logits.npy")
    (starts,) = (
        path
        for path in (world.path / "cache" / "features").glob("*/window_start.npy")
        if json.loads((path.parent / "header.json").read_text())["counts"]["questions"] == 40
    )
    starts = np.load(starts)
    logits = np.load(cache, mmap_mode="r+")
    for window in windows if windows else range(len(starts) - 1):
        logits[starts[window], 0] = np.nan
    logits.flush()
    write_sums(cache.parent, ("logits.npy", "header.json"))


def sentence(capsys):
    said = capsys.readouterr().err
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in said
    return line


@pytest.fixture
def spoilt(world):
    """The world with a cache whose window 30 has a NaN; returns the clean run's model too."""
    assert world.run(**FLAGS, output_dir=world.path / "clean") == 0
    spoil(world)
    return world


def test_halt_names_the_window_and_keeps_what_was_there(spoilt, capsys):
    assert spoilt.run(**FLAGS) == 2
    said = sentence(capsys)
    step = int(re.search(r"Step (\d+) did not reach the weights, as the loss is nan", said)[1])
    assert "not finite is the teacher's logits of question q15 (window 30)" in said and step > 0
    out = spoilt.output
    for number in range(1, step + 1):
        ours, theirs = (
            load_file(folder / f"checkpoint-{number}" / "model.safetensors")
            for folder in (out, spoilt.path / "clean")
        )
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not (out / f"checkpoint-{step + 1}").exists() and not (out / "run.json").exists()
    assert (out / "best").is_dir() == (step >= 2)
    assert [line for line in log_of(out) if "step" in line][-1]["skipped"]

    # The same step again, and then on without it.
    assert spoilt.run(**FLAGS, resume_from_checkpoint="last") == 2
    assert sentence(capsys) == said
    assert spoilt.run(**FLAGS, resume_from_checkpoint="last", on_nonfinite="skip") == 0
    assert "1 of 5 steps were skipped" in capsys.readouterr().out


def test_skip_leaves_the_step_out(spoilt, capsys):
    assert spoilt.run(**FLAGS, on_nonfinite="skip") == 0
    said = capsys.readouterr()
    assert "1 of 5 steps were skipped" in said.out
    assert "(window 30)" in said.out + said.err
    record = json.loads((spoilt.output / "run.json").read_text())
    assert record["steps"] == 5 and record["updates"] == 4
    skipped = [line["step"] for line in log_of(spoilt.output) if line.get("skipped")]
    assert len(skipped) == 1


@pytest.mark.parametrize(("skipped", "told"), [(6, "None"), (4, "Only 2")])
def test_a_run_most_of_whose_steps_were_skipped_ends_in_a_checkpoint(world, capsys, skipped, told):
    assert world.run(max_steps=1, validation_file=None, output_dir=world.path / "clean") == 0
    order = TrainingOrder([Share(np.arange(40))], 8, 42)
    second_epoch = order.step(5)
    windows = [next(w for w in order.step(n) if w not in second_epoch) for n in range(4)]
    spoil(world, windows if skipped == 4 else ())
    assert world.run(on_nonfinite="skip", validation_file=None) == 2
    said = sentence(capsys)
    assert f"{told} of 6 steps reached the weights" in said
    assert "checkpoint-6 is kept" in said
    assert not (world.output / "model.safetensors").exists()
    log = [line for line in log_of(world.output) if "step" in line]
    assert sum(line["skipped"] for line in log) == skipped and len(log) == 6
    weights = load_file(world.output / "checkpoint-6" / "model.safetensors")
    assert all(bool(torch.isfinite(each).all()) for each in weights.values())


# One step of this size leaves finite weights whose forward pass overflows.
HUGE = {"learning_rate": 2**31 - 1, "warmup_ratio": 0.0, "max_steps": 1}


@pytest.mark.parametrize("stage", ["predictions", "layers"])
def test_a_last_step_that_is_too_large_replaces_no_model(world, capsys, stage):
    flags = {"stage": stage, "validation_file": None}
    assert world.run(**flags) == 0
    before = (world.output / "model.safetensors").read_bytes()
    assert world.run(**flags, **HUGE, overwrite=True, save_steps=1) == 2
    said = sentence(capsys)
    assert "its logits are not finite" in said and "--save_steps" in said
    assert (world.output / "model.safetensors").read_bytes() == before
    assert not (world.output / "run.json").exists()
    assert not [*world.output.glob("checkpoint-*")]


def test_a_last_step_that_is_too_large_leaves_checkpoint_and_best(world, capsys, monkeypatch):
    count = ScaledAdamW.count

    def breaks(self, *values):
        count(self, *values)
        if self.updates == 6:
            with torch.no_grad():
                self.named["reader.qa_outputs.weight"].fill_(1e38)

    monkeypatch.setattr(ScaledAdamW, "count", breaks)
    flags = {"eval_steps": 2, "save_steps": 1, "save_total_limit": 1}
    assert world.run(**flags, load_best_model_at_end=True) == 2
    assert "checkpoint-5 and best/ are kept" in sentence(capsys)
    assert not (world.output / "model.safetensors").exists()


def test_an_evaluation_of_logits_that_are_not_finite_replaces_no_best_model(
    world, capsys, monkeypatch
):
    count = ScaledAdamW.count

    def breaks(self, *values):
        count(self, *values)
        if self.updates == 4:
            with torch.no_grad():  # -inf, which an evaluation takes for an answer of no chance
                self.named["reader.qa_outputs.weight"].fill_(0)
                self.named["reader.qa_outputs.bias"].fill_(-3e38).mul_(1)
                self.named["reader.qa_outputs.weight"][:, 0] = 3e38

    monkeypatch.setattr(ScaledAdamW, "count", breaks)
    assert world.run(eval_steps=2, load_best_model_at_end=True) == 2
    assert "After 4 steps" in sentence(capsys)
    evaluated = [line["evaluated_after"] for line in log_of(world.output) if "step" not in line]
    assert evaluated == [2]


def test_a_student_with_nan(world, capsys):
    model = AutoModelForQuestionAnswering.from_pretrained(world.student)
    with torch.no_grad():
        model.qa_outputs.bias[0] = np.nan
    model.save_pretrained(world.student)
    for action in ("halt", "skip"):
        output = world.path / action
        assert world.run(on_nonfinite=action, validation_file=None, output_dir=output) == 2
        said = sentence(capsys)
        assert "The student's weights are not finite (reader.qa_outputs.bias)" in said
        assert "give a sound --student" in said
        assert not (world.path / "cache").exists() and not any(output.iterdir())


def test_a_huge_learning_rate_overwrites_nothing_good(world, capsys):
    flags = {"learning_rate": 2**31 - 1, "weight_decay": 2**31 - 1, "validation_file": None}
    assert world.run(**flags, max_steps=40, save_steps=1, save_total_limit=1) == 2
    said = sentence(capsys)
    assert "--learning_rate" in said
    assert not (world.output / "model.safetensors").exists()
    (kept,) = world.output.glob("checkpoint-*")
    weights = load_file(kept / "model.safetensors")
    assert all(bool(torch.isfinite(each).all()) for each in weights.values())


@pytest.mark.parametrize("flags", [{"save_steps": 1, "save_total_limit": 1}, {"max_steps": 3}])
def test_weights_that_a_good_step_broke_are_not_saved(world, capsys, monkeypatch, flags):
    count = ScaledAdamW.count

    def breaks(self, *values):
        count(self, *values)
        if self.updates == 3:
            with torch.no_grad():
                self.parameters[5].fill_(np.inf)

    monkeypatch.setattr(ScaledAdamW, "count", breaks)
    assert world.run(**flags, validation_file=None) == 2
    assert "weights are not finite (reader." in sentence(capsys)
    found = [path.name for path in world.output.glob("checkpoint-*")]
    assert found == (["checkpoint-2"] if "save_steps" in flags else [])
    assert not (world.output / "model.safetensors").exists()


@pytest.mark.parametrize("action", ["halt", "skip"])
def test_two_ranks_end_with_one_sentence(spoilt, action):
    statuses, said = ranks_of(spoilt, 2, **FLAGS, on_nonfinite=action)
    text = "".join(said)
    assert text.count("(window 30)") == 1 and "not finite is the teacher's logits" in text
    if action == "halt":
        assert statuses == [2, 2]
        assert text.count("error: ") == 1 and "Traceback" not in text
    else:
        assert statuses == [0, 0]
        assert "1 of 5 steps were skipped" in said[0]
