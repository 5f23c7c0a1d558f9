"""How the ranks of a run notice that one of them hangs.

The main thread of each rank counts what it gets done: `report`, and each wait for others. A thread
writes the count into the store that all ranks share, so that a rank whose main thread hangs stands
still there, though the thread runs on. A rank that waits reads the counts of all; where one has
stood still for too long, all processes end with a sentence that names it.

The timeout of a collective would not do: after it gloo has lost its connections, so that no slow
rank could be waited for again, and NCCL blocks where the host next reads from the device.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from kdfast.common.errors import printable
from kdfast.common.program import MISTAKE

if TYPE_CHECKING:
    import torch.distributed as dist

MINUTE = 60.0
LIMIT = 10 * MINUTE  # that a rank may take from one report to the next
LONG = 60 * MINUTE  # the same where it downloads or loads models, writes or deletes them
POLL = 5.0  # seconds between two looks at the store
FAILURE, HUNG = "failure", "hung"  # keys of the store: "RANK why"
GO_ON = "a run of training that has a checkpoint goes on from it with --resume_from_checkpoint last"


@dataclass
class Progress:
    """What the main thread of this process has got done.

    Attributes:
        done: Grows with each report, and where a wait begins or ends.
        what: The latest report.
        patience: Seconds until the next one, at most.
        waits: Whether this rank has done its part and waits for other ranks.
    """

    done: int = 0
    what: str = "the start"
    patience: float = LONG
    waits: Callable[[], bool] = lambda: False


_own = Progress()


def report(what: str, patience: float | None = None) -> None:
    """Say that the main thread has got to `what`; costs less than a microsecond.

    patience: seconds until its next report at most, LIMIT if None.
    """
    _own.done += 1
    _own.what, _own.patience = what, LIMIT if patience is None else patience
    _own.waits = lambda: False


@contextmanager
def waiting() -> Iterator[None]:
    """Inside, this rank waits for other ranks."""
    begin_to_wait(lambda: True)
    try:
        yield
    finally:
        _own.done += 1
        _own.waits = lambda: False


def begin_to_wait(waits: Callable[[], bool]) -> None:
    """From now to the next report this rank waits for others as soon as waits() is true: once its
    device has done what it has been given."""
    _own.done += 1
    _own.waits = waits


def still_waiting() -> None:
    """Inside `waiting`: for a process that is no rank of this run, which may take any time."""
    _own.done += 1


class State(NamedTuple):
    """What a rank writes into the store. beats: how often; the others as in Progress."""

    beats: int
    done: int
    what: str
    patience: float
    waits: bool


@dataclass
class Peer:
    """A rank as this one sees it.

    silent, still: looks since its beats, what it has done last changed.
    """

    state: State
    silent: int = -1  # as the first look compares a state with itself
    still: int = -1

    def look(self, state: State) -> None:
        """Compare with its state at this look."""
        self.silent = 0 if state.beats != self.state.beats else self.silent + 1
        self.still = 0 if state.done != self.state.done else self.still + 1
        self.state = state


class Watch:
    """Tells the other ranks of this one's progress and, while this one waits, looks at theirs.

    Time is counted in looks, so that a job that is suspended as a whole can go on.

    Args:
        store: Of all ranks of this start.
        rank: This one.
        count: How many there are.
    """

    def __init__(self, store: dist.PrefixStore, rank: int, count: int):
        self.rank = rank
        self.verdict = ""  # why all ranks must end: "RANK why"
        self.has_told = False  # whether it has printed that
        # Of its own: the main thread may be in a call of the other one.
        self._store: dist.Store = store.clone()  # type: ignore[attr-defined]  # not in torch's stub
        self._keys = [f"progress of {each}" for each in range(count)]
        self._peers: dict[int, Peer] = {}
        self._unanswered = 0
        self._beats = 0
        self._over = threading.Event()
        self._exchange()
        # Two of them, as the store may be on a machine that does not answer.
        threading.Thread(target=self._repeat, args=(self._exchange,), daemon=True).start()
        threading.Thread(target=self._repeat, args=(self._judge,), daemon=True).start()

    def stop(self) -> None:
        """This rank no longer needs the others."""
        self._over.set()

    def _repeat(self, action: Callable[[], None]) -> None:
        while not self._over.wait(POLL):
            with suppress(RuntimeError):  # the store has gone with its process
                action()

    def _exchange(self) -> None:
        self._beats += 1
        waits = _own.waits()
        mine = State(self._beats, _own.done, _own.what, _own.patience, waits)
        self._store.set(self._keys[self.rank], json.dumps(mine))
        if self.verdict:
            self._store.compare_set(HUNG, "", self.verdict)
        elif self._store.check([HUNG]):
            self.verdict = self._store.get(HUNG).decode()
        elif not waits:
            self._peers.clear()
        elif self._store.check(self._keys):  # else one has not begun
            for rank, text in enumerate(self._store.multi_get(self._keys)):
                state = State(*json.loads(text))
                self._peers.setdefault(rank, Peer(state)).look(state)
            # A collective of gloo says by itself that a rank failed, a reduction of NCCL does not.
            if self._peers[self.rank].still > 2 and self._store.check([FAILURE]):
                self.verdict = self._store.get(FAILURE).decode()
            elif hung := find_hung(self._peers):
                self.verdict = f"{hung}; {GO_ON}."
        self._unanswered = 0

    def _judge(self) -> None:
        """End this process where all must, which the others have been given the time to read."""
        self._unanswered += 1
        if not self.verdict and _own.waits() and self._unanswered * POLL > LIMIT:
            self.verdict = (
                "-1 the process that keeps the ranks' store, torchrun's or rank 0's, has not "
                f"answered for {_time(LIMIT)}; {GO_ON}."
            )
        if not self.verdict:
            return
        sentence = why_stopped(self.rank, self.verdict)
        if self.verdict.startswith((f"{self.rank} ", "-1 ")):
            sentence += f" Rank {self.rank} is at {_place()}."
        with suppress(OSError):
            # Not print_line: the main thread may hang where it holds the bars' lock.
            print(f"error: {printable(sentence)}", file=sys.stderr, flush=True)
            self.has_told = True
        if not self._over.wait(4 * POLL):
            os._exit(MISTAKE)  # nothing else ends a main thread that waits in C


def find_hung(peers: dict[int, Peer]) -> str:
    """ "RANK why" for a rank that hangs, -1 where all wait for one another; "" where none does."""
    for rank, peer in peers.items():
        state, heading = peer.state, f"{rank} rank {rank} hangs"
        if peer.silent * POLL >= LIMIT:
            return (
                f"{heading}, or its machine is out of reach: nothing has been heard of it for "
                f"{_time(LIMIT)} (the last: {state.what})"
            )
        if not state.waits and peer.still * POLL >= state.patience:
            return (
                f"{heading}: its process is there, but has got nothing done for "
                f"{_time(state.patience)} (the last: {state.what})"
            )
    if all(each.state.waits and each.still * POLL >= LIMIT for each in peers.values()):
        return (
            f"-1 all ranks have waited for one another for {_time(LIMIT)} (the last: "
            f"{peers[0].state.what}), as where a network hangs"
        )
    return ""


def why_stopped(rank: int, known: str) -> str:
    """The sentence of a rank that another one ends. known: "RANK why", as the store holds it."""
    return f"Rank {rank} stops, because {known.split(' ', 1)[1]}"


def _time(seconds: float) -> str:
    return f"{seconds / MINUTE:.0f} minutes" if seconds > MINUTE else f"{seconds:.0f} seconds"


def _place() -> str:
    """Where the main thread is."""
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    last = traceback.extract_stack(frame)[-1]
    return f"{last.filename}, line {last.lineno}, in {last.name}"
