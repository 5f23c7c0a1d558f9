"""Instants of a run at which it can be killed: every touch of a file, and every micro-batch."""

import os
import signal
import sys
from collections.abc import Callable

from kdfast.training.optimizer import ScaledAdamW
from kdfast.training.step import StepSums

FILE_EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}


def watch(folders: tuple[str, ...], at: Callable[[str], None]) -> None:
    """Call at(what) at every instant from now on, in this process, for good.

    File events count where they change something below `folders`, before they happen.
    """

    def hook(event: str, arguments: tuple) -> None:
        if event in FILE_EVENTS and isinstance(arguments[0], (str, os.PathLike)):
            path = os.fspath(arguments[0])
            is_read = event == "open" and arguments[1] in ("r", "rb")
            # rmtree names what it deletes from within its folder.
            is_near = isinstance(path, str) and (path.startswith(folders) or "/" not in path)
            if is_near and not is_read:
                at(f"{event} {path}")

    sys.addaudithook(hook)
    for owner, name in ((StepSums, "add"), (ScaledAdamW, "step"), (os, "fsync")):
        _count(owner, name, at)


def _count(owner: object, name: str, at: Callable[[str], None]) -> None:
    original = getattr(owner, name)

    def counted(*arguments):
        at(name)
        return original(*arguments)

    setattr(owner, name, counted)


class Killer:
    """Counts instants; kills this process, as kill -9 does, at number `last` if that is given."""

    def __init__(self, last: int | None = None):
        self.last = last
        self.seen: list[str] = []

    def __call__(self, what: str) -> None:
        self.seen.append(what)
        if self.last is not None and len(self.seen) > self.last:
            os.kill(os.getpid(), signal.SIGKILL)
