"""How far the hidden states and the attention of a student are from its teacher's, for each window.

Each is a mean over the window's real positions, or pairs of them, so that padding changes nothing.
"""

import inspect
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from kdfast.common.errors import UserError
from kdfast.models import deberta
from kdfast.models.span_model import SpanModel

# transformers' names for the linear layers that make queries, keys and values.
NAMES = (("query", "key", "value"), ("q", "k", "v"), ("q_lin", "k_lin", "v_lin"))
TOLERANCE = 1e-3  # of a probability, which fp32 rounds to some 1e-6


@dataclass
class LayerAttention:
    """What a layer attended with: softmax(scaling * query @ key^T + bias) @ value.

    query, key, value: (B, L, H * D). bias: (B, H, L, L) or None. scaling: 1 / sqrt(D) by default.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    bias: torch.Tensor | None = None
    scaling: float | None = None

    def split(self, heads: int) -> list[torch.Tensor]:
        """Queries, keys and values, (B, heads, L, width of a head)."""
        whole = (self.query, self.key, self.value)
        return [each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in whole]

    def scored(self, heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, float]:
        """Query, key, bias and scaling, of which `attention_probabilities` are made."""
        query, key, _ = self.split(heads)
        scaling = query.shape[-1] ** -0.5 if self.scaling is None else self.scaling
        return query, key, self.bias, scaling


class AttentionCapture:
    """Captures what some layers attend with, in the order in which they run.

    Forward hooks keep it while the model runs inside `with`; at its end it is dropped. role: what
    to call the model in a message. Raises UserError for a model that has no such layers.
    """

    def __init__(self, model: SpanModel, attention: str, role: str, layers: list[int]):
        self.layers = layers if attention != "none" else []
        self._outputs: dict[tuple[int, str], Any] = {}
        self._calls: Counter[str] = Counter()
        self._is_active = False
        if not self.layers:
            return
        modules = attention_modules(model.reader)
        for module, names in modules:
            self._capture(module, names)
        why = ""
        if not modules:
            why = "its queries, keys and values do not come from three linear layers of their own"
        elif attention == "probabilities" and not self._tells_probabilities(model):
            why = "its attention is not a softmax of queries, keys and a bias alone"
        if why:
            raise UserError(
                f"--attention_loss {attention}: {model.reader.config.model_type}, the type of the "
                f"{role}, has none to learn from or by, for {why}: give none."
            )

    def _capture(self, module: nn.Module, names: tuple[str, ...]) -> None:
        if isinstance(module, deberta.Attention):
            module.attend.register_forward_pre_hook(self._keep_deberta)
            return
        if "position_bias" in inspect.signature(module.forward).parameters:  # MPNet
            module.register_forward_pre_hook(self._keep_bias, with_kwargs=True)
        for name, own in zip(NAMES[0], names, strict=True):
            getattr(module, own).register_forward_hook(partial(self._keep_output, name))

    def _keep(self, name: str, value: Any) -> None:
        if self._is_active:
            if (layer := self._calls[name]) in self.layers:
                self._outputs[layer, name] = value
            self._calls[name] += 1

    def _keep_output(self, name: str, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        self._keep(name, output)

    def _keep_bias(self, module: nn.Module, inputs: Any, kwargs: dict[str, Any]) -> None:
        given = inspect.signature(module.forward).bind(*inputs, **kwargs).arguments
        self._keep("bias", given.get("position_bias"))

    def _keep_deberta(self, module: nn.Module, inputs: Any) -> None:
        *heads, bias, scaling, _ = inputs
        for name, each in zip(NAMES[0], heads, strict=True):
            self._keep(name, each.permute(1, 2, 0, 3).flatten(2))
        shape = (len(heads[0]), *bias.shape[1:])  # a mask alone is one for all heads
        self._keep("bias", bias.expand(shape).transpose(0, 1))
        self._keep("scaling", scaling)

    @torch.no_grad()
    def _tells_probabilities(self, model: SpanModel) -> bool:
        """Whether probabilities of what is captured are those that transformers itself returns."""
        reader, was_training = model.reader, model.training
        heads, used = reader.config.num_attention_heads, reader.config._attn_implementation
        ids = torch.arange(1, 9, device=reader.device)[None] % reader.config.vocab_size
        mask = torch.ones_like(ids, dtype=torch.bool)
        model.eval()
        with self:
            model(ids)
            found = [attention_probabilities(*each.scored(heads), mask) for each in self.take()]
        reader.set_attn_implementation("eager")
        wanted = reader.base_model(ids, mask.long(), output_attentions=True).attentions
        reader.set_attn_implementation(used)
        model.train(was_training)
        pairs = zip(found, (wanted[layer] for layer in self.layers), strict=True)
        return all(bool((one - other).abs().max() < TOLERANCE) for one, other in pairs)

    def __enter__(self) -> "AttentionCapture":
        self._is_active = True
        self._calls.clear()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_active = False
        self._outputs.clear()  # an error may have left some, and the graph behind them

    def take(self) -> Iterator[LayerAttention]:
        """Layer by layer what the model's last run gave, which is then dropped here."""
        for layer in self.layers:
            names = [name for known, name in self._outputs if known == layer]
            yield LayerAttention(**{name: self._outputs.pop((layer, name)) for name in names})


