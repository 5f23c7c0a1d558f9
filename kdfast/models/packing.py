"""Packed micro-batches: whole windows one behind the other, without padding.

Attention finds the windows by their cumulative lengths, which travel through transformers' forward
as the keyword arguments that its own attention functions take: gradient checkpointing, which runs
a layer again in the backward pass, keeps them with the call.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import sdpa_mask

from kdfast.common.errors import UserError
from kdfast.models.structure import attention_dropout

# Model types whose layers pass the lengths on to attention, and mix tokens nowhere else. MPNet and
# the DeBERTas add relative positions of one padded window to their scores.
PACKS = frozenset(
    {"albert", "bert", "camembert", "distilbert", "electra", "roberta", "xlm-roberta"}
)


@dataclass(frozen=True)
class PackedWindows:
    """Where n windows lie in a micro-batch (1, T), and in padded rows (n, width).

    Attributes:
        cu_seq_lens: int32 (n + 1,), where each window begins, and T. A filling is one more window.
        max_length: Tokens of the longest window.
        rows: int64 (real tokens,), the place of each in the flattened padded rows.
        shape: n and the width of the padded rows.
        filling: Tokens behind the last window, which make T a multiple.
    """

    cu_seq_lens: torch.Tensor
    max_length: int
    rows: torch.Tensor
    shape: tuple[int, int]
    filling: int

    @classmethod
    def of(
        cls, lengths: np.ndarray, on_device: torch.Tensor, width: int, multiple: int = 1
    ) -> "PackedWindows":
        """Windows of these lengths in their order, found without a wait for the device.

        lengths, on_device: int (n,) on the host, and the same as int64 on the device. width: of the
        padded rows. multiple: of which T is made one.
        """
        total = int(lengths.sum())
        filling = packed_length(lengths, multiple) - total
        number = torch.arange(len(lengths), device=on_device.device)
        window = torch.repeat_interleave(number, on_device, output_size=total)
        begin = on_device.cumsum(0) - on_device
        position = torch.arange(total, device=on_device.device) - begin[window]
        bounds = F.pad(begin, (0, 1), value=total)
        if filling:
            bounds = F.pad(bounds, (0, 1), value=total + filling)
        return cls(
            cu_seq_lens=bounds.int(),
            max_length=max(int(lengths.max()), filling),
            rows=window * width + position,
            shape=(len(lengths), width),
            filling=filling,
        )

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "PackedWindows":
        """The same with both tensors changed."""
        return replace(self, cu_seq_lens=change(self.cu_seq_lens), rows=change(self.rows))

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """(n, width) to (1, T); the filling is 0."""
        return F.pad(padded.flatten()[self.rows], (0, self.filling))[None]

    def unpack(self, packed: torch.Tensor, fill: float = 0) -> torch.Tensor:
        """(1, T, ...) to (n, width, ...), with `fill` in the padding.

        No place is written twice, and the gradient is read from these places: both are
        deterministic.
        """
        real = packed[0, : len(self.rows)]
        n, width = self.shape
        flat = real.new_full((n * width, *real.shape[1:]), fill)
        return flat.index_copy(0, self.rows, real).view(n, width, *real.shape[1:])

    def position_ids(self, input_ids: torch.Tensor, padding_id: int | None) -> torch.Tensor:
        """The positions (1, T) that transformers gives these tokens in padded rows.

        padding_id: as a RoBERTa has it, which counts from behind it, and passes over tokens that
        are it, even in a text; None: positions count from 0.
        """
        if padding_id is None:
            return self.pack(
                torch.arange(self.shape[1], device=self.rows.device).expand(self.shape)
            )
        is_real = self.unpack(input_ids, padding_id).ne(padding_id).long()
        return self.pack(is_real.cumsum(1) * is_real + padding_id)

    def attention_arguments(self) -> dict[str, Any]:
        """What attention needs to know, under transformers' names."""
        return {
            "cu_seq_lens_q": self.cu_seq_lens,
            "cu_seq_lens_k": self.cu_seq_lens,
            "max_length_q": self.max_length,
            "max_length_k": self.max_length,
        }


def packed_length(lengths: np.ndarray, multiple: int) -> int:
    """The tokens of a packed micro-batch of windows of these lengths."""
    return -(-int(lengths.sum()) // multiple) * multiple


def why_not_packed(config: PretrainedConfig, device: torch.device, trains: bool) -> str | None:
    """Why a model of this config cannot read packed windows on this device; None: it can.

    trains: with dropout and gradients.
    """
    if config.model_type not in PACKS:
        return f"a model of type {config.model_type} cannot read packed windows"
    if device.type == "cpu":
        return None
    width = config.hidden_size // config.num_attention_heads
    if width % 4:
        return f"its attention heads are {width} wide, and torch's kernel takes multiples of 4"
    dropout, p = attention_dropout(config)
    if trains and p > 0:
        # Forward finds its random numbers by a length of 0 (ATen/native/transformers/cuda/
        # attention.cu: max_seqlen_k = 0), backward by the longest window's.
        return (
            f"its config.json has {dropout} {p}, and torch's kernel draws this dropout for "
            "packed windows otherwise in the backward pass than in the forward pass"
        )
    return None


def wants_packing(
    packing: str,
    config: PretrainedConfig,
    device: torch.device,
    log: Callable[[str], object] = lambda sentence: None,
) -> bool:
    """Whether --packing `packing` packs windows for a student of this config on this device.

    log: called with a sentence where `auto` does not, and another config of the same type would.
    Raises UserError where `on` cannot be.
    """
    reason = why_not_packed(config, device, trains=True)
    if packing == "on" and reason:
        raise UserError(f"--packing on: {reason}: give auto or off.")
    if packing == "auto" and reason and device.type == "cuda" and config.model_type in PACKS:
        log(f"Windows are padded, not packed: {reason}.")
    return packing == "on" or (packing == "auto" and device.type == "cuda" and not reason)


def enable_packing(reader: PreTrainedModel) -> None:
    """Let attention take packed windows, too; padded ones it computes as it did."""
    padded = reader.config._attn_implementation
    name = f"kdfast_packed_{padded}"
    function = AttentionInterface()[padded]
    AttentionInterface.register(name, partial(attention_forward, padded=function))
    AttentionMaskInterface.register(name, sdpa_mask)
    reader.set_attn_implementation(name)


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    padded: Callable[..., tuple[torch.Tensor, Any]],
    **kwargs: Any,
) -> tuple[torch.Tensor, Any]:
    """What transformers' AttentionInterface calls: (B, H, L, D) thrice to (B, L, H, D).

    padded: the function of the same kind for what is not packed. Packed windows (1, H, T, D) come
    with cu_seq_lens_q, and each attends to itself alone.
    """
    bounds = kwargs.get("cu_seq_lens_q")
    if bounds is None:
        return padded(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if query.is_cuda and query.dtype != torch.float64:
        longest = kwargs["max_length_q"]
        # The kernel behind torch's memory-efficient attention, the one that every card has: no
        # mask, and log-sum-exps kept for the backward pass. Of dropout see why_not_packed.
        mixed = torch.ops.aten._efficient_attention_forward(
            *(each.transpose(1, 2) for each in (query, key, value)),
            None,
            bounds,
            bounds,
            longest,
            longest,
            dropout,
            0,
            True,
            scale=scaling,
        )
        return mixed[0], None
    mixed = [
        padded(module, *(each[:, :, a:b] for each in (query, key, value)), None, dropout, scaling)[
            0
        ]
        for a, b in pairwise(bounds.tolist())
    ]
    return torch.cat(mixed, dim=1), None
