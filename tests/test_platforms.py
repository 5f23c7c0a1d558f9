"""Other systems, of which there is only a stand-in here (tests/elsewhere.py)."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests import readers


@pytest.mark.program
@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_reader_loss_and_predict(tmp_path, platform):
    reader = readers.save(tmp_path / "reader", "bert", seed=1)
    run = [sys.executable, "-m", "tests.elsewhere", platform, str(reader)]
    root = Path(__file__).parents[1]
    done = subprocess.run(run, capture_output=True, text=True, timeout=200, cwd=root)
    assert done.returncode == 0, done.stderr
    refused = [
        f"kdfast.{name} needs Linux or macOS" in done.stderr for name in ("train", "prepare")
    ]
    assert refused == [platform == "win32"] * 2
