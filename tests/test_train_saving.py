"""A run is not lost at its last line: what cannot be saved is found first, what fails keeps it."""

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForQuestionAnswering

from kdfast.evaluation import scoring
from kdfast.models.save import WEIGHTS_FILE
from kdfast.models.span_model import SpanModel
from tests import readers
from tests.programs import edit


# Found in config.json files of published models; each failed, or changed what a save gives back.
@pytest.mark.parametrize(
    "switches",
    [
        {"output_attentions": True},
        {"output_hidden_states": True, "return_dict": False},
        {"chunk_size_feed_forward": 2},
        {"torchscript": True, "pruned_heads": {}, "gradient_checkpointing": True},
        {"torch_dtype": "float16", "tie_word_embeddings": False, "is_encoder_decoder": False},
        {"max_length": 20, "num_beams": 4, "do_sample": True, "early_stopping": True},
        {"task_specific_params": {"summarization": {"max_length": 3}}, "problem_type": None},
        {"architectures": ["BertForMaskedLM"], "label2id": {"a": 0, "b": 1}},
        {"_name_or_path": "me/it", "transformers_version": "2.3.0", "output_past": True},
    ],
    ids=lambda switches: next(iter(switches)),
)
@pytest.mark.parametrize("stage", ["predictions", "layers"])
def test_switches_in_a_config_change_nothing_that_is_saved(world, switches, stage):
    edit(Path(world.student), "config.json", **switches)
    edit(Path(world.teacher), "config.json", **switches)
    validation = None if stage == "layers" else world.validation_file
    flags = {"stage": stage, "validation_file": validation, "max_steps": 1, "train_batch_size": 4}
    assert world.run(**flags) == 0
    assert AutoModelForQuestionAnswering.from_pretrained(world.output).config.return_dict


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"is_decoder": True}, "has a decoder (is_decoder in its config.json)"),
        ({"is_decoder": True, "add_cross_attention": True}, "has a decoder"),
        ({"add_cross_attention": True}, "has a decoder (add_cross_attention"),
        ({"position_embedding_type": "relative_key_query"}, "of type relative_key_query"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "is quantized"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(world, capsys, changes, words):
    for role in ("student", "teacher"):
        folder = Path(getattr(world, role))
        before = (folder / "config.json").read_text()
        edit(folder, "config.json", **changes)
        assert world.run() == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith(f"error: --{role} {folder}") and words in error
        (folder / "config.json").write_text(before)


def test_a_student_that_cannot_be_saved_is_found_before_the_teacher_runs(
    world, monkeypatch, capsys
):
    def broken(self, folder, **others):
        raise ValueError("some switch is not supported")

    model = type(readers.make()[0])
    monkeypatch.setattr(model, "save_pretrained", broken)
    assert world.run() == 2
    captured = capsys.readouterr()
    assert "its training would be lost (some switch is not supported)" in captured.err
    assert world.student in captured.err
    assert not (world.path / "cache").exists() and not any(world.output.iterdir())


@pytest.mark.parametrize("loss", ["weights", "tokens"])
def test_a_student_that_comes_back_otherwise_is_found(world, monkeypatch, capsys, loss):
    save = type(readers.make()[0]).save_pretrained

    def careless(self, folder, **others):
        save(self, folder, **others)
        if Path(folder).name == ".rehearsal":
            state = self.state_dict()
            state["qa_outputs.bias"] = state["qa_outputs.bias"] + 1
            save(self, folder, state_dict=state)

    if loss == "weights":
        monkeypatch.setattr(type(readers.make()[0]), "save_pretrained", careless)
    else:
        monkeypatch.setattr("kdfast.models.save.same_tokens", lambda *two: False)
    assert world.run() == 2
    assert f"comes back with {'other logits' if loss == 'weights' else 'another tok'}" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ESTALE, errno.EFBIG])
def test_a_disk_that_fails_at_the_rehearsal_is_no_fault_of_the_student(
    world, monkeypatch, capsys, number
):
    assert world.run(max_steps=1, save_steps=1) == 0

    def full(self, folder, **others):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(type(readers.make()[0]), "save_pretrained", full)
    capsys.readouterr()
    assert world.run(max_steps=1, overwrite=True) == 2
    said = capsys.readouterr().err
    assert ".rehearsal" in said and "config.json" not in said and "resume" not in said


def test_the_rehearsal_leaves_nothing(world, monkeypatch):
    calls = []
    forward = SpanModel.forward

    def seen(self, *arguments, **named):
        calls.append({path.name for path in world.output.iterdir()})
        return forward(self, *arguments, **named)

    monkeypatch.setattr(SpanModel, "forward", seen)
    assert world.run(max_steps=1) == 0
    assert any(".rehearsal" in names for names in calls)
    assert not (world.output / ".rehearsal").exists()
    (world.output / ".rehearsal").mkdir()  # of a run that was killed then
    assert world.run(max_steps=1, save_steps=1, overwrite=True) == 0
    assert not (world.output / ".rehearsal").exists()


def test_weights_are_kept_where_the_last_save_fails(world, monkeypatch, capsys):
    save = type(readers.make()[0]).save_pretrained

    def fails_last(self, folder, **others):
        if Path(folder).name == "model.new":
            raise RuntimeError("no such thing as a save")
        return save(self, folder, **others)

    monkeypatch.setattr(type(readers.make()[0]), "save_pretrained", fails_last)
    assert world.run(max_steps=2, save_steps=1, save_total_limit=3) == 2
    path = world.output / WEIGHTS_FILE
    error = capsys.readouterr().err
    assert f"its weights are in {path}" in error and "no such thing as a save" in error
    state = load_file(path)
    model = AutoModelForQuestionAnswering.from_pretrained(world.student)
    model.load_state_dict(state)
    first = load_file(world.output / "checkpoint-1" / "model.safetensors")
    assert any(not torch.equal(state[name], first[name]) for name in first)


@pytest.mark.parametrize("place", ["evaluation", "run.json"])
def test_what_fails_after_the_last_save_says_where_the_student_is(
    world, monkeypatch, capsys, place
):
    def fails(*arguments, **named):
        raise RuntimeError("a bug\nof many lines")

    if place == "evaluation":
        monkeypatch.setattr(scoring.Validation, "score_unless_stopped", fails)
    else:
        monkeypatch.setattr("kdfast.train.write_run", fails)
    assert world.run(max_steps=2) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error == f"error: a bug. The trained student is in {world.output}."
    assert AutoModelForQuestionAnswering.from_pretrained(world.output).num_labels == 2
