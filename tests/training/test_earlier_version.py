"""Files of a run of commit b9a2766, before settings stood in groups: read as they are.

--stage both of the demo's teacher in fp16; `tests/golden/earlier_run.json` holds its run.json of
both stages, and the state of the checkpoint at the end.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from kdfast.config import FIXED_ON_RESUME, SETTINGS, TrainConfig
from kdfast.config_checks import check
from kdfast.training import checkpoint, resume, stages
from tests.training.test_checkpoint import save

FILES = json.loads((Path(__file__).parents[1] / "golden" / "earlier_run.json").read_text())

# Settings, with their defaults.
ADDED = {
    "packing": "auto",
    "unlabelled_file": None,
    "train_weights": None,
    "train_languages": None,
    "validation_split": None,
    "metric_for_best_model": "f1",
    "early_stopping_patience": None,
    "early_stopping_threshold": 0.0,
}


def config_of(record):
    """The settings of a run.json, without what is no setting any more."""
    dropped = {"check_invariance"}
    assert record["config"].keys() == SETTINGS.keys() - ADDED.keys() | dropped
    return TrainConfig(**{k: v for k, v in record["config"].items() if k not in dropped})


@pytest.mark.parametrize("name", ["layers_run", "run"])
def test_its_settings_are_the_same_settings(name):
    config = config_of(FILES[name])
    check(config)
    assert config.flat() | {"check_invariance": False} == FILES[name]["config"] | ADDED


def test_a_run_goes_on_from_its_checkpoint():
    identity = FILES["state"]["identity"]
    ours = resume.settings_of(config_of(FILES["run"]), FILES["run"]["precision"])
    assert ours == {name: identity.get(name, ADDED.get(name)) for name in FIXED_ON_RESUME}


def test_its_state_is_restored(setup, tmp_path):
    run = setup(precision="fp16")
    run.step(0, np.arange(3))
    folder = save(run, tmp_path, 2)
    (folder / checkpoint.STATE_FILE).write_text(json.dumps(FILES["state"]))
    progress, policy = checkpoint.load_checkpoint(folder, run.model, run.optimizer)
    saved = FILES["state"]["progress"] | {
        **dict.fromkeys(("best_exact", "best_steps", "best_digest")),
        "patience_counter": 0,
    }
    rule = vars(policy)
    assert not rule.pop("packed")
    assert vars(progress) | {"rule": rule} == saved
    assert (
        run.optimizer.updates == 2 and run.optimizer.scaler.state_dict() == FILES["state"]["scaler"]
    )


def test_a_student_of_its_stage_layers_is_known(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(FILES["layers_run"]))
    config = TrainConfig(student=str(tmp_path))
    assert stages.earlier(config) == FILES["layers_run"]["config"]
