"""How a step is cut into micro-batches: by which policy, and what happens where memory runs out."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from kdfast.common.device import free_bytes, is_out_of_memory
from kdfast.common.errors import UserError
from kdfast.common.run import Run
from kdfast.config import SpeedSettings
from kdfast.data.batches import MicroBatchPolicy, shard
from kdfast.models.inference import GPU_TOKENS_AT_MOST, MEMORY_SHARE
from kdfast.models.packing import PackedWindows
from kdfast.models.window_loader import Layout
from kdfast.training.flops import NOMINAL, Work
from kdfast.training.optimizer import ScaledAdamW

# On a CPU, what stays in the caches: cut at 4,096 tokens a step ran at 0.57 of the speed.
CPU_TOKENS = 768
# What CUDA loads at its first use, after the probe: kernels of loss and optimizer, cuBLAS's and
# NCCL's buffers. An estimate; no card has been measured.
KERNEL_BYTES = 2**29


class MicroBatches:
    """Cuts steps, and owns the policy by which it does.

    Args:
        policy: How a step is cut; it changes where memory does not suffice.
        lengths: int (W,), tokens of every window.
        layout: How micro-batches are laid out.
        run: Whose ranks share each step.
        remedies: Flags that would save memory, for the sentence where one window does not fit.
    """

    def __init__(
        self,
        policy: MicroBatchPolicy,
        lengths: np.ndarray,
        layout: Layout,
        run: Run,
        remedies: str = "a smaller --max_seq_length",
    ):
        self.policy = policy
        self.lengths = lengths
        self.layout = layout
        self.run = run
        self.remedies = remedies
        self._agreed = policy
        self._failed = False

    def cut(self, indices: np.ndarray) -> list[np.ndarray]:
        """This rank's micro-batches in a step over the windows `indices`."""
        if self.run.ranks.count > 1:
            shares = shard(indices, self.lengths[indices], self.run.ranks.count, self.policy)
            indices = shares[self.run.ranks.rank]
        return self.policy.cut(indices, self.lengths[indices])

    def until_they_fit(
        self, indices: np.ndarray, optimizer: ScaledAdamW
    ) -> Iterator[list[np.ndarray]]:
        """The micro-batches of a step, and smaller ones each time that memory has run out.

        The loop over these does its work inside `catching_out_of_memory`. Raises UserError where
        memory does not suffice for one window.
        """
        self._failed = True
        while self._failed:
            self._failed = False
            batches = self.cut(indices)
            yield batches
            if self._failed:
                optimizer.zero_grad()
                self.policy = self._smaller(batches)

    @contextmanager
    def catching_out_of_memory(self) -> Iterator[None]:
        """What runs out of memory inside ends there, and `until_they_fit` goes on."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            error.__traceback__ = None  # its frames hold the step's tensors
            self._failed = True

    def padded_tokens(self, batch: np.ndarray) -> int:
        """Tokens of a micro-batch with its padding."""
        return self.layout.tokens(self.lengths[batch])

    @property
    def room(self) -> int:
        """max_tokens, or the number of parts if that is set: what the ranks compare."""
        return self.policy.parts or self.policy.max_tokens

    def take_smallest(self, rooms: list[float]) -> None:
        """The policy of the rank with the least memory becomes everyone's; a change is logged.

        rooms: of all ranks.
        """
        if self.policy.parts is not None:
            self.policy = replace(self.policy, parts=int(max(rooms)))
        else:
            self.policy = replace(self.policy, max_tokens=int(min(rooms)))
        if self.policy != self._agreed:
            self.run.ranks.log(f"Out of memory: steps are now cut by {self.policy}.")
            self._agreed = self.policy

    def _smaller(self, batches: list[np.ndarray]) -> MicroBatchPolicy:
        """The policy with half the room of what did not fit."""
        half = max(map(self.padded_tokens, batches)) // 2
        # At the same limit again, a window that is longer than it stood alone and did not fit.
        is_least = self.policy.parts is None and half >= self.policy.max_tokens
        if is_least or max(map(len, batches)) == 1:
            raise UserError(
                f"There is not enough memory for a single window: give {self.remedies} or a "
                "smaller student."
            )
        if self.policy.parts is not None:
            return replace(self.policy, parts=2 * len(batches))
        return replace(self.policy, max_tokens=half)


def nominal_policy(work: Work, device_type: str, max_tokens: int) -> MicroBatchPolicy:
    """The policy for `work` from fixed speeds, not measured ones, so that every start cuts alike.

    A micro-batch's overhead is each layer's own, what each pass computes once, and one read and two
    writes of fp32 gradients.
    """
    speed = NOMINAL[device_type]
    return MicroBatchPolicy(
        max_tokens=max_tokens,
        overhead=work.layers * speed.layer
        + 3 * work.per_pass / speed.products
        + 12 * work.parameters / speed.memory,
        per_token=3 * work.per_token / speed.products,
        per_token_width=3 * work.per_token_width / speed.attention,
    )


def bytes_to_come(optimizer: ScaledAdamW) -> int:
    """GPU memory that a run takes for other things than data and micro-batches, and has not yet."""
    moments = 0 if optimizer.adamw.state else 2 * sum(each.nbytes for each in optimizer.parameters)
    return moments + KERNEL_BYTES


def find_budget(peak_bytes: Callable[[int], int], free: Callable[[], int], width: int) -> int:
    """The most tokens whose activations fit, extrapolated from two measurements.

    peak_bytes(n): the most memory that forward and backward of n windows of `width` tokens took.
    free(): bytes that a step may take, asked after these, which have loaded their kernels. At least
    one window, at most GPU_TOKENS_AT_MOST.
    """
    # One window or two would not show: at the end of backward stands the gradient of a large
    # vocabulary twice, and their activations take less.
    for few, more in ((4, 16), (1, 4)):
        try:
            low, high = peak_bytes(few), peak_bytes(more)
            break
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
    else:
        return width
    per_window = max(1.0, (high - low) / (more - few))
    constant = max(0.0, low - few * per_window)
    windows = int((MEMORY_SHARE * free() - constant) / per_window)
    return min(GPU_TOKENS_AT_MOST, max(1, windows) * width)


def choose_policy(
    speed: SpeedSettings,
    work: Work,
    device: torch.device,
    width: int,
    peak_bytes: Callable[[int], int],
    reserved: int = 0,
) -> MicroBatchPolicy:
    """The policy of a new run: what the flags say, what the memory holds, the rest nominal.

    width: the longest window. peak_bytes: as `find_budget` has it, for windows of that width; it
    is called on a GPU alone. reserved: `bytes_to_come`.
    """
    max_tokens = speed.max_tokens_per_micro_batch
    if max_tokens is None and device.type == "cpu":
        max_tokens = CPU_TOKENS
    elif max_tokens is None:
        max_tokens = find_budget(peak_bytes, lambda: free_bytes(device) - reserved, width)
    policy = nominal_policy(work, device.type, max_tokens)
    return replace(policy, parts=speed.gradient_accumulation_steps)


def peak_bytes_of(
    model: nn.Module,
    forward: Callable[..., torch.Tensor],
    run: Run,
    count: int,
    width: int,
    packs: bool = False,
) -> int:
    """GPU memory that forward and backward of `count` windows take beyond what is held already.

    model: what trains; forward: it, or what torch.compile made of it. packs: the windows are
    packed. The parameters' gradients count. Leaves none. 0 on a CPU, which does not count memory.
    """
    on_gpu = run.device.type == "cuda"
    held = 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(run.device)
        held = torch.cuda.memory_allocated(run.device)
    model.train()
    ids = torch.ones(count, width, dtype=torch.int64, device=run.device)
    packed = {}
    if packs:
        lengths = np.full(count, width)
        packed["packed"] = PackedWindows.of(lengths, ids.sum(1), width)
        ids = ids.view(1, -1)
    try:
        # In all micro-batches of a step but the first, gradients stand while activations are kept.
        for _ in range(2 if on_gpu else 1):
            with run.autocast():
                output = forward(ids, **packed)
            output.float().square().mean().backward()
    finally:  # where memory runs out, too
        model.zero_grad(set_to_none=True)
    if not on_gpu:
        return 0
    torch.cuda.synchronize(run.device)
    return torch.cuda.max_memory_allocated(run.device) - held
