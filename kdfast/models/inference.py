"""Forward passes without gradients over windows, cut by tokens and by what memory has room for."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from kdfast.common.device import as_current, free_bytes, is_out_of_memory
from kdfast.common.errors import UserError
from kdfast.data.batches import cut_in_order
from kdfast.data.windows import Windows
from kdfast.models import deberta
from kdfast.models.span_model import SpanModel
from kdfast.models.window_loader import HostLoader, Layout, StreamedLoader, WindowLoader

# On a CPU, what stays in the caches.
CPU_TOKENS = 1536
GPU_TOKENS_AT_MOST = 65536
# Of a GPU's free memory; the rest is for fragmentation and for kernels that are not loaded yet.
MEMORY_SHARE = 0.8


@dataclass
class Room:
    """The tokens that a forward pass may have: fewer once memory has run out.

    packs: the model, whose type must be one of `packing.PACKS`, gets windows one behind the other,
    after `enable_packing`. Otherwise padding counts as tokens.
    """

    tokens: int = sys.maxsize
    packs: bool = False

    def cut(self, indices: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
        """Windows in their order, in parts that have room; lengths: theirs, int (n,)."""
        if self.packs:
            return cut_in_order(indices, lengths, self.tokens)
        most = max(1, self.tokens // max(1, int(lengths.max(initial=1))))
        return [indices[at : at + most] for at in range(0, len(indices), most)]


def forward_tokens(
    model: SpanModel, windows: Windows, device: torch.device, precision: torch.dtype | None
) -> int:
    """Tokens, padding included, of a micro-batch without gradients, which keeps no activations.

    On a GPU as many as its free memory holds. model: on the device. precision: as forward_windows
    has it.
    """
    if device.type == "cpu":
        return CPU_TOKENS
    with as_current(device):
        free = free_bytes(device)
    width = int(windows.lengths.max(initial=1))
    fitting = int(MEMORY_SHARE * free / bytes_per_token(model, width, precision))
    return min(GPU_TOKENS_AT_MOST, max(width, fitting))


def bytes_per_token(model: SpanModel, width: int, precision: torch.dtype | None) -> int:
    """What a token of a window of `width` holds at most at a time in a pass without gradients.

    Counted in the layers of transformers: what enters and leaves a layer, its sums and norms in
    the type of the weights; products in `precision`, of which those around the activation are the
    widest; where attention is not fused, matrices of its scores, too.
    """
    config = model.reader.config
    whole = model.head.weight.dtype.itemsize
    half = whole if precision is None else precision.itemsize
    held = 4 * whole * config.hidden_size
    linear = (each for each in model.reader.base_model.modules() if isinstance(each, nn.Linear))
    held += half * (5 * config.hidden_size + 3 * max(each.out_features for each in linear))
    if model.reach is not None:  # the mask of near tokens, as it is made
        held += (2 + half) * width
    if not model.takes_4d_mask:
        scores = 4 * whole
        if config.model_type in deberta.TYPES:  # two by distance, a sum, and fused or not
            scores = 6 * half
        held += config.num_attention_heads * width * scores
    return held


def forward_windows(
    model: SpanModel,
    windows: Windows,
    batches: list[np.ndarray],
    device: torch.device,
    precision: torch.dtype | None,
    room: Room | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Run the model over `batches` of windows, without gradient and dropout.

    Args:
        model: On the device.
        windows: What it reads.
        batches: Numbers of windows, int (n,) each.
        device: Where it computes.
        precision: Autocast's type, or None.
        room: A batch that has more tokens is computed in parts. It becomes less where memory runs
            out: the caller may keep it for later passes.

    Yields:
        (indices, logits) for each batch: fp32 (tokens, 2) of the real tokens, window after window
        in the order of indices. A GPU computes the next batch while the caller has the last one.

    Raises:
        UserError: Memory does not suffice for one window.
    """
    model.eval()
    room = room or Room()
    host = HostLoader(windows, None, Layout(model.width_multiple(), room.packs))
    # Each window is read once, so that to upload them all first would save nothing.
    loader = host if device.type == "cpu" else StreamedLoader(host, device)
    passes = _Passes(model, loader, windows.lengths, device, precision, room)
    waiting: tuple[np.ndarray, list[_Download]] | None = None
    for number, indices in enumerate(batches):
        downloads = passes.of_batch(indices, batches[number + 1 : number + 2])
        if waiting is not None:
            yield waiting[0], _rows(waiting[1])
        waiting = (indices, downloads)
    if waiting is not None:
        yield waiting[0], _rows(waiting[1])


@dataclass
class _Passes:
    """Forward passes over batches of windows, each in parts that memory has room for.

    lengths: int (W,), tokens of every window. The rest is forward_windows'.
    """

    model: SpanModel
    loader: WindowLoader
    lengths: np.ndarray
    device: torch.device
    precision: torch.dtype | None
    room: Room

    def of_batch(self, indices: np.ndarray, following: list[np.ndarray]) -> "list[_Download]":
        """The logits of a batch on their way. following: the next batch, if there is one."""
        downloads = []
        parts = self._cut([indices])
        while parts:
            download = self._of_part(parts[0], (parts[1:] or self._cut(following))[:1])
            if download is None:
                parts = self._cut(parts)
            else:
                downloads.append(download)
                parts = parts[1:]
        return downloads

    def _cut(self, batches: list[np.ndarray]) -> list[np.ndarray]:
        return [part for each in batches for part in self.room.cut(each, self.lengths[each])]

    def _of_part(self, part: np.ndarray, following: list[np.ndarray]) -> "_Download | None":
        """None where memory has run out: there is less room then."""
        lengths = self.lengths[part]
        try:
            with (
                as_current(self.device),
                torch.inference_mode(),
                torch.autocast(
                    self.device.type, dtype=self.precision, enabled=self.precision is not None
                ),
            ):
                batch = next(iter(self.loader.micro_batches([part])))
                self.loader.expect(following)
                return _Download(self.model(**batch.inputs), lengths)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Here nothing holds the frames of the pass, with its tensors, any more.
        if len(part) == 1:
            raise UserError(
                f"There is not enough memory on {self.device} for a single window of "
                f"{lengths[0]} tokens: end what else is using it, or give shorter windows "
                "(--max_seq_length, a Reader's max_seq_len) or a smaller model."
            )
        self.room.tokens = Layout(packs=self.room.packs).tokens(lengths) // 2
        if self.device.type == "cuda":
            with as_current(self.device):
                torch.cuda.empty_cache()  # what cuBLAS needs does not come from there
        return None


class _Download:
    """Logits (n, L, 2) on their way to the host, from the current device."""

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


def _rows(downloads: list[_Download]) -> np.ndarray:
    """fp32 (tokens, 2) of a batch that was computed in parts."""
    rows = [each.rows() for each in downloads]
    return rows[0] if len(rows) == 1 else np.concatenate(rows)
