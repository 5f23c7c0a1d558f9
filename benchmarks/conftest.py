"""`pytest benchmarks/ --benchmark` times; without the option only the gates run."""

from pathlib import Path

import pytest
import torch

from kdfast.common.device import device_of
from kdfast.common.errors import UserError

THREADS = 2


def pytest_addoption(parser):
    parser.addoption(
        "--benchmark",
        action="store_true",
        help="time what benchmarks/ has, once its results have proved equal",
    )
    parser.addoption(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="of gates and timings. A GPU's figures go into one record, gpu_<card>.json. "
        "Default: cpu, whether there is a GPU or not",
    )
    parser.addoption(
        "--quick",
        action="store_true",
        help="with --benchmark: a GPU's tables for a tiny reader, on --device, and no record",
    )


def pytest_configure(config):
    try:
        device_of(config.getoption("--device"))
    except UserError as error:
        raise pytest.UsageError(f"--{error}") from None


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
def device(request) -> torch.device:
    """The device that --device names."""
    return device_of(request.config.getoption("--device"))


@pytest.fixture
def quick(request) -> bool:
    """Whether --quick was given."""
    return request.config.getoption("--quick")


@pytest.fixture
def two_threads(device):
    """What is timed on a CPU runs on THREADS threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS if device.type == "cpu" else before)
    yield
    torch.set_num_threads(before)
