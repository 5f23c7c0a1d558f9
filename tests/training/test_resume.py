import pytest

from kdfast.common import launch
from kdfast.common.ranks import Ranks
from kdfast.config import TrainConfig
from kdfast.training import resume


@pytest.fixture
def restart(tmp_path, monkeypatch):
    """restart(began, steps, **flags): flags of a second start, by the launch's mark and by the
    steps of the checkpoints that are there."""

    def restart(began, steps, **flags):
        output = tmp_path / "out"
        for step in steps:
            (output / f"checkpoint-{step}").mkdir(parents=True)
        kept = {} if began is None else {str(output): str(began)}
        monkeypatch.setattr(launch, "recall", kept.get)
        ranks = Ranks()
        ranks.restarts = 1
        config = TrainConfig(teacher="t", train_file="x", output_dir=str(output), **flags)
        found = resume.restarted(config, ranks).output
        return found.resume_from_checkpoint or None, found.overwrite

    return restart


NAMED = "elsewhere/checkpoint-3"


@pytest.mark.parametrize(
    ("began", "steps", "flags", "then"),
    [
        (None, [4], {}, (None, False)),
        (None, [], {}, (None, False)),
        (None, [4], {"overwrite": True}, (None, True)),
        (None, [4], {"resume_from_checkpoint": NAMED}, (NAMED, False)),
        (0, [], {}, (None, True)),
        (0, [2], {}, ("last", False)),
        (0, [2], {"overwrite": True}, ("last", False)),
        (3, [2], {"resume_from_checkpoint": NAMED}, (NAMED, False)),
        (3, [2, 10], {"resume_from_checkpoint": NAMED}, ("last", False)),
    ],
)
def test_a_restart_goes_on_from_checkpoints_of_its_launch_alone(restart, began, steps, flags, then):
    assert restart(began, steps, **flags) == then
