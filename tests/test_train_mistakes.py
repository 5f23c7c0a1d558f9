"""What a user gets wrong ends in one sentence, and loses nothing."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForQuestionAnswering

from tests import corpora, readers

FAULTS = {
    "no teacher": ({"teacher": None}, "--teacher is missing"),
    "no student": ({"student": None}, "--student is missing"),
    "no data": ({"train_file": None}, "--train_file is missing"),
    "no output": ({"output_dir": None}, "--output_dir is missing"),
    "both cuts": (
        {"gradient_accumulation_steps": 2, "max_tokens_per_micro_batch": 99},
        "exclude each other",
    ),
    "both starts": ({"overwrite": True, "resume_from_checkpoint": "last"}, "exclude each other"),
    "eval without data": ({"validation_file": None, "eval_steps": 2}, "needs --validation_file"),
    "temperature": ({"temperature": 0}, "--temperature is 0.0"),
    "infinite": ({"learning_rate": "inf"}, "--learning_rate is inf"),
    "weight": ({"distillation_loss_weight": 1.5}, "from 0 to 1"),
    "layers": ({"student_layers": "3,1"}, "rising layer numbers"),
    "layer words": ({"student_layers": "first"}, "rising layer numbers"),
    "layers without teacher": (
        {"teacher": None, "student": None, "student_layers": "0", "distillation_loss_weight": 0},
        "name one, or give --teacher to keep",
    ),
    "teacher without layers": ({"student": None}, "name one, or give --student_layers to keep"),
    "may change anyway": (
        {"resume_from_checkpoint": "last", "allow_changes": "eval_steps,learning_rate"},
        "--allow_changes names eval_steps, which may change without it: leave that out",
    ),
    "may not change": (
        {"resume_from_checkpoint": "last", "allow_changes": "temperature"},
        "names temperature, which may not change within a run",
    ),
    "layer after the last": ({"student_layers": "0,2"}, "has layers 0 to 1"),
    "too long": ({"max_seq_length": 600}, "reads 512 tokens"),
    "stride": ({"doc_stride": 300}, "--doc_stride 300"),
    "no file": ({"train_file": "nowhere.json"}, "nowhere.json"),
    "no model": ({"student": "nowhere/nothing"}, "--student nowhere/nothing"),
    "nothing to resume": ({"resume_from_checkpoint": "last"}, "does not exist"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_users_mistake_is_one_sentence(world, capsys, fault):
    changes, words = FAULTS[fault]
    assert world.run(**changes) == 2
    captured = capsys.readouterr()
    message = captured.err.strip().splitlines()[-1]
    assert message.startswith("error: ") and words in message
    assert "Traceback" not in captured.err
    assert not any(world.output.glob("*")) if world.output.exists() else True


def test_a_teacher_without_a_head_is_refused(world, capsys):
    other = readers.save(world.path / "other", head=False)
    assert world.run(teacher=other) == 2
    assert "no question-answering head" in capsys.readouterr().err


def test_a_teacher_with_nan_names_the_question(world, capsys):
    model = AutoModelForQuestionAnswering.from_pretrained(world.teacher)
    with torch.no_grad():
        model.qa_outputs.bias[0] = np.nan
    model.save_pretrained(world.teacher)
    assert world.run() == 2
    assert "not finite in fp16 for question" in capsys.readouterr().err


def test_an_output_folder_that_cannot_be_made(world, capsys):
    assert world.run(output_dir="/proc/kdfast") == 2
    assert "cannot be written" in capsys.readouterr().err
    assert world.run(output_dir=world.train_file) == 2
    assert "is a file" in capsys.readouterr().err


def test_the_command_line_exits_with_2(world):
    command = [sys.executable, "-m", "kdfast.train", *world.flags(train_file="nowhere.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().startswith("error: ") and "Traceback" not in done.stderr


def test_a_folder_that_the_run_reads_is_never_written(world, capsys):
    before = Path(world.teacher, "model.safetensors").read_bytes()
    for flags in ({"overwrite": True}, {"resume_from_checkpoint": "last"}):
        assert world.run(output_dir=world.teacher, **flags) == 2
        assert "which the run would overwrite" in capsys.readouterr().err
    assert Path(world.teacher, "model.safetensors").read_bytes() == before


def test_overwrite_keeps_the_earlier_run_until_the_inputs_prove_good(world):
    assert world.run(save_steps=2) == 0
    before = sorted(path.name for path in world.output.iterdir())
    assert world.run(overwrite=True, train_file="nowhere.json") == 2
    assert sorted(path.name for path in world.output.iterdir()) == before


def test_a_validation_set_without_answers_is_refused_before_training(world, capsys):
    bare = corpora.write(world.path / "bare.json", 3, labelled=False)
    assert world.run(validation_file=bare) == 2
    captured = capsys.readouterr()
    assert "cannot be scored" in captured.err and "steps of" not in captured.out


def test_nothing_to_resume_is_said_before_the_teacher_runs(world, capsys):
    assert world.run(max_steps=1) == 0
    shutil.rmtree(world.path / "cache")
    assert world.run(max_steps=1, resume_from_checkpoint="last") == 2
    assert "holds no checkpoint" in capsys.readouterr().err
    assert not (world.path / "cache/teacher").exists()


def test_an_output_folder_of_something_else_is_not_offered_to_be_overwritten(world, capsys):
    world.output.mkdir()
    (world.output / "diary.txt").write_text("mine")
    assert world.run() == 2
    assert capsys.readouterr().err.endswith("is not empty: name another.\n")
    assert world.run(resume_from_checkpoint="last") == 2
    assert "give --overwrite instead to start again" not in capsys.readouterr().err
    assert (world.output / "diary.txt").read_text() == "mine"


def test_what_is_offered_for_a_folder_that_is_not_empty_can_be_done(world, capsys):
    assert world.run(max_steps=1) == 0
    capsys.readouterr()
    assert world.run(max_steps=1) == 2
    assert capsys.readouterr().err.endswith("name another, or add --overwrite.\n")
    assert world.run(max_steps=2, save_steps=1, overwrite=True) == 0
    capsys.readouterr()
    assert world.run(max_steps=2) == 2
    assert "or --resume_from_checkpoint last" in capsys.readouterr().err


def test_unlabelled_questions_name_what_is_missing(world, capsys):
    bare = world.path / "bare.jsonl"
    bare.write_text('{"id": "a", "question": "Who?", "context": "Anna."}\n')
    changes = {"train_file": bare, "distillation_loss_weight": 0}
    assert world.run(**changes) == 2
    assert "or a --distillation_loss_weight above 0 for unlabelled" in capsys.readouterr().err
    assert world.run(**changes, teacher=None) == 2
    assert "or a --teacher for unlabelled ones" in capsys.readouterr().err


def test_a_run_without_a_teacher_makes_a_model_and_no_student(world, capsys):
    assert world.run(max_steps=1, teacher=None, distillation_loss_weight=0) == 0
    assert f"The model is in {world.output}" in capsys.readouterr().out
