"""File operations of whole programs that fail: each ends well, or in one sentence with the cause.

`file_faults/calls.c` makes the calls to libc fail, whoever makes them: Python, numpy, safetensors.
"""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALL = 10**6
PROGRAMS = ("train", "resume", "prepare", "evaluate", "predict", "card")
KINDS = {
    "open": (errno.EMFILE, errno.EIO, errno.EACCES),
    "read": (errno.EIO, errno.ESTALE),
    "write": (errno.ENOSPC, errno.EIO),
    "fsync": (errno.EIO, errno.EINVAL),
    "flock": (errno.ENOSYS, errno.ENOLCK, errno.EIO),
    "rename": (errno.EIO, errno.EACCES),
    "unlink": (errno.EBUSY, errno.EPERM),
    "mkdir": (errno.EROFS, errno.EIO),
    "chmod": (errno.EPERM, errno.EROFS),
    "stat": (errno.ESTALE, errno.EIO),
    "mmap": (errno.ENOMEM, errno.ENODEV),
    "list": (errno.EMFILE, errno.EIO),
    "fallocate": (errno.EOPNOTSUPP, errno.ENOSPC),
}


class Sweep:
    """The process that starts programs whose file operations fail."""

    def __init__(self, folder):
        library = folder / "calls.so"
        source = ROOT / "tests/file_faults/calls.c"
        compile_ = ["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"]
        subprocess.run(compile_, check=True, capture_output=True, timeout=60)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.file_faults.sweep", folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env={**os.environ, "LD_PRELOAD": str(library), "HF_HUB_OFFLINE": "1"},
        )

    def ask(self, program, kind="", first=0, last=0, code=0):
        """Exit status, how many calls of the kind there were, what was printed."""
        print(json.dumps([program, kind, first, last, code]), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def check(self, program, kind, first, last, code):
        """The program ends with status 0, or with 2 and one sentence that names the cause."""
        status, _, said = self.ask(program, kind, first, last, code)
        case = f"{program}: {kind} {first} to {last}, {errno.errorcode[code]}: {status}\n{said}"
        assert status in (0, 2) and "Traceback" not in said, case
        assert kind == "stat" or "damaged" not in said, case  # what cannot be read may be whole
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert len(errors) == (status == 2), case
        for line in errors:
            # transformers and safetensors take a file that they cannot see or open for absent.
            is_theirs = kind == "stat" or (kind == "open" and "does not load" in line)
            is_full = code == errno.ENOSPC and "disk is full" in line
            assert is_theirs or is_full or os.strerror(code) in line, case
        return status


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    if shutil.which("cc") is None or not sys.platform.startswith("linux"):
        pytest.skip("it takes Linux and a C compiler")
    made = Sweep(tmp_path_factory.mktemp("sweep"))
    yield made
    made.process.kill()
    made.process.wait()


@pytest.mark.program
def test_a_sample_of_faults(sweep):
    for program, kind, place, last, code in (
        ("train", "fsync", 0.9, ALL, errno.EINVAL),
        ("train", "list", 1, 0, errno.EMFILE),
        ("resume", "open", 0, 0, errno.EMFILE),
        ("resume", "stat", 0.5, 0, errno.EIO),
        ("prepare", "open", 0.5, 0, errno.EIO),
        ("predict", "read", 0, ALL, errno.ESTALE),
    ):
        status, seen, said = sweep.ask(program, kind)
        assert status == 0 and seen > 0, said
        first = 1 + int(place * (seen - 1))
        sweep.check(program, kind, first, last or first, code)
    assert sweep.check("train", "flock", 1, ALL, errno.ENOSYS) == 0


@pytest.mark.program
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("program", PROGRAMS)
def test_faults(sweep, program, kind):
    """Eight places of each kind; one call that fails, or all from there on."""
    status, seen, said = sweep.ask(program, kind)
    assert status == 0, said
    if not seen:
        pytest.skip(f"{program} makes no such call")
    for number in range(8):
        first = 1 + number * (seen - 1) // 7
        code = KINDS[kind][number % len(KINDS[kind])]
        sweep.check(program, kind, first, ALL if number % 4 < 2 else first, code)
