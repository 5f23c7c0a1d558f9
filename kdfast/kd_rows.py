"""Rows for autograd and torch.compile, around whatever backend computes them.

Eager calls go through one autograd.Function straight to the backend: a library op costs several
times what the call inside it does. What traces (torch.compile, make_fx, FakeTensorMode) would
lose such a call, and gets two library ops with the same gradient.
"""

from typing import NoReturn

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from kdfast.backends import load

SOFT, HARD = 5, 6  # where row_stats holds the two parts of a row

ONCE = (
    "kdfast's loss can be differentiated once; backend='reference' can be differentiated again, "
    "for a gradient penalty or a Hessian"
)
NO_TRANSFORMS = (
    "kdfast's loss does not run inside torch.func transforms (vmap, grad, jvp, ...): it takes "
    "whole batches and ordinary autograd; backend='reference' runs inside them"
)


class KDRows(torch.autograd.Function):
    """differentiable_rows(backend, settings, divisor, *tensors)

    The name of a backend and what its forward takes (see kdfast.backends). With a divisor: the sum
    of all row losses over it, a scalar; reducing here saves two nodes of the graph. With None:
    row_loss (B, 2) and row_stats (B, 2, 8).
    """

    @staticmethod
    def forward(ctx, backend, settings, divisor, *tensors):
        tensors = [
            _readable(t) if t is not None and (t.is_neg() or t.is_inference()) else t
            for t in tensors
        ]
        loss, row_stats = load(backend).forward(tensors, settings, divisor)
        ctx.save_for_backward(*tensors, row_stats)
        ctx.call = backend, settings, divisor
        if divisor is not None:
            return loss
        ctx.mark_non_differentiable(row_stats)
        ctx.set_materialize_grads(False)
        return loss, row_stats

    @staticmethod
    def backward(ctx, grad, _grad_of_stats=None):
        *tensors, row_stats = ctx.saved_tensors
        if grad is None:
            return (None,) * 10
        if not torch._C._has_storage(grad):  # is_grads_batched=True
            raise RuntimeError(NO_TRANSFORMS)
        backend, settings, divisor = ctx.call
        first, last = load(backend).backward(grad, tensors, row_stats, settings, divisor)
        if torch.is_grad_enabled():  # create_graph=True
            first = Once.apply(first, grad, *tensors[:2])
            last = last if last is None else Once.apply(last, grad, *tensors[:2])
        return None, None, None, first, last, None, None, None, None, None


# What Function.apply adds is for torch.func's transforms, which `fused_kd_loss` has refused by
# then: copies of the arguments, 3 of 70 us.
differentiable_rows = super(torch.autograd.Function, KDRows).apply


def _readable(tensor: Tensor) -> Tensor:
    """A copy of a view that torch is yet to negate, since backends read memory; and of what
    inference mode made, a teacher's logits say, since autograd saves no such tensor."""
    is_saved = not torch.is_inference_mode_enabled()
    return tensor.clone() if is_saved or tensor.is_neg() else tensor


class Once(torch.autograd.Function):
    """A gradient, unchanged, that refuses to be differentiated with respect to `sources`."""

    @staticmethod
    def forward(ctx, gradient: Tensor, *sources: Tensor | None) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, grad: Tensor) -> NoReturn:
        raise RuntimeError(ONCE)


PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))


def is_seen(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether more than torch.compile watches the call: fake tensors, subclasses, make_fx."""
    return not PLAIN.issuperset(map(type, tensors)) or is_in_torch_dispatch_mode()


TENSORS = (
    "Tensor student, Tensor? student_end, Tensor? teacher, Tensor? teacher_end, "
    "Tensor start_positions, Tensor end_positions, Tensor? mask"
)
SETTINGS = "float temperature, float weight, int kind, float soft_scale, str backend"

torch.library.define("kdfast::kd_rows", f"({TENSORS}, {SETTINGS}) -> (Tensor, Tensor)")
torch.library.define(
    "kdfast::kd_rows_backward",
    f"(Tensor grad_row_loss, {TENSORS}, Tensor row_stats, {SETTINGS}) -> Tensor[]",
)


@torch.library.impl("kdfast::kd_rows", "default")
def _(*arguments):
    *tensors, temperature, weight, kind, soft_scale, backend = arguments
    return load(backend).forward(tensors, (temperature, weight, kind, soft_scale))


@torch.library.impl("kdfast::kd_rows_backward", "default")
def _(grad, *arguments):
    *tensors, row_stats, temperature, weight, kind, soft_scale, backend = arguments
    settings = temperature, weight, kind, soft_scale
    first, last = load(backend).backward(grad, tensors, row_stats, settings)
    return [first] if last is None else [first, last]


@torch.library.register_fake("kdfast::kd_rows")
def _(student, *_others):
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    batch = student.shape[0]
    return (
        student.new_empty((batch, 2), dtype=dtype),
        student.new_empty((batch, 2, 8), dtype=dtype),
    )


@torch.library.register_fake("kdfast::kd_rows_backward")
def _(_grad_row_loss, student, student_end, *_others):
    return [s.new_empty(s.shape) for s in (student, student_end) if s is not None]


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:7], output[1])
    ctx.settings = inputs[7:]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _grad_of_stats):
    saved = ctx.saved_tensors
    if grad is None:
        return (None,) * 12
    grads = torch.ops.kdfast.kd_rows_backward(grad, *saved, *ctx.settings)
    return grads[0], grads[1] if saved[1] is not None else None, *(None,) * 10


def _refuse(ctx, *_grads):
    raise RuntimeError(ONCE)


torch.library.register_autograd("kdfast::kd_rows", _backward, setup_context=_save)
torch.library.register_autograd("kdfast::kd_rows_backward", _refuse)
