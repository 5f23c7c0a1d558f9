"""What a micro-batch costs: the model's work and the device's nominal speed.

From it come the policy by which a step is cut, and the share of the device's matrix-multiply rate
that a run reaches.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kdfast.config import TrainConfig
from kdfast.data.batches import MicroBatchPolicy
from kdfast.models.load import SpanModel


@dataclass(frozen=True)
class Work:
    """Floating-point operations in the matrix products of one forward pass.

    A window of L tokens takes L (per_token + per_token_width L) of them, and each pass per_pass
    more (DeBERTa projects its relative positions once); forward and backward together take three
    times as many. parameters: whose gradients each backward reads and writes.
    """

    per_token: float
    per_token_width: float
    layers: float
    parameters: int
    per_pass: float = 0.0

    def with_teacher(self, teacher: "Work") -> "Work":
        """This and a forward pass of a teacher beside, a third of forward and backward."""
        return replace(
            self,
            per_token=self.per_token + teacher.per_token / 3,
            per_token_width=self.per_token_width + teacher.per_token_width / 3,
            layers=self.layers + teacher.layers / 3,
            per_pass=self.per_pass + teacher.per_pass / 3,
        )

    def of(self, lengths: np.ndarray) -> float:
        """Operations of one forward pass over windows of these lengths, padding left out."""
        lengths = lengths.astype(np.float64)
        return float((lengths * (self.per_token + self.per_token_width * lengths)).sum())


@dataclass(frozen=True)
class Speed:
    """A kind of device, in round figures: they place the cuts, and nothing else depends on them.

    products, attention: operations a second in the linear layers and in attention. memory: bytes a
    second. layer: seconds that each layer takes however little it is given, forward and backward.
    """

    products: float
    attention: float
    memory: float
    layer: float


NOMINAL = {
    "cpu": Speed(products=1e11, attention=2.5e10, memory=1e10, layer=5e-4),
    "cuda": Speed(products=5e13, attention=1e13, memory=8e11, layer=5e-4),
}
# On a CPU, what stays in the caches: cut at 4,096 tokens a step ran at 0.57 of the speed.
CPU_TOKENS = 768
GPU_TOKENS_AT_MOST = 65536
# Of the free memory; the rest is for fragmentation and for what others take meanwhile.
MEMORY_SHARE = 0.8


def count_work(model: SpanModel) -> Work:
    """Count the operations of `model`, which may be on any device, by running it three times."""
    counts = []
    lengths = (16, 32, 48)
    device = next(model.parameters()).device
    linear = next(each for each in model.reader.modules() if isinstance(each, nn.Linear))
    is_rounded = linear.weight.dtype in (torch.float16, torch.bfloat16)
    was_training = model.training
    model.eval()
    for length in lengths:
        ids = torch.ones(1, length, dtype=torch.int64, device=device)
        # Fused attention hides its products from the counter on a CPU; and the counter fails on
        # DeBERTa's learned positions where gradients are off.
        with (
            torch.autocast(device.type, dtype=linear.weight.dtype, enabled=is_rounded),
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            model(ids)
        counts.append(counter.get_total_flops())
    model.train(was_training)
    # The parabola through the three, whose coefficients are whole numbers.
    terms = np.array([[1, length, length**2] for length in lengths], dtype=np.float64)
    per_pass, per_token, per_token_width = np.linalg.solve(terms, counts).round().tolist()
    return Work(
        per_token=per_token,
        per_token_width=per_token_width,
        per_pass=per_pass,
        layers=model.reader.config.num_hidden_layers,
        parameters=sum(each.numel() for each in model.parameters()),
    )


def nominal_policy(work: Work, device_type: str, max_tokens: int) -> MicroBatchPolicy:
    """The policy for `work` on a nominal device: no clock is read, so every start finds the same.

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


def find_budget(peak_bytes: Callable[[int], int], free_bytes: int, width: int) -> int:
    """The most padded tokens whose activations fit, from two tries and a line through them.

    peak_bytes(n): the most memory that forward and backward of n windows of `width` tokens took.
    free_bytes: what a step may take. At least one window, at most GPU_TOKENS_AT_MOST.
    """
    few, more = 1, 4
    try:
        low, high = peak_bytes(few), peak_bytes(more)
    except torch.OutOfMemoryError:
        return width
    per_window = max(1.0, (high - low) / (more - few))
    constant = max(0.0, low - few * per_window)
    windows = int((MEMORY_SHARE * free_bytes - constant) / per_window)
    return min(GPU_TOKENS_AT_MOST, max(1, windows) * width)


class MemoryProbe:
    """Runs micro-batches of made-up windows forward and backward on a GPU, and leaves no trace.

    precision: autocast's type, or None.
    """

    def __init__(
        self,
        model: SpanModel,
        forward: Callable[..., torch.Tensor],
        device: torch.device,
        precision: torch.dtype | None,
    ):
        self.model = model
        self.forward = forward
        self.device = device
        self.precision = precision

    def peak_bytes(self, count: int, length: int) -> int:
        """Memory that `count` windows of `length` tokens take beyond what is held already."""
        torch.cuda.reset_peak_memory_stats(self.device)
        held = torch.cuda.memory_allocated(self.device)
        self.run(count, length)
        return torch.cuda.max_memory_allocated(self.device) - held

    def run(self, count: int, length: int) -> None:
        """Forward and backward of `count` windows of `length` tokens."""
        self.model.train()
        ids = torch.ones(count, length, dtype=torch.int64, device=self.device)
        with torch.autocast(
            self.device.type, dtype=self.precision, enabled=self.precision is not None
        ):
            logits = self.forward(ids)
        logits.float().square().mean().backward()
        self.model.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def choose_policy(config: TrainConfig, work: Work, probe: MemoryProbe) -> MicroBatchPolicy:
    """The policy of a new run: what the flags say, what the memory holds, the rest nominal."""
    device = probe.device
    max_tokens = config.max_tokens_per_micro_batch
    if max_tokens is None and device.type == "cpu":
        max_tokens = CPU_TOKENS
    elif max_tokens is None:
        torch.cuda.empty_cache()  # what it holds in reserve would count as taken
        # What stands already counts as taken, and Adam's two moments are still to come.
        free = torch.cuda.mem_get_info(device)[0] - 8 * work.parameters
        width = config.max_seq_length
        max_tokens = find_budget(lambda count: probe.peak_bytes(count, width), free, width)
    policy = nominal_policy(work, device.type, max_tokens)
    return replace(policy, parts=config.gradient_accumulation_steps)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of large matrix products here: the best of some tries, 0.1 s on a CPU."""
    size = 1024 if device.type == "cpu" else 8192
    if device.type == "cpu" and dtype == torch.float16:
        size = 256  # most CPUs have no such products: a larger one takes seconds
    one, other = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        torch.matmul(one, other)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
