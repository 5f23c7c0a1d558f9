"""SIGTERM, SIGINT, SIGHUP: how a scheduler, a user, a closed terminal stop a run without loss."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)
HANGUP = getattr(signal, "SIGHUP", None)  # of a terminal that is closed; Windows has none
# A launcher passes on to its ranks what all processes of the group have got already.
SECONDS_OF_ONE_REQUEST = 1.0


class Stopped(KeyboardInterrupt):
    """The run was asked to stop by signal `number`; programs exit with 128 + number.

    can_resume: there is a checkpoint of the run.
    """

    def __init__(self, number: int, can_resume: bool = False):
        advice = "; --resume_from_checkpoint last goes on" if can_resume else ""
        super().__init__(f"stopped by {signal.Signals(number).name}{advice}")
        self.number = number


class StopSignals:
    """A context in which the first signal asks the run to stop, and a second one ends it at once.

    Inside `deferred` the signal is only noted, as `number`: the run stops where nothing is lost.
    Outside it raises Stopped. agreed: all ranks know that the run stops here. A StopSignals that
    is not entered leaves the signals alone and never stops anything.

    can_resume: the run that is stopped has a checkpoint. is_first: of the ranks, this one says that
    the signal was heard.

    grace_seconds: from the signal until the process may be killed. A step may take the first half
    of it; the rest is for the checkpoint.
    """

    def __init__(self) -> None:
        self.grace_seconds = 30.0
        self.number: int | None = None
        self.agreed = False
        self.can_resume = False
        self.is_first = True
        self._asked_at = 0.0
        self._is_deferred = False
        self._before: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # others may set no handlers
            numbers = [*SIGNALS]
            if HANGUP is not None and signal.getsignal(HANGUP) != signal.SIG_IGN:  # as by nohup
                numbers.append(HANGUP)
            self._before = {each: signal.signal(each, self._handle) for each in numbers}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a signal is noted and raises nothing."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False

    @property
    def is_asked(self) -> bool:
        """Whether this process has been asked to stop."""
        return self.number is not None

    def must_drop(self, started: float, done: int, of: int) -> bool:
        """Whether a step that `started` (time.monotonic) would end too late, `done` parts of it
        being done; the parts are taken to last equally long."""
        if self.number is None or done == 0:
            return False
        end = started + (time.monotonic() - started) * of / done
        return end > self._asked_at + self.grace_seconds / 2

    def _handle(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self.number is not None:
            if now - self._asked_at > SECONDS_OF_ONE_REQUEST:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self.number, self._asked_at = number, now
        if not self._is_deferred:
            raise Stopped(number, self.can_resume)
        if self.is_first:
            text = (
                f"\n{signal.Signals(number).name}: the run stops as soon as nothing is lost, in a "
                "checkpoint; a second one ends it at once, without.\n"
            )
            with suppress(OSError):  # print is not safe here: it may be what was interrupted
                os.write(2, text.encode())
