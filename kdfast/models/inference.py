"""Forward passes without gradients over windows, cut by tokens."""

from collections.abc import Iterator

import numpy as np
import torch

from kdfast.data.windows import Windows
from kdfast.models.span_model import SpanModel
from kdfast.models.window_loader import HostLoader, MicroBatch, StreamedLoader, WindowLoader


def forward_tokens(device: torch.device) -> int:
    """Padded tokens of a micro-batch without gradients, which keeps no activations."""
    return 1536 if device.type == "cpu" else 65536


def forward_windows(
    model: SpanModel,
    windows: Windows,
    batches: list[np.ndarray],
    device: torch.device,
    precision: torch.dtype | None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Run the model over `batches` of windows, without gradient and dropout.

    precision: autocast's type, or None. Yields (indices, logits): fp32 (tokens, 2) of the real
    tokens, window after window in the order of indices. A GPU computes the next batch while the
    caller has the last one.
    """
    model.eval()
    host = HostLoader(windows, None)
    # Each window is read once, so that to upload them all first would save nothing.
    loader = host if device.type == "cpu" else StreamedLoader(host, device)
    waiting: tuple[np.ndarray, _Download] | None = None
    for indices, batch in zip(batches, _steps(loader, batches), strict=True):
        with (
            torch.inference_mode(),
            torch.autocast(device.type, dtype=precision, enabled=precision is not None),
        ):
            logits = model(**batch.inputs)
            download = _Download(logits, windows.lengths[indices])
        if waiting is not None:
            yield waiting[0], waiting[1].rows()
        waiting = (indices, download)
    if waiting is not None:
        yield waiting[0], waiting[1].rows()


def _steps(loader: WindowLoader, batches: list[np.ndarray]) -> Iterator[MicroBatch]:
    """The batches one at a time, each after the next one has been announced."""
    for number, indices in enumerate(batches):
        batch = next(iter(loader.micro_batches([indices])))
        loader.expect(batches[number + 1 : number + 2])
        yield batch


class _Download:
    """Logits (n, L, 2) on their way to the host."""

    def __init__(self, logits: torch.Tensor, lengths: np.ndarray):
        self.lengths = lengths
        self.host = logits.to("cpu", torch.float32, non_blocking=True)
        self.done = torch.cuda.Event() if logits.is_cuda else None
        if self.done is not None:
            self.done.record()

    def rows(self) -> np.ndarray:
        """fp32 (tokens, 2): the real tokens, window after window."""
        if self.done is not None:
            self.done.synchronize()
        logits = self.host.numpy()
        return logits[np.arange(logits.shape[1]) < self.lengths[:, None]]
