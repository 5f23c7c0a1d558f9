"""Rows in Triton: for CUDA tensors where no CUDA compiler built the native rows.

Triton is imported for the first tensor that needs it, since that takes a second and may fail.
The kernels are in `triton_kernels`, how they read memory in `triton_memory`; `triton_layout`
decides for each call which layouts and block are compiled, and this file what is passed.
"""

import re
from contextlib import nullcontext
from ctypes import c_float
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kdfast.kernels.backends import RowSettings, RowTensors, sum_of_divided
from kdfast.kernels.triton_layout import DENSE, NONE, STRIDED, Layout, Operand

OLDEST = (3, 1)


def why_not(tensor: Tensor) -> str | None:
    """None where these rows can be computed for `tensor`, else the sentence that says why not."""
    fault = _why_no_triton()
    if fault is not None:
        return fault
    if _is_interpreted():
        if tensor.device.type == "cpu":
            return None
        return (
            f"Triton's interpreter is on and computes CPU tensors, this one is on {tensor.device}"
        )
    if tensor.device.type != "cuda":
        return f"Triton's rows are for CUDA tensors, this one is on {tensor.device}"
    if torch.version.hip is None and torch.cuda.get_device_capability(tensor.device) < (7, 0):
        return f"Triton needs a card of compute capability 7.0, {tensor.device} has less"
    return None


@cache
def _why_no_triton() -> str | None:
    try:
        import triton
    except ImportError as fault:
        return f"Triton cannot be imported ({fault}): pip install triton"
    found = tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:2])
    if found < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return f"Triton {triton.__version__} is too old, expected {oldest} or newer"
    return None


@cache
def _kernels() -> ModuleType:
    from kdfast.kernels import triton_kernels

    return triton_kernels


def _is_interpreted() -> bool:
    return type(_kernels().rows_forward).__name__ == "InterpretedFunction"


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel and all that it is given; the tests compile it for cards that are not here."""

    kernel: Any
    grid: tuple[int, int]
    arguments: tuple  # in the kernel's order
    constants: dict[str, Any]
    options: dict[str, Any]

    def run(self) -> None:
        if self.grid[0] == 0:
            return
        student = self.arguments[0]
        with torch.cuda.device(student.device) if student.is_cuda else nullcontext():
            self.kernel[self.grid](*self.arguments, **self.constants, **self.options)


def forward(
    tensors: RowTensors, settings: RowSettings, divisor: int | None = None
) -> tuple[Tensor, Tensor]:
    """row_loss (B, 2) in one launch or the loss in two, and row_stats (B, 2, 8). See `Backend`.

    row_stats: m_s, z_sT, z_s, m_t, z_tT, soft part, hard part, n of each row: maxima m and sums z
    of exp((logit - m)/T), without T in z_s, over the n positions that take part.
    """
    student = tensors[0]
    acc = torch.float64 if student.dtype == torch.float64 else torch.float32
    rows = (student.shape[0], 2)
    row_loss = torch.empty(rows, dtype=acc, device=student.device)
    row_stats = torch.empty((*rows, 8), dtype=acc, device=student.device)
    forward_launch(tensors, row_loss, row_stats, settings, divisor or 1).run()
    return row_loss if divisor is None else sum_of_divided(row_loss, divisor), row_stats


def backward(
    grad_row_loss: Tensor,
    tensors: RowTensors,
    row_stats: Tensor,
    settings: RowSettings,
    divisor: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The student's gradient and that of student_end, in one launch. See `Backend`.

    grad_row_loss: (B, 2), any strides, the type of row_stats. It is multiplied in before the one
    rounding to the student's type.
    """
    if divisor is not None:
        grad_row_loss = grad_row_loss.expand(row_stats.shape[:2])
    student, student_end, *_ = tensors
    grad = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    grads = grad, None if student_end is None else torch.empty_like(grad)
    backward_launch(grad_row_loss, tensors, row_stats, grads, settings, divisor or 1).run()
    return grads


