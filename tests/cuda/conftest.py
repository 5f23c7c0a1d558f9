"""One emulated build of the CUDA rows for all tests of this folder."""

import shutil

import emulator
import pytest


@pytest.fixture(scope="session")
def rows(tmp_path_factory) -> emulator.Emulator:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed: it builds the CUDA rows for the emulator")
    return emulator.Emulator(emulator.build(tmp_path_factory.mktemp("emulator")))
