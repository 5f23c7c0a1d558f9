"""The processes of a run: who this one is, and what they do together.

A run has one process, or as many as torchrun starts. All of them draw the same steps from the same
data, so that what they exchange is sums, and facts to agree on. Without torchrun nothing here
communicates.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import timedelta
from types import TracebackType

import torch
import torch.distributed as dist
from torch import nn

from kdfast.common import heartbeat
from kdfast.common.errors import UserError, printable
from kdfast.common.progress import print_line

# Of a collective. How long a rank may wait for another is heartbeat's to say.
NEVER = timedelta(days=20)
TOGETHER = timedelta(minutes=10)  # in which all ranks of a start must have come
BUCKET_BYTES = 32 * 2**20

_joined = 0  # how often this process has joined ranks


class Ranks:
    """The ranks of a run, `count` of them; this one is `rank`, on the GPU `local_rank` of its node.

    A context: on leaving it with an error the other ranks learn why, and an error that came from
    another rank's end becomes one sentence that says so.
    """

    store: dist.PrefixStore  # of this start, as is the watch: where there are several ranks
    watch: heartbeat.Watch

    def __init__(self, rank: int = 0, count: int = 1, local_rank: int = 0):
        self.rank = rank
        self.count = count
        self.local_rank = local_rank
        # How often torchrun has restarted the ranks after one failed.
        self.restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))

    @classmethod
    def join(cls) -> Ranks:
        """This process among those that torchrun started, or alone.

        On GPUs NCCL sums the gradients. All else is exchanged over gloo, in host memory.
        """
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count == 1:
            return cls()
        ranks = cls(int(os.environ["RANK"]), count, int(os.environ["LOCAL_RANK"]))
        backend, device = "gloo", None
        if torch.cuda.is_available():
            if ranks.local_rank >= torch.cuda.device_count():
                raise UserError(
                    f"torchrun started rank {ranks.rank} for GPU {ranks.local_rank} of a node that "
                    f"has {torch.cuda.device_count()}: lower --nproc_per_node."
                )
            backend, device = "cpu:gloo,cuda:nccl", torch.device("cuda", ranks.local_rank)
            torch.cuda.set_device(device)
        ranks._meet()
        with heartbeat.waiting():
            dist.init_process_group(
                backend,
                store=ranks.store,
                rank=ranks.rank,
                world_size=count,
                timeout=NEVER,
                device_id=device,
            )
        return ranks

    def _meet(self) -> None:
        """Find the others of this start, and a store without what earlier starts left in it.

        torchrun keeps one store for all starts, so that a rank would read the addresses of dead
        ones. Its count of restarts does not tell starts apart: each node has its own. So rank 0
        numbers them, and tells every rank that greets it; who greeted and died gives no answer.
        """
        global _joined
        _joined += 1
        try:
            root, *_ = next(dist.rendezvous("env://", timeout=TOGETHER))
            if self.is_first:
                start = root.add("kdfast/starts", 1)
                self.restarts = max(self.restarts, start - _joined)
            else:
                token = uuid.uuid4().hex
                root.set(f"kdfast/hello/{self.rank}", token)
                start = int(root.get(f"kdfast/welcome/{token}"))
            self.store = dist.PrefixStore(f"kdfast/{start}", root)
            self.watch = heartbeat.Watch(self.store, self.rank, self.count)
            if self.is_first:
                self._welcome(root, start)
            else:
                self.store.set(f"here/{self.rank}", "")
        except dist.DistError as error:
            raise UserError(
                f"Rank {self.rank} of {self.count} cannot find rank 0 by the store at "
                f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} "
                f"({str(error).splitlines()[0]}): see whether all ranks were started, and what "
                "keeps them apart."
            ) from error

    def _welcome(self, root: dist.Store, start: int) -> None:
        """Tell every other rank the number of this start."""
        missing, end = set(range(1, self.count)), time.monotonic() + TOGETHER.total_seconds()
        while missing:
            for rank in sorted(missing):
                if self.store.check([f"here/{rank}"]):
                    missing.remove(rank)
                elif root.check([f"kdfast/hello/{rank}"]):
                    token = root.get(f"kdfast/hello/{rank}").decode()
                    root.set(f"kdfast/welcome/{token}", str(start))
            if time.monotonic() > end:
                error = UserError(
                    f"Rank {min(missing)} of {self.count} has not come within "
                    f"{TOGETHER.total_seconds() / 60:.0f} minutes: see its node's output."
                )
                self.store.set(heartbeat.FAILURE, f"0 rank 0 failed: {error}")
                raise error
            time.sleep(0.01)

    @property
    def is_first(self) -> bool:
        """Whether this one prints and writes."""
        return self.rank == 0

    def log(self, text: str) -> None:
        """Print a line, once for all ranks."""
        if self.is_first:
            print_line(text)

    def warn(self, text: str) -> None:
        """As `log`, to stderr: for programs whose stdout is a result."""
        if self.is_first:
            print_line(text, sys.stderr)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.sum_array(torch.zeros(1))  # dist.barrier would take NCCL, where there is one

    def share(self, text: str, source: int = 0) -> str:
        """The text that rank `source` gives, at every rank."""
        if self.count == 1:
            return text
        data = torch.tensor(list(text.encode()), dtype=torch.uint8)
        size = torch.tensor(len(data))
        with heartbeat.waiting():
            dist.broadcast(size, source)
            if self.rank != source:
                data = torch.empty(int(size), dtype=torch.uint8)
            dist.broadcast(data, source)
        return bytes(data.tolist()).decode()

    def gather(self, text: str) -> list[str]:
        """The texts of all ranks, in their order, at every rank."""
        return [self.share(text, source) for source in range(self.count)]

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on at least one rank."""
        return bool(self.sum_array(torch.tensor(int(flag))))

    def assert_same_on_all_ranks(self, facts: dict[str, object]) -> None:
        """Raise UserError, naming the rank and the fact, unless all ranks hold the same facts."""
        if self.count == 1:
            return
        digests = [hashlib.sha256(repr(value).encode()).digest() for value in facts.values()]
        mine = torch.tensor([list(each) for each in digests], dtype=torch.uint8)
        everyone = [torch.empty_like(mine) for _ in range(self.count)]
        with heartbeat.waiting():
            dist.all_gather(everyone, mine)
        for rank, theirs in enumerate(everyone):
            for number, name in enumerate(facts):
                if not torch.equal(theirs[number], everyone[0][number]):
                    raise UserError(
                        f"Rank {rank} differs from rank 0 in its {name}: start every rank with "
                        "the same command, files and versions."
                    )

    def sum_array(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of a host tensor over the ranks."""
        if self.count == 1:
            return tensor
        total = tensor.clone()
        with heartbeat.waiting():
            dist.all_reduce(total)
        return total

    def sum_gradients(
        self, parameters: Iterable[nn.Parameter], extras: torch.Tensor
    ) -> torch.Tensor:
        """Sum every parameter's gradient over the ranks, and `extras` (n,) in the same reduction.

        A rank without a gradient counts as one of zeros. Buckets are flat, of BUCKET_BYTES, in the
        order of the parameters; all ranks end with the same bits. Returns the sum of extras.
        """
        if self.count == 1:
            return extras
        buckets = _buckets(list(parameters))
        heartbeat.begin_to_wait(_device_is_ready(buckets[0][0].device))
        running = []
        for number, bucket in enumerate(buckets):
            pieces = [
                torch.zeros_like(each).flatten() if each.grad is None else each.grad.flatten()
                for each in bucket
            ]
            if number == len(buckets) - 1:
                pieces.append(extras.to(pieces[0].dtype))
            flat = torch.cat(pieces)
            for parameter in bucket:
                parameter.grad = None
            running.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
        for bucket, flat, work in running:
            work.wait()
            place = 0
            for parameter in bucket:
                parameter.grad = flat[place : place + parameter.numel()].view_as(parameter)
                place += parameter.numel()
        return flat[place:].to(extras.dtype)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.count == 1:
            return
        self.watch.stop()
        if error is None:
            dist.destroy_process_group()
            return
        if _is_of_group(error):
            stopped = UserError(self._why_others_ended())
            stopped.is_repeated = self.watch.has_told
            raise stopped from error
        if isinstance(error, Exception):
            # Who fails first speaks for all that fail alike.
            mine = f"{self.rank} rank {self.rank} failed: {printable(str(error))}"
            try:
                known = self.store.compare_set(heartbeat.FAILURE, "", mine).decode()
            except dist.DistNetworkError:  # the store went with its process
                return
            if isinstance(error, UserError):
                error.is_repeated = known != mine and known.endswith(f" failed: {error}")

    def _why_others_ended(self) -> str:
        if self.watch.verdict:  # the store may not hold it yet
            return heartbeat.why_stopped(self.rank, self.watch.verdict)
        for key in (heartbeat.HUNG, heartbeat.FAILURE):
            with suppress(RuntimeError):  # the store went with its process
                if self.store.check([key]):
                    return heartbeat.why_stopped(self.rank, self.store.get(key).decode())
        return (
            f"Rank {self.rank} stops, because another rank died without a word: torchrun's report "
            f"names it; {heartbeat.GO_ON}."
        )


def _buckets(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """The parameters in their order, in runs of one type of about BUCKET_BYTES."""
    buckets: list[list[nn.Parameter]] = []
    room = 0
    for each in parameters:
        size = each.numel() * each.element_size()
        if not buckets or size > room or each.dtype != buckets[-1][0].dtype:
            buckets.append([])
            room = BUCKET_BYTES
        buckets[-1].append(each)
        room -= size
    return buckets


def _device_is_ready(device: torch.device) -> Callable[[], bool]:
    """Says whether `device` has done what it has been given so far."""
    if device.type == "cpu":
        return lambda: True
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event.query


def _is_of_group(error: BaseException) -> bool:
    """Whether the error is a collective's."""
    if isinstance(error, (dist.DistBackendError, dist.DistNetworkError)):
        return True
    # gloo raises plain RuntimeErrors, which begin with the place in its source.
    return isinstance(error, RuntimeError) and "gloo" in str(error).lower()