def forward_launch(
    tensors: RowTensors,
    row_loss: Tensor,
    row_stats: Tensor,
    settings: RowSettings,
    divisor: int = 1,
) -> Launch:
    """What `forward` runs. divisor: of row_loss, by way of the weights of its parts."""
    student, student_end, teacher, teacher_end, start, end, mask = tensors
    temperature, weight, kind, soft_scale = settings
    s = Operand.of(student, student_end)
    c = s if teacher is None else Operand.of(teacher, teacher_end)
    layout = Layout.of([s, c], student.shape[1])
    factor = soft_scale * (temperature**2 if kind == 0 else 1.0)
    return _launch(
        "rows_forward",
        layout,
        (student.shape[0] * 2 // layout.heads, 1),
        (
            *(*s.arguments, *c.arguments, *_mask_and_targets(s, start, end, mask)),
            *(row_loss, row_stats, student.shape[1]),
        ),
        (1.0 / temperature, factor, weight / divisor, (1.0 - weight) / divisor),
        ACC=row_loss.dtype,
        KIND=kind,
        STUDENT=layout.each[0],
        TEACHER=layout.each[1],
        IS_SINGLE=layout.blocks == 1,
        HAS_TEACHER=teacher is not None,
        MASK=_mask_layout(mask),
        HAS_TEMPERATURE=temperature != 1.0,
    )


def backward_launch(
    grad_row_loss: Tensor,
    tensors: RowTensors,
    row_stats: Tensor,
    grads: tuple[Tensor, Tensor | None],
    settings: RowSettings,
    divisor: int = 1,
) -> Launch:
    """What `backward` runs. divisor: of the gradient, by way of the slopes of its terms."""
    student, student_end, teacher, teacher_end, start, end, mask = tensors
    temperature, weight, kind, soft_scale = settings
    s, g = Operand.of(student, student_end), Operand.of(*grads)
    has_soft = teacher is not None and weight != 0
    c = s if teacher is None or not has_soft else Operand.of(teacher, teacher_end)
    layout = Layout.of([s, c, g], student.shape[1])
    slope = weight * soft_scale * (temperature if kind == 0 else 2.0)
    return _launch(
        "rows_backward",
        layout,
        (student.shape[0] * 2 // layout.heads, layout.blocks),
        (
            *(*s.arguments, *c.arguments, *g.arguments),
            *_mask_and_targets(s, start, end, mask),
            *(grad_row_loss, *grad_row_loss.stride(), row_stats, student.shape[1]),
        ),
        (1.0 / temperature, slope / divisor, (1.0 - weight) / 2 / divisor),
        ACC=row_stats.dtype,
        KIND=kind,
        STUDENT=layout.each[0],
        TEACHER=layout.each[1],
        GRAD=layout.each[2],
        HAS_SOFT=has_soft,
        HAS_HARD=weight != 1.0,
        MASK=_mask_layout(mask),
        HAS_TEMPERATURE=temperature != 1.0,
    )


def _mask_and_targets(s: Operand, start: Tensor, end: Tensor, mask: Tensor | None) -> tuple:
    """Mask and targets with their strides. Without a mask its pointer is never read."""
    seen = (s.tensor, 0, 0) if mask is None else (mask, *mask.stride())
    return (*seen, start, start.stride(0), end, end.stride(0))


def _mask_layout(mask: Tensor | None) -> int:
    if mask is None:
        return NONE
    return DENSE if mask.stride(1) == 1 else STRIDED


def _launch(
    name: str,
    layout: Layout,
    grid: tuple[int, int],
    arguments: tuple,
    numbers: tuple[float, ...],
    **constants: int | bool | torch.dtype,
) -> Launch:
    """The launch of a kernel. arguments: those before `frame_offset`. numbers: those behind."""
    kernels = _kernels()
    is_double = constants.pop("ACC") == torch.float64
    # A float is passed as fp32: for fp64 rows, with what that rounding lost.
    kept = [c_float(number).value for number in numbers]
    lost = [n - k if is_double else 0.0 for n, k in zip(numbers, kept, strict=True)]
    floats = [part for both in zip(kept, lost, strict=True) for part in both]
    return Launch(
        getattr(kernels, name),
        grid,
        (*arguments, layout.offset, layout.stride, *floats),
        {
            **constants,
            "ACC": kernels.tl.float64 if is_double else kernels.tl.float32,
            "BLOCK": layout.elements // layout.heads,
            "HEADS": layout.heads,
            "UNIT": layout.unit,
            "RAGGED": layout.is_ragged,
        },
        {
            "num_warps": max(1, layout.elements // (128 if is_double else 256)),
            "num_stages": 1,
            # A multiply and an add may be one rounding; Triton's default differs by version.
            "enable_fp_fusion": True,
        },
    )
