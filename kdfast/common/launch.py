"""What a start leaves for the next one of the same launch, in torchrun's store.

The store outlives the ranks and ends with torchrun, so that all in it is of this launch. Without
torchrun, or where the store cannot be reached, nothing is kept.
"""

from __future__ import annotations

import os
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

CONNECT = timedelta(minutes=1)


def remember(key: str, value: str) -> None:
    """Keep `value`, which is not empty, unless an earlier start has kept one under `key`."""
    if _under_torchrun():
        with suppress(dist.DistError):
            _store().compare_set(key, "", value)


def recall(key: str) -> str | None:
    """What an earlier start of this launch has kept, or None."""
    if _under_torchrun():
        with suppress(dist.DistError):
            store = _store()
            return store.get(key).decode() if store.check([key]) else None
    return None


def _under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def _store() -> dist.Store:
    root, *_ = next(dist.rendezvous("env://", timeout=CONNECT))
    return dist.PrefixStore("kdfast/launch", root)
