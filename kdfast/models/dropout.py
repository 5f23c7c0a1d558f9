"""Dropout that costs a CPU little. torch's takes 6 ns an element there, for its random numbers.

Masks are drawn 16 bits an element, four from each number of torch's own generator: what
torch.manual_seed was given decides them, and gradient checkpointing draws them again.
"""

import math
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kdfast.models import deberta
from kdfast.models.span_model import SpanModel

ATTENTION = "kdfast_dropout"
LANES = 2**16  # values of the random number behind an element
# Integers as wide as the numbers of a floating-point type.
BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


def speed_up_dropout(model: SpanModel) -> None:
    """Make the dropout of a SpanModel cheap, in place: of hidden states and inside attention.

    For a model that trains on a CPU, eagerly. What it computes in eval() and what its reader saves
    stay the same.
    """
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Dropout:
                setattr(module, name, Dropout(child.p).train(child.training))
            elif type(child) is deberta.Attend:
                child.__class__ = Attend
    # A model without SDPA has an nn.Dropout for its attention, too.
    if model.reader.config._attn_implementation == "sdpa":
        AttentionInterface.register(ATTENTION, attention_forward)
        AttentionMaskInterface.register(ATTENTION, sdpa_mask)
        model.reader.set_attn_implementation(ATTENTION)


def keep_mask(shape: tuple[int, ...], p: float) -> tuple[torch.Tensor, float]:
    """A random mask, uint8 of `shape`, 1 with probability 1 - p and else 0; and what to scale by.

    p is rounded to a multiple of 2**-16, and less than 1; the scale is the inverse of what a mask
    keeps after that, so that nothing is biased.
    """
    count = math.prod(shape)
    dropped = min(round(p * LANES), LANES - 1)
    bits = torch.empty((count + 3) // 4, dtype=torch.int64)
    bits.random_(torch.iinfo(torch.int64).min, None)  # all 64 bits; by default the top one is 0
    # numpy compares 16-bit numbers ten times as fast as torch does.
    keep = bits.numpy().view(np.uint16)[:count] >= dropped
    return torch.from_numpy(keep.view(np.uint8)).view(shape), LANES / (LANES - dropped)


def kept(values: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """`values` where `keep` is 1, and zero where it is 0."""
    # On the bit patterns: a product of a half-precision and a byte tensor goes through fp32.
    return (values.view(BITS[values.dtype]) * keep).view(values.dtype)


def keep_only(values: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """kept() in place."""
    values.view(BITS[values.dtype]).mul_(keep)
    return values


class Dropout(nn.Dropout):
    """nn.Dropout with keep_mask()."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0:
            return hidden
        return DropoutFunction.apply(hidden, self.p)


class DropoutFunction(torch.autograd.Function):
    """hidden * keep * scale, of any shape; only the mask is saved."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, p: float) -> torch.Tensor:
        keep, ctx.scale = keep_mask(hidden.shape, p)
        ctx.save_for_backward(keep)
        return keep_only(hidden * ctx.scale, keep)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (keep,) = ctx.saved_tensors
        return keep_only(grad * ctx.scale, keep), None


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers' AttentionInterface calls: (B, H, L, D) thrice to (B, L, H, D).

    attention_mask: bool, True for what is attended to, broadcast to (B, H, L, L), with no row
    that is wholly False; or None. dropout: 0 in eval(), where torch's fused attention is faster.
    """
    if dropout == 0:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=0.0, scaling=scaling, **kwargs
        )
    bias = None
    if attention_mask is not None:
        bias = torch.zeros(attention_mask.shape)
        bias.masked_fill_(~attention_mask, -torch.inf)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    mixed = AttentionFunction.apply(query, key, value, bias, scaling, dropout)
    return mixed.transpose(1, 2).contiguous(), None


class Attend(deberta.Attend):
    """DeBERTa's attention with keep_mask()."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor,
        scaling: float,
        p: float,
    ) -> torch.Tensor:
        if p == 0:
            return super().forward(query, key, value, bias, scaling, p)
        return cast(torch.Tensor, AttentionFunction.apply(query, key, value, bias, scaling, p))


class AttentionFunction(torch.autograd.Function):
    """(keep * scale * softmax(scaling * query @ key^T + bias)) @ value.

    query, key, value: (B, H, L, D), all of one type. bias: (B, H, L, L); or what broadcasts to it,
    without a gradient; or None. Scores and softmax are fp32 at least: rounded scores would err
    most.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None,
        scaling: float,
        p: float,
    ) -> torch.Tensor:
        shape = query.shape
        query, key, value = (each.flatten(0, 1) for each in (query, key, value))
        wide = torch.promote_types(query.dtype, torch.float32)
        with torch.autocast("cpu", enabled=False):
            scores = product(query.to(wide), key.to(wide).mT, scaling)
        if bias is not None:
            scores.view(*shape[:-1], -1).add_(bias)
        weights = torch.softmax(scores, dim=-1).to(value.dtype)
        keep, scale = keep_mask(weights.shape, p)
        ctx.save_for_backward(query, key, value, weights, keep)
        ctx.factors = scaling, scale
        ctx.bias_type = None if bias is None else bias.dtype
        return product(kept(weights, keep), value, scale).view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, weights, keep = ctx.saved_tensors
        scaling, scale = ctx.factors
        shape, grad = grad.shape, grad.flatten(0, 1)
        grad_value = product(kept(weights, keep).mT, grad, scale)
        grad_weights = keep_only(product(grad, value.mT, scale), keep)
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        grad_query = product(grad_scores, key, scaling)
        grad_key = product(grad_scores.mT, query, scaling)
        grads = (each.view(shape) for each in (grad_query, grad_key, grad_value))
        grad_bias = None
        if ctx.needs_input_grad[3]:
            grad_bias = grad_scores.view(*shape[:-1], -1).to(ctx.bias_type)
        return *grads, grad_bias, None, None


def product(left: torch.Tensor, right: torch.Tensor, factor: float) -> torch.Tensor:
    """factor * left @ right, batched, with one rounding."""
    return torch.baddbmm(left.new_empty(()), left, right, beta=0, alpha=factor)
