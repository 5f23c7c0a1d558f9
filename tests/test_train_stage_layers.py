"""--stage layers, from the command line, and the flags of both stages."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from kdfast import card
from kdfast.common.files import SUMS_FILE, write_sums
from kdfast.teachers import layers
from kdfast.training.assemble import Training
from kdfast.training.checkpoint import OPTIMIZER_FILE
from tests import readers
from tests.programs import config_of, log_of, ranks_of

LAYERS = {"stage": "layers", "validation_file": None}


def test_layers_alone(world, wide, capsys):
    assert world.run(**LAYERS, teacher=wide, attention_loss="probabilities") == 0
    lines = log_of(world.output)
    assert len(lines) == 6 and lines[-1]["loss"] < lines[0]["loss"]
    assert all(line["hidden"] > 0 and line["attention"] > 0 for line in lines)
    assert config_of(world.output)["stage"] == "layers"
    assert not (world.output / "README.md").exists()  # it is no reader yet
    assert "step 6 of 6: loss" in capsys.readouterr().out


def test_a_resumed_run_ends_in_the_same_bits(world, wide):
    flags = {**LAYERS, "teacher": wide, "attention_loss": "relations", "save_steps": 3}
    assert world.run(**flags) == 0
    whole = world.path / "whole"
    shutil.copytree(world.output, whole)
    shutil.rmtree(world.output / "checkpoint-6")
    (world.output / "model.safetensors").unlink()
    assert world.run(**flags, resume_from_checkpoint="last") == 0
    for name in ("model.safetensors", f"checkpoint-6/{OPTIMIZER_FILE}"):
        ours, theirs = load_file(world.output / name), load_file(whole / name)
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[key], theirs[key]) for key in ours), name
    assert log_of(world.output) == log_of(whole)
    names = load_file(whole / "checkpoint-6" / OPTIMIZER_FILE)
    assert names["projection|value"].shape == (3, 16, 24) and names["projection|exp_avg"].any()
    assert not any("qa_outputs" in name for name in names)


def test_a_checkpoint_without_its_projection_is_refused(world, wide, capsys):
    flags = {**LAYERS, "teacher": wide, "save_steps": 3}
    assert world.run(**flags) == 0
    folder = world.output / "checkpoint-6"
    tensors = load_file(folder / OPTIMIZER_FILE)
    del tensors["projection|value"]
    save_file(tensors, folder / OPTIMIZER_FILE)
    write_sums(folder, sorted(path.name for path in folder.iterdir() if path.name != SUMS_FILE))
    assert world.run(**flags, resume_from_checkpoint="last") == 2
    assert "lacks some of the model's parameters" in capsys.readouterr().err


def test_another_teacher_is_another_run(world, wide, capsys):
    flags = {**LAYERS, "save_steps": 3}
    assert world.run(**flags) == 0
    assert world.run(**{**flags, "teacher": wide}, resume_from_checkpoint="last") == 2
    assert "these differ: teacher" in capsys.readouterr().err


def test_another_stage_is_another_objective(world, capsys):
    assert world.run(**LAYERS, save_steps=3) == 0
    again = {"validation_file": None, "save_steps": 3, "resume_from_checkpoint": "last"}
    assert world.run(**again) == 2
    assert "stage (layers -> predictions)" in capsys.readouterr().err


def test_a_student_that_only_looks_like_stage_layers(world):
    (world.path / "student" / "run.json").write_text('{"config": {"stage": "layers"}}')
    assert world.run() == 0
    assert json.loads((world.output / "run.json").read_text())["layers_stage"] is None


def test_a_teacher_that_was_trained_without_the_students_token_types(world, capsys):
    teacher = Path(readers.save(world.path / "untyped", layers=4))
    path = teacher / "tokenizer_config.json"
    stated = json.loads(path.read_text()) | {"model_input_names": ["input_ids", "attention_mask"]}
    path.write_text(json.dumps(stated))
    assert world.run(**LAYERS, teacher=teacher) == 2
    assert "was trained without token types and the student with them" in capsys.readouterr().err


def test_a_teacher_without_token_types_reads_the_same_windows(world):
    teacher = readers.save(world.path / "untyped", layers=4, type_vocab_size=1)
    for number, changes in enumerate((LAYERS, {})):
        assert world.run(**changes, teacher=teacher, output_dir=world.path / str(number)) == 0


MISTAKES = {
    "two teachers": ({**LAYERS, "teacher": "TWO"}, "learns from one teacher"),
    "no teacher": ({**LAYERS, "teacher": None}, "learns from one teacher"),
    "evaluation": ({"stage": "layers"}, "--validation_file is of no use in --stage layers"),
    "eval steps": ({**LAYERS, "eval_steps": 5}, "--eval_steps is of no use in --stage layers"),
    "push": ({**LAYERS, "push_to_hub": "me/it"}, "--push_to_hub is of no use"),
    "compile": ({**LAYERS, "torch_compile": True}, "--torch_compile and --stage layers exclude"),
    "checkpointing": (
        {"stage": "both", "gradient_checkpointing": True},
        "--gradient_checkpointing and --stage both exclude",
    ),
    "attention": ({"attention_loss": "relations"}, "needs --stage layers or both"),
    "special flag": ({"layers_learning_rate": 1e-3}, "--layers_learning_rate needs --stage both"),
    "range": (
        {"stage": "both", "layers_num_train_epochs": -1.0},
        "--layers_num_train_epochs is -1.0",
    ),
    "path": ({"stage": "both", "resume_from_checkpoint": "x"}, "from the `last` checkpoint"),
    "other tokens": ({**LAYERS, "teacher": "ROBERTA"}, "has another tokenizer than the student"),
    "layers": ({**LAYERS, "student": "THREE"}, "4 layers are no multiple of the student's 3"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence(world, mistake, capsys):
    made = {
        "TWO": lambda: [world.teacher, world.teacher],
        "ROBERTA": lambda: readers.save(world.path / "roberta", "roberta", layers=4),
        "THREE": lambda: readers.save(world.path / "three", layers=3),
    }
    changes, told = MISTAKES[mistake]
    changes = {
        name: made[value]() if value in tuple(made) else value for name, value in changes.items()
    }
    assert world.run(**changes) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(said) == 1 and told in said[0]


def test_a_teacher_without_a_head_will_do(world):
    bare = readers.save(world.path / "bare", layers=4, head=False)
    assert world.run(**LAYERS, teacher=bare) == 0


def test_the_card_of_stage_layers_is_refused(world, capsys):
    assert world.run(**LAYERS) == 0
    assert card.main(["--model_dir", str(world.output)]) == 2
    assert "answers nothing yet" in capsys.readouterr().err


def test_a_teacher_that_is_not_finite_is_named(world, capsys):
    path = world.path / "teacher" / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if name.endswith("layer.3.output.dense.bias"))
    weights[name][0] = np.nan
    save_file(weights, path, {"format": "pt"})
    assert world.run(**LAYERS) == 2
    said = capsys.readouterr().err
    assert f"--teacher {world.teacher} has weights that are not finite" in said and name in said


@pytest.mark.parametrize("policy", ["halt", "skip"])
def test_a_projection_that_is_not_finite_is_named(world, wide, policy, monkeypatch, capsys):
    load = Training.load

    def spoiled(self, step, *rest):
        if step == 3:
            self.forward.projection.data[0, 0, 0] = np.inf
        return load(self, step, *rest)

    monkeypatch.setattr(Training, "load", spoiled)
    assert world.run(**LAYERS, teacher=wide, on_nonfinite=policy) == 2
    said = capsys.readouterr().err
    assert "the student's weights are not finite (projection)" in said


def test_a_term_that_is_not_finite_is_named(world, monkeypatch, capsys):
    term = layers.hidden_term

    def spoiled(states, targets, mask, projection):
        found = term(states, targets, mask, projection)
        return torch.where(mask.sum(1) == mask.sum(1).max(), found * torch.inf, found)

    monkeypatch.setattr(layers, "hidden_term", spoiled)
    assert world.run(**LAYERS) == 2
    said = capsys.readouterr().err
    assert "not finite is the hidden states' term of question" in said


def test_two_ranks_learn_what_one_learns(world, wide):
    path = world.path / "student" / "config.json"
    config = json.loads(path.read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    path.write_text(json.dumps(config))
    flags = {**LAYERS, "teacher": wide, "attention_loss": "probabilities", "learning_rate": 1e-3}
    assert world.run(**flags) == 0
    alone = world.path / "alone"
    world.output.rename(alone)
    assert ranks_of(world, 2, **flags)[0] == [0, 0]
    for ours, theirs in zip(log_of(world.output), log_of(alone), strict=True):
        for name in ("loss", "hidden", "attention", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
