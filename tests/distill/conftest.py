import shutil
import types
from functools import partial

import pytest

from tests import steppers
from tests.programs import World


@pytest.fixture(scope="session")
def _finished(tmp_path_factory):
    """A run of six steps, evaluated twice in it and, with its teacher, after it."""
    world = World(tmp_path_factory.mktemp("finished"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        assert world.run(report=True, eval_steps=3, save_steps=3) == 0
    return world


@pytest.fixture
def finished(_finished, tmp_path):
    """A copy of its folder, and its data: edit the files at will."""
    folder = tmp_path / "finished"
    shutil.copytree(_finished.output, folder)
    return types.SimpleNamespace(folder=folder, validation_file=_finished.validation_file)


@pytest.fixture
def setup(tmp_path):
    """steppers.make in a folder of the test's own."""
    return partial(steppers.make, tmp_path)
