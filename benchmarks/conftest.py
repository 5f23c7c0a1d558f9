"""`pytest benchmarks/ --benchmark` times; without the option only the gates run."""

from pathlib import Path

import pytest
import torch

THREADS = 2


def pytest_addoption(parser):
    parser.addoption(
        "--benchmark",
        action="store_true",
        help="time what benchmarks/ has, once its results have proved equal",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "timed: runs with --benchmark only")


def pytest_collect_file(file_path: Path, parent):
    # A file that the command line names is collected by pytest itself.
    named = parent.session.isinitpath(file_path)
    if file_path.name.startswith("bench_") and file_path.suffix == ".py" and not named:
        return pytest.Module.from_parent(parent, path=file_path)


def pytest_collection_modifyitems(config, items):
    if config.getoption("--benchmark"):
        return
    timed = [item for item in items if item.get_closest_marker("timed")]
    items[:] = [item for item in items if item not in timed]
    config.hook.pytest_deselected(items=timed)


@pytest.fixture
def two_threads():
    """What is timed runs on THREADS threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)
