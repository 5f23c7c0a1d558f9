"""A run that torchrun starts a second time, in a folder that was there before the launch."""

import json
import shutil

import pytest
import torch.distributed as dist

from kdfast import train
from kdfast.common import launch
from kdfast.common.errors import UserError
from kdfast.training.results import Results
from tests.programs import config_of


@pytest.fixture
def torchrun(monkeypatch):
    """torchrun(count): from now on the program runs as a start of a launch, after so many."""
    store = dist.HashStore()
    monkeypatch.setattr(launch, "_store", lambda: store)

    def start(count):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(count))

    return start


def dies(*arguments):
    raise UserError("as if it were killed")


def starts_of(folder):
    return json.loads((folder / "run.json").read_text())["starts"]


def files_in(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("stage", ["predictions", "both"])
def test_what_the_first_start_refused_to_replace_stays(world, torchrun, stage, capsys):
    flags = {"stage": stage, "max_steps": 2, "validation_file": None}
    assert world.run(**flags) == 0
    before = files_in(world.output)
    for count in range(2):
        torchrun(count)
        assert world.run(**flags, learning_rate=1e-3) == 2
        assert "is not empty" in capsys.readouterr().err
    assert files_in(world.output) == before


def test_flags_hold_until_the_launch_has_a_checkpoint(world, torchrun, monkeypatch):
    flags = {"max_steps": 4, "save_steps": 1, "save_total_limit": 9, "validation_file": None}
    assert world.run(**flags) == 0
    other, new = world.path / "elsewhere", world.path / "new"
    shutil.copytree(world.output, other)
    shutil.copytree(other / "checkpoint-2", new / "checkpoint-2")
    flags |= {"learning_rate": 1e-3, "allow_changes": "learning_rate"}
    named = {"resume_from_checkpoint": other / "checkpoint-3", "output_dir": new}
    torchrun(0)
    with monkeypatch.context() as first_start:  # it has begun, and has no checkpoint of its own
        first_start.setattr(Results, "log_step", dies)
        assert world.run(**flags, **named) == 2
    torchrun(1)
    assert world.run(**flags, **named) == 0
    assert starts_of(new) == [0, 3]
    # In these folders the first start died before it had begun.
    assert world.run(**flags, resume_from_checkpoint=world.output / "checkpoint-1") == 0
    assert starts_of(world.output) == [0, 1]
    assert world.run(**flags, overwrite=True, output_dir=other) == 0
    assert starts_of(other) == [0]


@pytest.mark.parametrize("replaces", [False, True])
def test_both_stages_take_nothing_of_an_earlier_run(world, torchrun, monkeypatch, replaces):
    """The first start has died between the stages."""
    flags = {"stage": "both", "max_steps": 2, "save_steps": 1, "validation_file": None}
    if replaces:
        assert world.run(**flags) == 0
    flags |= {"learning_rate": 2e-3, "overwrite": replaces or None}
    torchrun(0)
    with monkeypatch.context() as first_start:
        first_start.setattr(train.TrainFiles, "teacher_logits", lambda *rest: rest[2] and dies())
        assert world.run(**flags) == 2
    torchrun(1)
    assert world.run(**flags) == 0
    assert starts_of(world.output / "layers") == [0, 2]
    assert starts_of(world.output / "predictions") == [0]
    assert config_of(world.output / "predictions")["learning_rate"] == 2e-3
