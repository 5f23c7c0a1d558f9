"""Several ranks on this machine, forked from the test's process, which has torch loaded already."""

import faulthandler
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed import TCPStore

SECONDS_AT_MOST = 100  # then a rank that hangs prints where, and ends
FORK = multiprocessing.get_context("fork")


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def start(count: int, function: Callable[[int], Any]) -> tuple[list, Any, TCPStore]:
    """Fork `count` processes that call function(rank) under torchrun's variables.

    Returns (processes, queue, store); each process puts (rank, result, or the traceback's text)
    into the queue.
    """
    queue = FORK.SimpleQueue()
    # As torchrun does, the parent holds the store, which so outlives any rank.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    variables = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    variables["TORCHELASTIC_USE_AGENT_STORE"] = True

    def child(rank: int) -> None:
        for name, value in {**variables, "RANK": rank, "LOCAL_RANK": rank}.items():
            os.environ[name] = str(value)
        torch.set_num_threads(1)  # as torchrun does; and the parent's threads did not fork
        faulthandler.dump_traceback_later(SECONDS_AT_MOST, exit=True)
        try:
            result = function(rank)
        except BaseException:
            result = traceback.format_exc()
        queue.put((rank, result))
        os._exit(0)  # the test's own atexit handlers are not this process's

    processes = [FORK.Process(target=child, args=(rank,)) for rank in range(count)]
    for process in processes:
        process.start()
    return processes, queue, store


def run(count: int, function: Callable[[int], Any]) -> list[Any]:
    """The results of function(rank) for all ranks, in their order."""
    processes, queue, _store = start(count, function)
    found = dict(queue.get() for _ in processes)
    for process in processes:
        process.join(60)
    return [found[rank] for rank in range(count)]
