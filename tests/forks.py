"""Several ranks on this machine, forked from the test's process, which has torch loaded already."""

import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed import TCPStore

SECONDS_AT_MOST = 60  # then a rank that hangs prints where, and ends
FORK = multiprocessing.get_context("fork")


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def _keep_store(port) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port.put(store.port)
    signal.pause()


def start(count: int, function: Callable[[int], Any]) -> tuple[list, Any, Any]:
    """Fork `count` processes that call function(rank) under torchrun's variables.

    Returns (processes, queue, keeper of their store); each process puts (rank, result) into the
    queue, the result being a traceback's text where the function raised.
    """
    queue = FORK.SimpleQueue()
    port = FORK.SimpleQueue()
    # As with torchrun, who holds the store outlives the ranks. It is no thread of this process,
    # whose locks a fork would copy.
    keeper = FORK.Process(target=_keep_store, args=(port,), daemon=True)
    keeper.start()
    variables = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port.get()}
    variables |= {"TORCHELASTIC_USE_AGENT_STORE": True, "OMP_NUM_THREADS": 1}

    def child(rank: int) -> None:
        for name, value in {**variables, "RANK": rank, "LOCAL_RANK": rank}.items():
            os.environ[name] = str(value)
        torch.set_num_threads(1)  # as torchrun does; and the parent's threads did not fork
        faulthandler.dump_traceback_later(SECONDS_AT_MOST, exit=True)
        status = 0
        try:
            result = function(rank)
        except BaseException:
            result, status = traceback.format_exc(), 1
        queue.put((rank, result))
        os._exit(status)  # the test's own atexit handlers are not this process's

    processes = [FORK.Process(target=child, args=(rank,)) for rank in range(count)]
    for process in processes:
        process.start()
    return processes, queue, keeper


def leave(status: int) -> None:
    """End a forked rank with this exit code, and no result."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def exit_codes(count: int, function: Callable[[int], Any]) -> list[int]:
    """The exit codes of `count` ranks that call function(rank), which leaves."""
    processes, _, keeper = start(count, function)
    for process in processes:
        process.join(60)
    keeper.kill()
    return [process.exitcode for process in processes]


def run(count: int, function: Callable[[int], Any]) -> list[Any]:
    """The results of function(rank) for all ranks, in their order."""
    processes, queue, keeper = start(count, function)
    found = {}
    while len(found) < count:
        ended = not any(process.is_alive() for process in processes)
        if not queue.empty():
            rank, result = queue.get()
            found[rank] = result
        elif ended:
            raise AssertionError(f"ranks {set(range(count)) - set(found)} ended without a word")
        else:
            time.sleep(0.01)
    keeper.kill()
    return [found[rank] for rank in range(count)]
