import collections
import os
import shutil
import types
from functools import partial

import pytest
from hypothesis import HealthCheck, settings

# As `make test` does, before torch is imported: what forks compute is compared with this process,
# and equal bits need equal threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A test states its examples per hundred of these. `make quick` takes the profile few; `pytest
# --hypothesis-profile many` tries 50 times as many as usual, other ones each time.
SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
COMMON = {"deadline": None, "database": None, "suppress_health_check": SLOW}
settings.register_profile("usual", max_examples=100, derandomize=True, **COMMON)
settings.register_profile("few", max_examples=20, derandomize=True, **COMMON)
settings.register_profile("many", max_examples=5000, **COMMON)
settings.load_profile("usual")

KILLS = (28, 252)


def pytest_addoption(parser):
    text = f"kill runs {KILLS[1]} times instead of {KILLS[0]}, and train for thousands of steps"
    parser.addoption("--long", action="store_true", help=text)
    text = "run at most so many cases of each test, and none that is slow"
    parser.addoption("--cases", type=int, help=text)


def _spread(items, most):
    """At most `most` of them, from the first to the last."""
    if len(items) <= most:
        return items
    return [items[i * (len(items) - 1) // max(1, most - 1)] for i in range(most)]


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(config, items):
    """Give out the markers `program` and, in matrices, `slow`, and leave out what --cases says."""
    tests = collections.defaultdict(list)
    for item in items:
        tests[item.function].append(item)
        if {"world", "finished"} & set(item.fixturenames):
            item.add_marker("program")
    for cases in tests.values():
        for number, item in enumerate(cases):
            if sample := item.get_closest_marker("sample"):
                row, column = divmod(number, *sample.args)
                # Along a diagonal, so that no value of a parameter is always left out.
                if column != row % sample.args[0]:
                    item.add_marker("slow")
    if most := config.getoption("--cases"):
        kept = set()
        for cases in tests.values():
            kept.update(_spread([case for case in cases if "slow" not in case.keywords], most))
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Call a test with the marker `pretended` in the process that has a pretended CUDA device."""
    if pyfuncitem.get_closest_marker("pretended") is None:
        return None
    from tests.pretended.process import run_item

    run_item(pyfuncitem)
    return True


@pytest.fixture
def long(request):
    """Whether --long was given."""
    return request.config.getoption("--long")


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Folders and files of a small run, and `run(**flags)`, which calls the program."""
    from tests.programs import World  # loads transformers

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return World(tmp_path)


@pytest.fixture
def wide(world):
    """A teacher that is wider than the world's student, and has twice its layers."""
    from tests import readers

    return readers.save(world.path / "wide", hidden_size=24, layers=4, seed=5)


@pytest.fixture(scope="session")
def _finished(tmp_path_factory):
    """A run of six steps, evaluated twice in it and, with its teacher, after it."""
    from tests.programs import World

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
    from tests import steppers

    return partial(steppers.make, tmp_path)
