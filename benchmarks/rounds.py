"""Timing side by side: in every round each contender has its turn, so that all see one machine.

A turn is a call that is not timed, which brings the contender's data back into the cache, and
then a few that are; the turn counts with its median. Nothing here knows what is timed.
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

SECONDS = 6.0  # for one group of contenders
FEWEST, MOST = 5, 100  # rounds
TURN, MOST_CALLS = 2e-3, 15  # seconds of a turn, and calls
LONG = 20e-3  # seconds of a call whose data leave the cache anyway

# A contender returns the moments, in seconds, that its steps took.
Contender = Callable[[], tuple[float, ...]]


def clock(device: str) -> float:
    """Seconds now: of this thread's CPU time on a CPU, which leaves out whatever else the machine
    runs meanwhile; of the wall clock on a GPU, once it has done what it was given.
    """
    if device == "cpu":
        return time.thread_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def run_rounds(contenders: dict[str, Contender], seconds: float = SECONDS) -> dict[str, list]:
    """For each contender a list of tuples of seconds, one for each round."""
    calls = {}
    for name, contender in contenders.items():
        once = sum(contender())
        if once < LONG:
            once = min(sum(contender()) for _ in range(3))
        calls[name] = 0 if once >= LONG else max(1, min(MOST_CALLS, round(TURN / once)))
    taken = {name: [] for name in contenders}
    started = time.perf_counter()
    gc.collect()
    gc.disable()
    try:
        for done in range(MOST):
            if done >= FEWEST and time.perf_counter() - started > seconds:
                break
            for name, contender in contenders.items():
                turn = [contender()]
                turn = [contender() for _ in range(calls[name])] or turn
                taken[name].append(sorted(turn, key=sum)[len(turn) // 2])
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
