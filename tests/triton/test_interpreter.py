"""Runs tests/triton/interpreted, which needs Triton's interpreter on before Triton is imported."""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

FOLDER = Path(__file__).parent / "interpreted"


def release(module):
    return tuple(int(part) for part in module.__version__.split(".")[:2])


@pytest.mark.program
def test_interpreted_rows(request):
    triton = pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    if release(triton) < (3, 7) and release(numpy) >= (2, 4):
        pytest.skip(
            "the interpreter of Triton before 3.7 cannot loop to a number with numpy >= 2.4"
        )
    which = ["-m", request.config.option.markexpr, FOLDER]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *which],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr[-2_000:]
