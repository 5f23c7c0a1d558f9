"""What the machine can do, and what a call takes of it."""

import gc
import time
from collections.abc import Callable
from ctypes import CDLL
from ctypes.util import find_library
from pathlib import Path

import torch


def matmul_rate(kind: torch.dtype) -> float:
    """Operations per second of torch.matmul: the fastest of a few of 1,024 x 1,024."""
    one, other = torch.randn(2, 1024, 1024).to(kind)
    taken = []
    for _ in range(10):
        started = time.perf_counter()
        torch.matmul(one, other)
        taken.append(time.perf_counter() - started)
    return 2 * 1024**3 / min(taken)


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
