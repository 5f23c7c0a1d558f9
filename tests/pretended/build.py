"""The library that must be loaded before torch: what a build without CUDA lacks (cuda.cpp)."""

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from importlib.metadata import version
from pathlib import Path

SOURCE = Path(__file__).with_name("cuda.cpp")


def why_not() -> str | None:
    """Why no device can be pretended here, or None."""
    if not sys.platform.startswith("linux"):
        return "the pretended CUDA device is for Linux"
    if shutil.which("g++") is None:
        return "the pretended CUDA device needs g++"
    # It registers the hooks that cuda.cpp does, and whoever comes second ends the process.
    if any((_torch() / "lib").glob("libtorch_cuda*")):
        return (
            "the pretended CUDA device needs a torch without CUDA: install torch from "
            "https://download.pytorch.org/whl/cpu"
        )
    return None


def _torch() -> Path:
    """Where torch is installed, found without importing it."""
    return Path(importlib.util.find_spec("torch").origin).parent


def build() -> Path:
    """The compiled library, made once for each source and torch; about ten seconds."""
    torch = _torch()
    key = f"{SOURCE.read_text()} {version('torch')} {torch}".encode()
    folder = Path(tempfile.gettempdir()) / f"kdfast-pretended-{os.getuid()}"
    library = folder / f"{hashlib.sha256(key).hexdigest()[:16]}.so"
    if not library.exists():
        folder.mkdir(mode=0o700, exist_ok=True)
        own = library.with_suffix(f".{os.getpid()}")
        command = ["g++", "-O1", "-shared", "-fPIC", "-std=c++20", str(SOURCE), "-o", str(own)]
        command += ["-I", str(torch / "include"), "-L", str(torch / "lib"), "-ltorch_cpu", "-lc10"]
        subprocess.run([*command, f"-Wl,-rpath,{torch / 'lib'}"], check=True)
        own.rename(library)  # another process may have been faster: both made the same
    return library


@cache
def load() -> ctypes.CDLL:
    """Load it into this process, which has not imported torch yet."""
    if "torch" in sys.modules:
        raise RuntimeError("The pretended device was to be loaded before torch.")
    library = ctypes.CDLL(str(build()))
    library.pretended_stream.restype = ctypes.c_int64
    library.pretended_configure.argtypes = [ctypes.c_int, ctypes.c_bool]
    library.pretended_set_stream.argtypes = [ctypes.c_int, ctypes.c_int64]
    return library
