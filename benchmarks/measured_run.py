"""A run of kdfast.train as its user starts it: seconds and memory by phase, from the outside.

Nothing here knows how the program works: a phase ends when the folder that it makes is there.
"""

import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

POLL = 0.05  # seconds
TICK = os.sysconf("SC_CLK_TCK")
PHASES = ("prepare", "teacher", "train")


@dataclass
class Phase:
    """seconds: on the clock. cpu: of all processes. anonymous: bytes, RssAnon of all processes
    together at its highest. processes: the most at once."""

    seconds: float = 0.0
    cpu: float = 0.0
    anonymous: int = 0
    processes: int = 0


def measure_run(arguments: list[str], cache: Path, limit: int) -> dict[str, Phase]:
    """Run `python -m kdfast.train` with `arguments` and --cache_dir `cache`.

    limit: bytes, RLIMIT_DATA of each of its processes: what they can allocate, touched or not,
    and with their threads' stacks; files mapped read-only or shared do not count. Raises
    AssertionError with the program's output where it fails.
    """
    command = [sys.executable, "-m", "kdfast.train", "--cache_dir", str(cache), *arguments]
    root = Path(__file__).parents[1]
    log = cache.parent / "output.txt"
    phases = {name: Phase() for name in PHASES}
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=root,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
        )
        now, used = time.perf_counter(), 0.0
        while process.poll() is None:
            phase = phases[_phase(cache)]
            before, now = now, time.perf_counter()
            tree = _tree(process.pid)
            total = sum(map(_cpu, tree), start=_reaped(process.pid))
            phase.seconds += now - before
            phase.cpu += max(0.0, total - used)
            used = max(used, total)
            phase.anonymous = max(phase.anonymous, sum(map(_anonymous, tree)))
            phase.processes = max(phase.processes, len(tree))
            time.sleep(POLL)
    assert process.returncode == 0, log.read_text()[-3000:]
    return phases


def _phase(cache: Path) -> str:
    for name, folder in (("prepare", "features"), ("teacher", "teacher")):
        # What is being made has a suffix, and so has a lock.
        if not any(path.is_dir() and not path.suffix for path in (cache / folder).glob("*")):
            return name
    return "train"


def _tree(pid: int) -> list[int]:
    """A process and all that descend from it."""
    found = [pid]
    for each in found:
        for children in Path(f"/proc/{each}/task").glob("*/children"):
            found += map(int, _read(children).split())
    return found


def _anonymous(pid: int) -> int:
    lines = _read(Path(f"/proc/{pid}/status")).splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def _cpu(pid: int) -> float:
    return _times(pid, 11, 12)


def _reaped(pid: int) -> float:
    """CPU seconds of children that have ended."""
    return _times(pid, 13, 14)


def _times(pid: int, *fields: int) -> float:
    """Fields of /proc/PID/stat, counted behind the command's name, as seconds."""
    parts = _read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    return sum(int(parts[field]) for field in fields) / TICK if parts else 0.0


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
        return ""
