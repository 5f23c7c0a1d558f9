"""Rows for autograd and torch.compile, with any backend.

Eager calls go through one autograd.Function straight to the backend: a library op costs several
times what the call inside it does. What traces (torch.compile, make_fx, FakeTensorMode) would
lose such a call, and gets two library ops with the same gradient.
"""

from collections.abc import Sequence
from typing import NoReturn, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from kdfast.kernels.backends import RowSettings, RowTensors, load

SOFT, HARD = 5, 6  # where row_stats holds the two parts of a row

ONCE = (
    "kdfast's loss can be differentiated once; backend='reference' can be differentiated again, "
    "for a gradient penalty or a Hessian"
)
NO_TRANSFORMS = (
    "kdfast's loss does not run inside torch.func transforms (vmap, grad, jvp, ...): it takes "
    "whole batches and ordinary autograd; backend='reference' runs inside them"
)


# The innermost torch.autograd.graph.saved_tensors_hooks, or None.
saving_hooks = torch._C._autograd._top_saved_tensors_default_hooks


Operand = Tensor | float | str | None  # an argument of a library op


class Context(Protocol):
    """What torch hands from forward to backward, and what is kept in it."""

    saved_tensors: tuple[Tensor, ...]
    call: tuple[str, RowSettings, int | None, str | None]
    numbers: tuple[Operand, ...]
    others: tuple[Operand, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...
    def mark_non_differentiable(self, *outputs: Tensor) -> None: ...
    def set_materialize_grads(self, value: bool) -> None: ...


class KDRows(torch.autograd.Function):
    """differentiable_rows(backend, settings, divisor, *tensors)

    The name of a backend and what its forward takes (see backends.py). With a divisor: the sum
    of all row losses over it, a scalar; reducing here saves two nodes of the graph. With None:
    row_loss (B, 2) and row_stats (B, 2, 8).
    """

    @staticmethod
    def forward(
        ctx: Context,
        backend: str,
        settings: RowSettings,
        divisor: int | None,
        *given: Tensor | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        tensors = [
            _readable(t) if t is not None and (t.is_neg() or t.is_inference()) else t for t in given
        ]
        loss, row_stats = load(backend).forward(RowTensors._make(tensors), settings, divisor)
        saved = *tensors, row_stats
        ctx.save_for_backward(*saved)
        is_hooked = saving_hooks(False) is not None
        ctx.call = backend, settings, divisor, kinds_of(saved) if is_hooked else None
        if divisor is not None:
            return loss
        ctx.mark_non_differentiable(row_stats)
        ctx.set_materialize_grads(False)
        return loss, row_stats

    @staticmethod
    def backward(
        ctx: Context, grad: Tensor | None, _grad_of_stats: None = None
    ) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        if grad is None:
            return (None,) * 10
        if not torch._C._has_storage(grad):  # is_grads_batched=True
            raise RuntimeError(NO_TRANSFORMS)
        backend, settings, divisor, kinds = ctx.call
        tensors, row_stats = RowTensors._make(saved[:7]), saved[7]
        if kinds is not None:
            tensors, row_stats = _given_back(tensors, row_stats, kinds)
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


def kinds_of(saved: Sequence[Tensor | None]) -> str:
    """What hooks must not change of each saved tensor."""
    return "; ".join("none" if t is None else f"{t.dtype} {t.dim()}-d {t.device}" for t in saved)


def _given_back(tensors: RowTensors, row_stats: Tensor, kinds: str) -> tuple[RowTensors, Tensor]:
    """The saved tensors as memory that a backend can read.

    torch.autograd.graph.saved_tensors_hooks may have replaced any of them. Other strides are made
    contiguous; raises RuntimeError, as torch's own losses do, where `kinds` or a shape is another.
    """
    saved = *tensors, row_stats
    sizes = *tensors.student.shape[:2], 2
    given = kinds_of(saved)
    if given != kinds or not all(
        tensor is None
        or (
            type(tensor) in PLAIN
            and tensor.layout is torch.strided
            and tensor.shape == ((sizes[0], 2, 8) if tensor is row_stats else sizes[: tensor.dim()])
        )
        for tensor in saved
    ):
        raise RuntimeError(
            "saved_tensors_hooks gave kdfast's loss other tensors than it had saved: "
            f"[{given}], expected dense ones of the same shapes, [{kinds}]"
        )
    readable = RowTensors._make(t if t is None else t.resolve_neg().contiguous() for t in tensors)
    return readable, row_stats.resolve_neg().contiguous()


class Once(torch.autograd.Function):
    """A gradient, unchanged, that refuses to be differentiated with respect to `sources`."""

    @staticmethod
    def forward(ctx: Context, gradient: Tensor, *sources: Tensor | None) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> NoReturn:
        raise RuntimeError(ONCE)


PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))


def is_graph(tensors: RowTensors) -> bool:
    """Whether the call is traced: by torch.compile, with fake tensors or subclasses, by make_fx."""
    return (
        torch.compiler.is_compiling()
        or not PLAIN.issuperset(map(type, tensors))
        or is_in_torch_dispatch_mode()
    )