def attention_modules(reader: PreTrainedModel) -> list[tuple[nn.Module, tuple[str, ...]]]:
    """The self-attention of every layer, or the one of all (ALBERT), with the names of its linear
    layers; empty where there are no such layers."""
    found: list[tuple[nn.Module, tuple[str, ...]]] = []
    for module in reader.base_model.modules():
        if isinstance(module, deberta.Attention):
            found.append((module, ()))
        for names in NAMES:
            if all(isinstance(getattr(module, name, None), nn.Linear) for name in names):
                found.append((module, names))
    is_shared = len(found) == 1 and getattr(reader.config, "inner_group_num", 0) == 1
    return found if is_shared or len(found) == reader.config.num_hidden_layers else []


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
    """(B,): the mean of (softmax(scaling * query key^T + bias) - the teacher's)^2 over heads and
    pairs of real positions. That is Haystack's form; TinyBERT's paper compares what the softmax is
    taken of.

    query, key: (B, H, L, D). bias: (B, H, L, L) or None. taught: the teacher's query, key, bias and
    scaling. mask: bool (B, L). The gradient of each window's term is made at once and kept, not
    rounded: of the size of attention only a bias's outlives forward(). backward() scales it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        bias: torch.Tensor | None,
        scaling: float,
        taught: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, float],
        mask: torch.Tensor,
    ) -> torch.Tensor:
        ctx.dtypes = [query.dtype, key.dtype, None if bias is None else bias.dtype]
        probabilities = attention_probabilities(query, key, bias, scaling, mask)
        difference = attention_probabilities(*taught, mask)
        torch.sub(probabilities, difference, out=difference)
        difference.mul_(mask[:, None, :, None])
        query, key = widened(query), widened(key)
        weight = 1 / (query.shape[1] * mask.sum(1).to(query.dtype) ** 2)
        term = difference.square().sum(dim=(1, 2, 3)) * weight
        difference.mul_(2 * weight[:, None, None, None])
        of_scores = torch._softmax_backward_data(difference, probabilities, -1, query.dtype)
        of_bias = [] if bias is None else [of_scores.clone()]
        of_scores.mul_(scaling)
        ctx.save_for_backward(of_scores @ key, of_scores.mT @ query, *of_bias)
        return term

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grads = [
            (grad[:, None, None, None] * each).to(dtype)
            for each, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=False)
        ]
        return *grads, *[None] * (6 - len(grads))


def attention_probabilities(
    query: torch.Tensor,
    key: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: float,
    mask: torch.Tensor,
) -> torch.Tensor:
    """(B, H, L, L), of fp32 at least: softmax(scaling * query key^T + bias)."""
    return scores(widened(query), widened(key), mask, scaling, bias).softmax(-1)


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


def scores(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor,
    scaling: float | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """(B, H, L, L): scaling * query key^T + bias, -inf for keys that are padding.

    scaling: 1 / sqrt(D) by default.
    """
    found = query @ key.mT
    found.mul_(query.shape[-1] ** -0.5 if scaling is None else scaling)
    if bias is not None:
        found.add_(bias)
    return found.masked_fill_(~mask[:, None, None], -torch.inf)


def widened(values: torch.Tensor) -> torch.Tensor:
    """fp32 for half precision."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
