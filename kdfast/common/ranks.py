"""The processes of a run: who this one is, and what they do together.

A run has one process, or as many as torchrun starts. All of them draw the same steps from the same
data, so that what they exchange is sums, and facts to agree on. Without torchrun nothing here
communicates.
"""

import hashlib
import os
import sys
from collections.abc import Iterable
from datetime import timedelta
from types import TracebackType

import torch
import torch.distributed as dist
from torch import nn
from tqdm.auto import tqdm

from kdfast.common.errors import UserError

# Longer than any rank may wait for another: rank 0 may be waiting for the cache of another run.
PATIENCE = timedelta(hours=4)
BUCKET_BYTES = 32 * 2**20
FAILURE = "kdfast/failure"


class Ranks:
    """The ranks of a run, `count` of them; this one is `rank`, on the GPU `local_rank` of its node.

    A context: on leaving it with an error the other ranks learn why, and an error that came from
    another rank's end becomes one sentence that says so.
    """

    def __init__(self, rank: int = 0, count: int = 1, local_rank: int = 0):
        self.rank = rank
        self.count = count
        self.local_rank = local_rank
        self.device = torch.device("cpu")  # of what is communicated

    @classmethod
    def join(cls) -> "Ranks":
        """This process among those that torchrun started, or alone: NCCL on GPUs, else gloo."""
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count == 1:
            return cls()
        ranks = cls(int(os.environ["RANK"]), count, int(os.environ["LOCAL_RANK"]))
        backend = "gloo"
        if torch.cuda.is_available():
            if ranks.local_rank >= torch.cuda.device_count():
                raise UserError(
                    f"torchrun started rank {ranks.rank} for GPU {ranks.local_rank} of a node that "
                    f"has {torch.cuda.device_count()}: lower --nproc_per_node."
                )
            backend = "nccl"
            ranks.device = torch.device("cuda", ranks.local_rank)
            torch.cuda.set_device(ranks.device)
        dist.init_process_group(backend, timeout=PATIENCE)
        return ranks

    @property
    def is_first(self) -> bool:
        """Whether this one prints and writes."""
        return self.rank == 0

    @property
    def restarts(self) -> int:
        """How often torchrun has restarted the ranks after one failed."""
        return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))

    def log(self, text: str) -> None:
        """Print a line, once for all ranks."""
        if self.is_first:
            tqdm.write(text)  # above a progress bar
            sys.stdout.flush()

    def warn(self, text: str) -> None:
        """As `log`, to stderr: for programs whose stdout is a result."""
        if self.is_first:
            tqdm.write(text, file=sys.stderr)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.count > 1:
            dist.barrier()

    def share(self, text: str, source: int = 0) -> str:
        """The text that rank `source` gives, at every rank."""
        if self.count == 1:
            return text
        data = torch.tensor(list(text.encode()), dtype=torch.uint8, device=self.device)
        size = torch.tensor(len(data), device=self.device)
        dist.broadcast(size, source)
        if self.rank != source:
            data = torch.empty(int(size), dtype=torch.uint8).to(self.device)
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
        mine = torch.tensor([list(each) for each in digests], dtype=torch.uint8).to(self.device)
        everyone = [torch.empty_like(mine) for _ in range(self.count)]
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
        total = tensor.to(self.device, copy=True)
        dist.all_reduce(total)
        return total.cpu()

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

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.count == 1:
            return
        if error is None:
            dist.destroy_process_group()
            return
        store = dist.distributed_c10d._get_default_store()
        if _is_of_group(error):
            raise UserError(self._why_others_ended(store)) from error
        if isinstance(error, Exception):
            # Who fails first speaks for all that fail alike.
            try:
                known = store.compare_set(FAILURE, "", f"{self.rank} {error}").decode()
            except dist.DistNetworkError:  # the store went with its process
                return
            rank, why = known.split(" ", 1)
            if isinstance(error, UserError):
                error.is_repeated = why == str(error) and rank != str(self.rank)

    def _why_others_ended(self, store: dist.Store) -> str:
        try:
            known = store.check([FAILURE]) and store.get(FAILURE).decode()
        except RuntimeError:  # the store went with its process
            known = ""
        if known:
            rank, why = known.split(" ", 1)
            return f"Rank {self.rank} stops, because rank {rank} failed: {why}"
        return (
            f"Rank {self.rank} stops, because another rank died without a word: torchrun's report "
            "names it; a run of training that has a checkpoint goes on from it with "
            "--resume_from_checkpoint last."
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


def _is_of_group(error: BaseException) -> bool:
    """Whether the error is a collective's."""
    if isinstance(error, (dist.DistBackendError, dist.DistNetworkError)):
        return True
    # gloo raises plain RuntimeErrors, which begin with the place in its source.
    return isinstance(error, RuntimeError) and "gloo" in str(error).lower()