TENSORS = (
    "Tensor student, Tensor? student_end, Tensor? teacher, Tensor? teacher_end, "
    "Tensor start_positions, Tensor end_positions, Tensor? mask"
)
# Two forms of each op. A number that torch.compile holds as a constant is a float of the graph. One
# that changes from call to call comes as a 0-dim float64 CPU tensor: torch.compile would make each
# value of a float a graph of its own, or keep an old one (pytorch #194976). Such a tensor is read
# in every call, which a captured CUDA graph would not do. Rename both when their gradients change:
# torch keeps compiled graphs on disk by the name of the op that is called.
UNSAFE = getattr(torch.Tag, "cudagraph_unsafe", None)
FORMS: dict[str, tuple[str, tuple[torch.Tag, ...]]] = {
    "kd_rows_fixed": ("float", ()),
    "kd_rows_annealed": ("Tensor", () if UNSAFE is None else (UNSAFE,)),
}


def _settings(given: Sequence[Operand]) -> RowSettings:
    """The settings among an op's arguments, where tensors may stand for numbers."""
    settings = RowSettings._make(given)
    return settings._replace(temperature=float(settings[0]), weight=float(settings[1]))


def _forward(*given: Operand) -> tuple[Tensor, Tensor]:
    return load(str(given[11])).forward(RowTensors._make(given[:7]), _settings(given[7:11]))


def _backward(grad: Tensor, *given: Operand) -> list[Tensor]:
    row_stats, backend, kinds = given[7], str(given[12]), str(given[13])
    assert isinstance(row_stats, Tensor)
    tensors, row_stats = _given_back(RowTensors._make(given[:7]), row_stats, kinds)
    first, last = load(backend).backward(grad, tensors, row_stats, _settings(given[8:12]))
    return [first] if last is None else [first, last]


def _fake_forward(student: Tensor, *_others: Operand) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    batch = student.shape[0]
    return (
        student.new_empty((batch, 2), dtype=dtype),
        student.new_empty((batch, 2, 8), dtype=dtype),
    )


def _fake_backward(
    _grad: Tensor, student: Tensor, student_end: Tensor | None, *_others: Operand
) -> list[Tensor]:
    return [s.new_empty(s.shape) for s in (student, student_end) if s is not None]


def _save(ctx: Context, inputs: tuple[Operand, ...], output: tuple[Tensor, Tensor]) -> None:
    row_stats = output[1]
    # Temperature and weight, inputs 7 and 8, are numbers or tensors.
    tensors = [each for each in inputs[:9] if each is None or isinstance(each, Tensor)]
    ctx.numbers = inputs[len(tensors) : 9]
    ctx.save_for_backward(row_stats, *tensors)
    ctx.others = *inputs[9:], kinds_of((*tensors[:7], row_stats))
    ctx.mark_non_differentiable(row_stats)
    ctx.set_materialize_grads(False)


def _refuse(ctx: Context, *_grads: Tensor | None) -> NoReturn:
    raise RuntimeError(ONCE)


def _define(name: str, number: str, tags: tuple[torch.Tag, ...]) -> None:
    settings = f"{number} temperature, {number} weight, int kind, float soft_scale, str backend"
    forward, backward = f"kdfast::{name}", f"kdfast::{name}_backward"

    def differentiate(
        ctx: Context, grad: Tensor | None, _grad_of_stats: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        row_stats, *inputs = ctx.saved_tensors
        if grad is None:
            return (None,) * 12
        op = getattr(torch.ops.kdfast, f"{name}_backward")
        grads = op(grad, *inputs[:7], row_stats, *inputs[7:], *ctx.numbers, *ctx.others)
        return grads[0], grads[1] if inputs[1] is not None else None, *(None,) * 10

    library = torch.library
    library.define(forward, f"({TENSORS}, {settings}) -> (Tensor, Tensor)", tags=tags)
    library.define(
        backward,
        f"(Tensor grad_row_loss, {TENSORS}, Tensor row_stats, {settings}, str kinds) -> Tensor[]",
        tags=tags,
    )
    library.impl(forward, "default", _forward)
    library.impl(backward, "default", _backward)
    library.register_fake(forward, _fake_forward)
    library.register_fake(backward, _fake_backward)
    library.register_autograd(forward, differentiate, setup_context=_save)
    library.register_autograd(backward, _refuse)


for name, (number, tags) in FORMS.items():
    _define(name, number, tags)


def rows_of_graph(
    tensors: RowTensors, settings: RowSettings, backend: str
) -> tuple[Tensor, Tensor]:
    """row_loss (B, 2) and row_stats (B, 2, 8) by a library op, for all that traces."""
    temperature, weight, kind, soft_scale = settings
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import has_static_value

        if not (has_static_value(temperature) and has_static_value(weight)):
            # A product, as torch.compile turns only the arithmetic of floats into that of tensors.
            one = torch.ones((), dtype=torch.float64)
            return torch.ops.kdfast.kd_rows_annealed(
                *tensors, one * temperature, one * weight, kind, soft_scale, backend
            )
    return torch.ops.kdfast.kd_rows_fixed(*tensors, *settings, backend)
