"""Interleaved timing: every round has one sample of each candidate, so that all see one machine.

A sample begins with a call that is not timed, which brings the candidate's data back into the
cache; it is the median of a few calls that are. Nothing here knows what is timed.
"""

import gc
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from kdfast.common.machine import cpu_name

SECONDS = 6.0  # for one group of candidates
FEWEST, MOST = 5, 100  # rounds
SAMPLE, MOST_CALLS = 2e-3, 15  # seconds of a sample, and calls
LONG = 20e-3  # seconds of a call whose data leave the cache anyway

# A candidate returns the moments, in seconds, that its steps took.
Candidate = Callable[[], tuple[float, ...]]


def clock(device: str) -> float:
    """Seconds now: of this thread's CPU time on a CPU, without what other
    processes take; of the wall clock on a GPU, after all its work is done.
    """
    if device == "cpu":
        return time.thread_time()
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


def machine(device: str) -> dict[str, str | int]:
    """Hardware, versions, commit and command: what a figure means nothing without."""
    commit = _output("git", "describe", "--always", "--dirty", "--abbrev=12")
    found = {
        "processor": cpu_name(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit or "unknown",
        "command": "pytest " + " ".join(sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d"),
        "load at the start": f"{os.getloadavg()[0]:.1f}",
    }
    if device != "cpu":
        card = torch.cuda.get_device_properties(device)
        found["card"] = f"{card.name}, sm_{card.major}{card.minor}"
        found["CUDA"] = torch.version.cuda
    return found


def _output(*command: str) -> str:
    try:
        here = Path(__file__).parent
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=here)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()
