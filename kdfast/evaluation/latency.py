"""How long one question takes that is asked alone."""

import time
from typing import Any

import numpy as np
import torch

from kdfast.common.precision import AUTOCAST
from kdfast.data.batches import cut_by_tokens
from kdfast.data.windows import Windows
from kdfast.models.inference import forward_tokens
from kdfast.models.load import SpanModel
from kdfast.models.loader import HostLoader

WARM_UP = 8
PASSES = 40


def measure(
    model: SpanModel, windows: Windows, device: torch.device, precision: str
) -> dict[str, Any]:
    """Milliseconds from a question's windows in memory to their logits there: median and p80.

    The questions stand evenly over the set, one after another; all windows of one go through the
    model together, as far as a pass has room. Tokenizing and decoding are not in it.
    """
    model.eval()
    feed = HostLoader(windows, None)
    bounds = np.searchsorted(windows.question, np.arange(len(windows.question_ids) + 1))
    chosen = np.linspace(0, len(bounds) - 2, WARM_UP + PASSES).astype(np.int64)
    taken = []
    for question in chosen:
        indices = np.arange(bounds[question], bounds[question + 1])
        started = time.perf_counter()
        for batch in cut_by_tokens(indices, windows.lengths[indices], forward_tokens(device)):
            _logits(model, feed, batch, device, AUTOCAST[precision])
        taken.append(1000 * (time.perf_counter() - started))
    low, high = np.percentile(taken[WARM_UP:], [50, 80])
    return {"median_ms": float(low), "p80_ms": float(high), "passes": PASSES}


def _logits(
    model: SpanModel,
    feed: HostLoader,
    batch: np.ndarray,
    device: torch.device,
    precision: torch.dtype | None,
) -> torch.Tensor:
    inputs = {
        name: None if tensor is None else tensor.to(device)
        for name, tensor in feed.micro_batch(batch).inputs.items()
    }
    with (
        torch.inference_mode(),
        torch.autocast(device.type, dtype=precision, enabled=precision is not None),
    ):
        return model(**inputs).cpu()
