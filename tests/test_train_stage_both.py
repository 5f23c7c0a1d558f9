"""--stage both: two runs in one command, killed, resumed and mistaken."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests import corpora, readers
from tests.programs import config_of, log_of


def test_both(world, wide, capsys):
    assert (
        world.run(
            stage="both",
            layers_teacher=wide,
            layers_learning_rate=2e-3,
            layers_train_file=world.validation_file,
            save_steps=3,
        )
        == 0
    )
    first, second = world.output / "layers", world.output / "predictions"
    before, after = config_of(first), config_of(second)
    assert (before["stage"], before["teacher"], before["student"]) == (
        "layers",
        [wide],
        world.student,
    )
    assert (before["learning_rate"], before["train_file"]) == (2e-3, world.validation_file)
    assert (after["stage"], after["teacher"], after["student"]) == (
        "predictions",
        [world.teacher],
        str(first),
    )
    assert (after["learning_rate"], after["train_file"]) == (1e-2, world.train_file)
    record = json.loads((second / "run.json").read_text())
    assert record["layers_stage"] == before and record["metrics"]["total"] > 0
    text = (second / "README.md").read_text()
    assert f"\n# {world.output.name}\n" in text
    assert "learnt the hidden states of `wide`, on `dev.json`" in " ".join(text.split())
    assert "distilled from `teacher` into `student`" in text
    # What the first stage leaves is not what it was given.
    starts = load_file(first / "model.safetensors")
    assert any(
        np.any(starts[name] != each)
        for name, each in load_file(world.path / "student" / "model.safetensors").items()
    )
    capsys.readouterr()
    # Again: nothing is left to do, and nothing is lost.
    weights = (second / "model.safetensors").read_bytes()
    again = {
        "stage": "both",
        "layers_teacher": wide,
        "layers_train_file": world.validation_file,
        "save_steps": 3,
    }
    assert world.run(**again, layers_learning_rate=3e-3, resume_from_checkpoint="last") == 2
    assert "learning_rate (0.002 -> 0.003)" in capsys.readouterr().err
    assert world.run(**again, layers_learning_rate=2e-3, resume_from_checkpoint="last") == 0
    assert (second / "model.safetensors").read_bytes() == weights


def test_a_run_of_both_stages_resumes_in_either(world):
    flags = {"stage": "both", "save_steps": 3}
    assert world.run(**flags) == 0
    whole = world.path / "whole"
    shutil.copytree(world.output, whole)

    def ends_equal():
        assert world.run(**flags, resume_from_checkpoint="last") == 0
        for stage in ("layers", "predictions"):
            ours, theirs = (each / stage / "model.safetensors" for each in (world.output, whole))
            assert ours.read_bytes() == theirs.read_bytes(), stage
            assert log_of(world.output / stage) == log_of(whole / stage)

    # Killed in the second stage, before its first checkpoint; then after it.
    for name in ("run.json", "model.safetensors"):
        (world.output / "predictions" / name).unlink()
    for step in (3, 6):
        shutil.rmtree(world.output / "predictions" / f"checkpoint-{step}")
    ends_equal()
    (world.output / "predictions" / "run.json").unlink()
    shutil.rmtree(world.output / "predictions" / "checkpoint-6")
    ends_equal()
    # Killed in the first one.
    (world.output / "layers" / "run.json").unlink()
    shutil.rmtree(world.output / "layers" / "checkpoint-6")
    shutil.rmtree(world.output / "predictions")
    ends_equal()


def test_both_output_folders_are_checked_first(world, capsys):
    second = world.output / "predictions"
    second.mkdir(parents=True)
    (second / "mine.txt").write_text("mine")
    assert world.run(stage="both") == 2
    assert f"{second} is not empty" in capsys.readouterr().err
    assert not (world.output / "layers" / "train_log.jsonl").exists()
    assert os.listdir(second) == ["mine.txt"]


@pytest.mark.parametrize("flag", ["teacher", "train_file", "validation_file"])
def test_inputs_of_the_second_stage_are_checked_first(world, wide, flag, capsys):
    given = {flag: world.path / "nowhere.json", "layers_train_file": world.train_file}
    assert world.run(stage="both", layers_teacher=wide, **given) == 2
    assert f"{world.path / 'nowhere.json'}" in capsys.readouterr().err
    assert not (world.output / "layers" / "train_log.jsonl").exists()


LATER = {
    "no head": ({"teacher": "BARE"}, "has no question-answering head"),
    "too short": ({"teacher": "SHORT"}, "reads 100 tokens at most"),
    "mse": ({"teacher": "ROBERTA", "distillation_loss": "mse"}, "mse compares logits"),
    "hub": ({"push_to_hub": "a b!!"}, "--push_to_hub a b!!"),
    "language": ({"language": "klingon"}, "--language klingon"),
}


@pytest.mark.parametrize("mistake", LATER)
def test_mistakes_in_the_second_stage_are_found_first(world, wide, mistake, capsys):
    changes, told = LATER[mistake]
    made = {
        "BARE": lambda: readers.save(world.path / "bare", head=False),
        "SHORT": lambda: readers.save(world.path / "short", max_position_embeddings=100),
        "ROBERTA": lambda: readers.save(world.path / "roberta", "roberta"),
    }
    changes = {name: made[value]() if value in made else value for name, value in changes.items()}
    assert world.run(stage="both", layers_teacher=wide, **changes) == 2
    assert told in capsys.readouterr().err
    assert not (world.output / "layers" / "train_log.jsonl").exists()


def test_an_overwritten_run_goes_on_as_itself(world):
    """What an earlier run left in predictions/ is not taken for this one's."""
    flags = {"stage": "both", "learning_rate": 2e-3, "save_steps": 4}
    assert world.run(**flags) == 0
    whole = (world.output / "predictions" / "model.safetensors").read_bytes()
    # As killed in stage layers, which has replaced another run's in layers/ alone.
    other = world.path / "other"
    assert world.run(stage="both", save_steps=3, output_dir=other) == 0
    shutil.rmtree(world.output / "predictions")
    (other / "predictions").rename(world.output / "predictions")
    (world.output / "layers" / "run.json").unlink()
    shutil.rmtree(world.output / "layers" / "checkpoint-6")
    assert world.run(**flags, resume_from_checkpoint="last") == 0
    assert (world.output / "predictions" / "model.safetensors").read_bytes() == whole


def test_a_finished_stage_is_compared_by_content(world, capsys):
    assert world.run(stage="both") == 0
    shutil.rmtree(world.output / "predictions")
    corpora.write(Path(world.train_file), 21)
    assert world.run(stage="both", resume_from_checkpoint="last") == 2
    assert "these differ: training data" in capsys.readouterr().err


def test_what_stage_layers_does_not_use_may_change(world):
    assert world.run(stage="both") == 0
    shutil.rmtree(world.output / "predictions")
    assert world.run(stage="both", temperature=3.0, resume_from_checkpoint="last") == 0


def test_nothing_to_go_on_with(world, capsys):
    assert world.run(stage="both", resume_from_checkpoint="last") == 2
    assert "nothing to resume" in capsys.readouterr().err


def test_a_link_in_the_folder_is_refused(world, capsys):
    world.output.mkdir()
    (world.path / "elsewhere").mkdir()
    (world.output / "layers").symlink_to(world.path / "elsewhere")
    assert world.run(stage="both") == 2
    assert "holds a link, layers" in capsys.readouterr().err
    assert not any((world.path / "elsewhere").iterdir())
