"""The process in which tests meet the pretended device: it loads the device's library before torch.

One for each worker of pytest, started by the first test that needs it, ended with the worker.
"""

import contextlib
import io
import os
import pickle
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

from tests.pretended import build

ROOT = Path(__file__).parents[2]
_process = None


def run_pretended(function, *args, **kwargs):
    """function(*args, **kwargs) in that process; what it prints is printed here.

    function: of a module; arguments and result: what can be pickled. A test that fails or skips
    there fails or skips here.
    """
    global _process
    if refused := build.why_not():
        pytest.skip(refused)
    if _process is None or _process.poll() is not None:
        _process = subprocess.Popen(
            [sys.executable, "-m", "tests.pretended.process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
    pickle.dump((function, args, kwargs), _process.stdin)
    _process.stdin.flush()
    try:
        kind, result, printed = pickle.load(_process.stdout)
    except EOFError:
        pytest.fail(f"The process of the pretended device ended with {_process.wait()}.")
    print(printed, end="")
    if kind == "skipped":
        pytest.skip(result)
    if kind == "failed":
        pytest.fail(result, pytrace=False)
    return result


def run_item(item):
    """Call a test's function there, with its fixtures' values."""
    names = item._fixtureinfo.argnames
    run_pretended(item.obj, **{name: item.funcargs[name] for name in names})


def _serve():
    """Answer calls until the other side is gone."""
    from _pytest import assertion, config

    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is not Python prints to stderr
    build.load()
    import torch

    torch.set_num_threads(1)
    assertion.install_importhook(config.get_config())  # asserts tell their values
    while True:
        try:
            function, args, kwargs = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            answer = _answer(function, args, kwargs)
        pickle.dump((*answer, printed.getvalue()), answers)
        answers.flush()


def _answer(function, args, kwargs):
    try:
        return "result", function(*args, **kwargs)
    except pytest.skip.Exception as skipped:
        return "skipped", str(skipped)
    except (Exception, SystemExit, pytest.fail.Exception):
        return "failed", traceback.format_exc()


if __name__ == "__main__":
    _serve()
