"""Interleaved timing, and memory: every round has one sample of each candidate, so that all see one
machine.

A sample begins with a call that is not timed, which brings the candidate's data back into the
cache; it is the median of a few calls that are. Nothing here knows what is timed.
"""

import gc
import statistics
import time
from collections.abc import Callable
from ctypes import CDLL
from ctypes.util import find_library
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")

SECONDS = 6.0  # for one group of candidates
FEWEST, MOST = 5, 100  # rounds
SAMPLE, MOST_CALLS = 2e-3, 15  # seconds of a sample, and calls
LONG = 20e-3  # seconds of a call whose data leave the cache anyway

# A candidate returns the moments, in seconds, that its steps took.
Candidate = Callable[[], tuple[float, ...]]


def clock(device: str) -> float:
    """Seconds now: of this thread's CPU time on a CPU, without what other
    processes take; `wall` on a GPU.
    """
    return time.thread_time() if device == "cpu" else wall(torch.device(device))


def wall(device: torch.device) -> float:
    """Seconds of the wall clock, after all work of a GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def time_interleaved(candidates: dict[str, Candidate], seconds: float = SECONDS) -> dict[str, list]:
    """For each candidate a list of tuples of seconds, one for each round."""
    calls = {}
    for name, candidate in candidates.items():
        once = sum(candidate())
        if once < LONG:
            once = min(sum(candidate()) for _ in range(3))
        calls[name] = 0 if once >= LONG else max(1, min(MOST_CALLS, round(SAMPLE / once)))
    taken = {name: [] for name in candidates}
    started = time.perf_counter()
    gc.collect()
    gc.disable()
    try:
        for done in range(MOST):
            if done >= FEWEST and time.perf_counter() - started > seconds:
                break
            for name, candidate in candidates.items():
                sample = [candidate()]
                sample = [candidate() for _ in range(calls[name])] or sample
                taken[name].append(sorted(sample, key=sum)[len(sample) // 2])
    finally:
        gc.enable()
    return taken


def percentiles(seconds: list[float]) -> dict[str, float]:
    """p20, p50 and p80, in microseconds."""
    cuts = statistics.quantiles(seconds, n=10, method="inclusive")
    return {name: round(1e6 * cuts[i], 2) for name, i in (("p20", 1), ("p50", 4), ("p80", 7))}


def peak_memory(call: Callable[[], object]) -> int:
    """Bytes resident at the peak of a call, beyond what was resident before it; Linux only."""
    gc.collect()
    CDLL(find_library("c")).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


def peak_on_card(device: torch.device, call: Callable[[], T]) -> tuple[T, int | None]:
    """What a call returns, and the most bytes of the card that tensors took meanwhile, weights and
    optimizer included; None on a CPU."""
    if device.type == "cpu":
        return call(), None
    torch.cuda.reset_peak_memory_stats(device)
    result = call()
    return result, torch.cuda.max_memory_allocated(device)


def free_memory(device: torch.device) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))
