"""Operations of a model, and the rate at which a device does them."""

import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kdfast.models.span_model import SpanModel


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
        """This and a forward pass of a teacher, a third of forward and backward."""
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
class NominalSpeed:
    """Rough speed of a type of device, used only to choose how steps are cut.

    products, attention: operations a second in the linear layers and in attention. memory: bytes a
    second. layer: seconds that each layer takes however little it is given, forward and backward.
    """

    products: float
    attention: float
    memory: float
    layer: float


NOMINAL = {
    "cpu": NominalSpeed(products=1e11, attention=2.5e10, memory=1e10, layer=5e-4),
    "cuda": NominalSpeed(products=5e13, attention=1e13, memory=8e11, layer=5e-4),
}


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


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of large matrix products here: the best of some tries, 0.1 s on a CPU."""
    size = 1024 if device.type == "cpu" else 8192
    if device.type == "cpu" and dtype == torch.float16:
        size = 256  # most CPUs have no such products: a larger one takes seconds
    # What a card draws, and so its clock, depends on the bits: of ones hardly any change.
    tile, draw = min(size, 1024), torch.Generator().manual_seed(0)
    one, other = (
        torch.randn(tile, tile, generator=draw).to(device, dtype).repeat(size // tile, size // tile)
        for _ in range(2)
    )
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
