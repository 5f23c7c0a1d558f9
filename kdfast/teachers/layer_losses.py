"""How far the hidden states and the attention of a student are from its teacher's, for each window.

Each is a mean over the window's real positions, or pairs of them, so that padding changes nothing.
"""

from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from kdfast.common.errors import UserError
from kdfast.models.span_model import SpanModel

# What of each layer the terms read, by the names that transformers gives these linear layers.
NEEDS = {"none": (), "probabilities": ("query", "key"), "relations": ("query", "key", "value")}


class AttentionCapture:
    """Captures the queries, keys and values, as far as `attention` needs them, of some layers.

    Forward hooks keep them while the model runs inside `with`; at its end they are dropped. role:
    what to call the model in a message. Raises UserError for a model without such layers.
    """

    def __init__(self, model: SpanModel, attention: str, role: str, layers: list[int]):
        self.names = NEEDS[attention]
        self.layers = layers if self.names else []
        self._outputs: dict[tuple[int, str], torch.Tensor] = {}
        self._is_active = False
        modules = attention_modules(model.reader)
        if not self.layers:
            return
        if modules is None:
            raise UserError(
                f"--attention_loss {attention}: the attention of {model.reader.config.model_type}, "
                f"the type of the {role}, is not a plain softmax of queries and keys in layers of "
                "their own: give none."
            )
        for layer in self.layers:
            for name in self.names:
                self._capture(getattr(modules[layer], name), layer, name)

    def _capture(self, linear: nn.Linear, layer: int, name: str) -> None:
        def keep(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            if self._is_active:
                self._outputs[layer, name] = output

        linear.register_forward_hook(keep)

    def __enter__(self) -> "AttentionCapture":
        self._is_active = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_active = False
        self._outputs.clear()  # an error may have left some, and the graph behind them

    def take(self, heads: int) -> Iterator[list[torch.Tensor]]:
        """Layer by layer what the model's last run gave, (B, heads, L, width of a head) for each
        name, which is then dropped here."""
        for layer in self.layers:
            found = [self._outputs.pop((layer, name)) for name in self.names]
            yield [each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in found]


def attention_modules(reader: PreTrainedModel) -> list[nn.Module] | None:
    """The self-attention of every layer, where it is a softmax of linear queries and keys alone;
    None where it is not, or is one for all layers."""
    found = [
        module
        for module in reader.base_model.modules()
        if all(isinstance(getattr(module, name, None), nn.Linear) for name in NEEDS["relations"])
    ]
    return found if len(found) == reader.config.num_hidden_layers else None


def hidden_term(
    states: tuple[torch.Tensor, ...],
    targets: tuple[torch.Tensor, ...],
    mask: torch.Tensor,
    projection: torch.Tensor | None,
) -> torch.Tensor:
    """(B,): the mean of (state - target)^2 over real positions and units, summed over the layers.

    states, targets: as many (B, L, width), the widths of the two equal unless there is a
    projection. mask: bool (B, L), True for real positions.
    """
    found, wanted = widened(torch.stack(states)), widened(torch.stack(targets))  # (n, B, L, width)
    if projection is None:
        difference = found - wanted
    else:
        flat = torch.baddbmm(wanted.flatten(1, 2), found.flatten(1, 2), projection, beta=-1)
        difference = flat.view_as(wanted)
    squares = difference.square().mean(-1).sum(0)
    return torch.where(mask, squares, 0).sum(1) / mask.sum(1)


class AttentionTerm(torch.autograd.Function):
    """(B,): the mean of (softmax(query key^T / sqrt(D)) - the teacher's)^2 over heads and pairs of
    real positions. That is Haystack's form; TinyBERT's paper compares what the softmax is taken of.

    query, key: (B, H, L, D); teacher_query, teacher_key: (B, H, L, D'). mask: bool (B, L). The
    gradient of each window's term is made at once and kept, not rounded, so that nothing of the
    size of attention outlives forward(); backward() scales it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        teacher_query: torch.Tensor,
        teacher_key: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        ctx.dtype = query.dtype
        query, key = widened(query), widened(key)
        probabilities = scores(query, key, mask).softmax(-1)
        difference = scores(widened(teacher_query), widened(teacher_key), mask).softmax(-1)
        torch.sub(probabilities, difference, out=difference)
        difference.mul_(mask[:, None, :, None])
        weight = 1 / (query.shape[1] * mask.sum(1).to(query.dtype) ** 2)
        term = difference.square().sum(dim=(1, 2, 3)) * weight
        difference.mul_(2 * weight[:, None, None, None])
        of_scores = torch._softmax_backward_data(difference, probabilities, -1, query.dtype)
        of_scores.mul_(query.shape[-1] ** -0.5)
        ctx.save_for_backward(of_scores @ key, of_scores.mT @ query)
        return term

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grads = [(grad[:, None, None, None] * each).to(ctx.dtype) for each in ctx.saved_tensors]
        return *grads, None, None, None


class RelationTerm(torch.autograd.Function):
    """(B,): KL(teacher || student) of the relations softmax(x x^T / sqrt(D)), the mean over heads
    and real positions: MiniLMv2's (Wang et al. 2021, arxiv.org/abs/2012.15828, equation 4).

    values: (B, H, L, D). teacher_values: (B, H, L, D'). mask: bool (B, L). Gradients as in
    AttentionTerm.
    """

    @staticmethod
    def forward(
        ctx: Any, values: torch.Tensor, teacher_values: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        ctx.dtype = values.dtype
        values, teacher_values = widened(values), widened(teacher_values)
        found = scores(values, values, mask).log_softmax(-1)
        wanted = scores(teacher_values, teacher_values, mask).log_softmax(-1)
        weight = mask / (values.shape[1] * mask.sum(1, keepdim=True)).to(values.dtype)
        difference = (wanted - found).masked_fill_(~mask[:, None, None], 0)  # not inf - inf
        probabilities = wanted.exp()
        term = ((difference.mul_(probabilities)).sum(-1).sum(1) * weight).sum(1)
        of_scores = found.exp_().sub_(probabilities).mul_(weight[:, None, :, None])
        of_scores.mul_(values.shape[-1] ** -0.5)
        ctx.save_for_backward((of_scores + of_scores.mT) @ values)
        return term

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (saved,) = ctx.saved_tensors
        return (grad[:, None, None, None] * saved).to(ctx.dtype), None, None


def scores(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(B, H, L, L): query key^T / sqrt(D), -inf for keys that are padding."""
    found = query @ key.mT
    found.mul_(query.shape[-1] ** -0.5)
    return found.masked_fill_(~mask[:, None, None], -torch.inf)


def widened(values: torch.Tensor) -> torch.Tensor:
    """fp32 for half precision."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
