"""How much memory a call takes."""

import gc
from collections.abc import Callable
from ctypes import CDLL
from ctypes.util import find_library
from pathlib import Path


def peak_memory(call: Callable[[], object]) -> int:
    """Bytes resident at the peak of a call, beyond what was resident before it; Linux only."""
    gc.collect()
    CDLL(find_library("c")).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))
