"""Questions and contexts to tokens: here or, where there are many, in processes beside this one."""

from __future__ import annotations

import os
import pickle
import queue
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import Any

from kdfast.errors import UserError
from kdfast.squad import tokens
from kdfast.squad.template import whole_texts
from kdfast.squad.tokens import Job, Tokens, encode

# A function that encodes jobs as they come, and yields what `tokens.encode` returns in their order.
Encoder = Callable[[Iterable[Job]], Iterator[tuple[Tokens, Tokens]]]

# So many batches are encoded here before processes are started: about what starting them costs.
FEW_BATCHES = 4
# The process that reads and writes feeds about so many.
MOST_PROCESSES = 8


def processor_count() -> int:
    """The processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def encoder(tokenizer: Any, processes: int = 1) -> Encoder:
    """Encodes with a fast tokenizer, in up to `processes` processes once there is enough to do.

    The encoder raises UserError where such a process comes to its end too early.
    """
    return partial(_encoded, tokenizer, processes)


def _encoded(
    tokenizer: Any, processes: int, jobs: Iterable[Job]
) -> Iterator[tuple[Tokens, Tokens]]:
    jobs = iter(jobs)
    with whole_texts(tokenizer.backend_tokenizer) as backend:
        for job in islice(jobs, FEW_BATCHES) if processes > 1 else jobs:
            yield encode(backend, job)
        text = backend.to_str()
    more = next(jobs, None)
    if more is not None:
        yield from _encoded_beside(text, processes, more, jobs)


def _encoded_beside(
    tokenizer: str, processes: int, first: Job, jobs: Iterator[Job]
) -> Iterator[tuple[Tokens, Tokens]]:
    """At most twice as many batches as processes are under way, so memory has a bound."""
    workers = [_Worker(tokenizer) for _ in range(processes)]
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def work(job: Job) -> tuple[Tokens, Tokens]:
        worker = idle.get()
        try:
            return worker.encode(job)
        finally:
            idle.put(worker)

    threads = ThreadPoolExecutor(processes)
    waiting: deque[Future] = deque([threads.submit(work, first)])
    try:
        for job in jobs:
            waiting.append(threads.submit(work, job))
            if len(waiting) > 2 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.end()
        threads.shutdown()


class _Worker:
    """A process that runs `tokens.py` as a program, and takes jobs through a pipe.

    Not one of `multiprocessing`: those bring a copy of this process (fork) or import all that this
    program has imported (spawn), which is torch and 150 MB for each; this one has 30 MB, and is
    ready in a tenth of a second. It ends by itself when this process does, as its pipe then ends.
    """

    def __init__(self, tokenizer: str):
        start = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"
        self.process = subprocess.Popen(
            [sys.executable, "-c", start, tokens.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # The processes are the parallelism.
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
            start_new_session=True,  # Ctrl-C is for the one that started it
        )
        self._tokenizer: str | None = tokenizer

    def encode(self, job: Job) -> tuple[Tokens, Tokens]:
        """What `tokens.encode` returns. Raises UserError where the process has ended."""
        try:
            if self._tokenizer is not None:
                self._send(self._tokenizer)
                self._tokenizer = None
            self._send(job)
            return tuple(Tokens(*arrays) for arrays in pickle.load(self.process.stdout))
        except (OSError, EOFError, pickle.UnpicklingError):
            status = self.process.wait()
            what = signal.Signals(-status).name if status < 0 else f"exit status {status}"
            raise UserError(
                f"A process that makes features has ended ({what}), perhaps as memory ran out: "
                "free some and run again; no half-made features are left."
            ) from None

    def _send(self, what: Any) -> None:
        pickle.dump(what, self.process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
        self.process.stdin.flush()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        with suppress(BrokenPipeError):  # for what was not read
            self.process.stdin.close()
