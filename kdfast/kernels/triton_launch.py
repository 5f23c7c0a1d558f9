"""Rows in Triton: for CUDA tensors where no CUDA compiler built the native rows.

`import triton` waits for the first tensor that asks, since it takes a second and may be missing.
The kernels are in `triton_kernels`, how they read memory in `triton_memory`; this file decides per
call what is compiled (the layouts, the block) and what is passed.
"""

import re
from collections.abc import Sequence
from contextlib import nullcontext
from ctypes import c_float
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

OLDEST = (3, 1)
# Elements of a block: 8 for each of 256 threads, so that student and teacher together keep four
# 16-byte loads of a thread in flight in fp32, within 64 registers. See tests/triton.
LARGEST_BLOCK = 2048
FRAMED, DENSE, STRIDED, NONE = 2, 1, 0, -1

Tensors = Sequence[Tensor | None]  # as kdfast.kernels.backends lists them
Settings = tuple[float, float, int, float]


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
def _kernels() -> Any:
    from kdfast.kernels import triton_kernels

    return triton_kernels


def _is_interpreted() -> bool:
    return type(_kernels().rows_forward).__name__ == "InterpretedFunction"


@dataclass(frozen=True, slots=True)
class Operand:
    """Start and end logits, or their gradient, as a kernel sees them: strides in elements."""

    tensor: Tensor  # the start logits
    end: Tensor  # found through stride_h; here so that it lives as long
    stride_b: int
    stride_l: int
    stride_h: int
    size: int  # bytes of an element
    first: int  # address of the start logits, in elements

    @classmethod
    def of(cls, start: Tensor, end: Tensor | None) -> "Operand":
        """Of one (B, L, 2) tensor, or of two (B, L)."""
        if end is None:
            start, end = start.unbind(-1)
        if start.stride() != end.stride():
            # One kernel argument serves both: heads that lie differently are worth a copy.
            start, end = start.contiguous(), end.contiguous()
        size = start.element_size()
        address = start.data_ptr()
        stride_b, stride_l = start.stride()
        stride_h = (end.data_ptr() - address) // size
        if start.shape[1] == 1:
            stride_l = 2 if stride_h == 1 else 1
        return cls(start, end, stride_b, stride_l, stride_h, size, address // size)

    @property
    def is_interleaved(self) -> bool:
        return self.stride_h == 1 and self.stride_l == 2


@dataclass(frozen=True, slots=True)
class Layout:
    """How the rows of a call lie in memory, of which kernels are compiled."""

    heads: int  # rows of a program
    unit: int  # elements, of the narrowest type, in 16 bytes
    is_ragged: bool  # not every row begins and ends at a 16-byte address
    offset: int  # the frame of window b begins (offset + b stride) % unit elements early
    stride: int
    each: tuple[int, ...]  # FRAMED, DENSE or STRIDED, for each operand
    elements: int  # of a block
    blocks: int  # that cover the longest frame

    @classmethod
    def of(cls, operands: list[Operand], length: int) -> "Layout":
        """Of operands that are read together: the first whose rows are dense gives the frame."""
        heads = 2 if all(operand.is_interleaved for operand in operands) else 1
        dense = [heads == 2 or operand.stride_l == 1 for operand in operands]
        unit = 16 // min(operand.size for operand in operands)
        offset = stride = 0
        if any(dense):
            lead = operands[dense.index(True)]
            offset, stride = lead.first % unit, lead.stride_b % unit
        framed = [
            is_dense
            # A frame that would part a pair is none.
            and offset % heads == stride % heads == 0
            and (operand.first - offset) % unit == 0
            and (operand.stride_b - stride) % unit == 0
            and (heads == 2 or operand.stride_h % unit == 0)
            for operand, is_dense in zip(operands, dense, strict=True)
        ]
        if not any(framed):
            offset = stride = 0
        each = tuple(
            FRAMED if is_framed else DENSE if is_dense else STRIDED
            for is_framed, is_dense in zip(framed, dense, strict=True)
        )
        width = length * heads
        is_ragged = any(framed) and bool(offset or stride or width % unit)
        longest = width + (unit - heads if offset or stride else 0)
        elements = min(LARGEST_BLOCK, max(64, 1 << (longest - 1).bit_length()))
        blocks = -(-longest // elements)
        return cls(heads, unit, is_ragged, offset, stride, each, elements, blocks)


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
    tensors: Tensors, settings: Settings, divisor: int | None = None
) -> tuple[Tensor, Tensor]:
    """row_loss (B, 2) or the loss, and row_stats (B, 2, 8), in one launch. See backends.py.

    row_stats: m_s, z_sT, z_s, m_t, z_tT, soft part, hard part, n of each row: maxima m and sums z
    of exp((logit - m)/T), without T in z_s, over the n positions that take part.
    """
    student = tensors[0]
    acc = torch.float64 if student.dtype == torch.float64 else torch.float32
    rows = (student.shape[0], 2)
    row_loss = torch.empty(rows, dtype=acc, device=student.device)
    row_stats = torch.empty((*rows, 8), dtype=acc, device=student.device)
    forward_launch(tensors, row_loss, row_stats, settings).run()
    return row_loss if divisor is None else row_loss.sum() / divisor, row_stats


def backward(
    grad_row_loss: Tensor,
    tensors: Tensors,
    row_stats: Tensor,
    settings: Settings,
    divisor: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The student's gradient and that of student_end, in one launch. See kdfast.kernels.backends.

    grad_row_loss: (B, 2), any strides, the type of row_stats. It is multiplied in before the one
    rounding to the student's type.
    """
    if divisor is not None:
        grad_row_loss = (grad_row_loss / divisor).expand(row_stats.shape[:2])
    student, student_end, *_ = tensors
    grad = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    grads = grad, None if student_end is None else torch.empty_like(grad)
    backward_launch(grad_row_loss, tensors, row_stats, grads, settings).run()
    return grads


def forward_launch(
    tensors: Tensors, row_loss: Tensor, row_stats: Tensor, settings: Settings
) -> Launch:
    """What `forward` runs."""
    student, student_end, teacher, teacher_end, *beside = tensors
    temperature, weight, kind, soft_scale = settings
    s = Operand.of(student, student_end)
    c = s if teacher is None else Operand.of(teacher, teacher_end)
    layout = Layout.of([s, c], student.shape[1])
    factor = soft_scale * (temperature**2 if kind == 0 else 1.0)
    return _launch(
        "rows_forward",
        layout,
        (student.shape[0] * 2 // layout.heads, 1),
        (*_seen(s), *_seen(c), *_beside(s, *beside), row_loss, row_stats),
        student.shape[1],
        (1.0 / temperature, factor, weight, 1.0 - weight),
        ACC=row_loss.dtype,
        KIND=kind,
        STUDENT=layout.each[0],
        TEACHER=layout.each[1],
        IS_SINGLE=layout.blocks == 1,
        HAS_TEACHER=teacher is not None,
        MASK=_mask_layout(beside[-1]),
        HAS_TEMPERATURE=temperature != 1.0,
    )


def backward_launch(
    grad_row_loss: Tensor,
    tensors: Tensors,
    row_stats: Tensor,
    grads: tuple[Tensor, Tensor | None],
    settings: Settings,
) -> Launch:
    """What `backward` runs."""
    student, student_end, teacher, teacher_end, *beside = tensors
    temperature, weight, kind, soft_scale = settings
    s, g = Operand.of(student, student_end), Operand.of(*grads)
    has_soft = teacher is not None and weight != 0
    c = Operand.of(teacher, teacher_end) if has_soft else s
    layout = Layout.of([s, c, g], student.shape[1])
    slope = weight * soft_scale * (temperature if kind == 0 else 2.0)
    return _launch(
        "rows_backward",
        layout,
        (student.shape[0] * 2 // layout.heads, layout.blocks),
        (
            *(*_seen(s), *_seen(c), *_seen(g), *_beside(s, *beside)),
            *(grad_row_loss, *grad_row_loss.stride(), row_stats),
        ),
        student.shape[1],
        (1.0 / temperature, slope, (1.0 - weight) / 2),
        ACC=row_stats.dtype,
        KIND=kind,
        STUDENT=layout.each[0],
        TEACHER=layout.each[1],
        GRAD=layout.each[2],
        HAS_SOFT=has_soft,
        HAS_HARD=weight != 1.0,
        MASK=_mask_layout(beside[-1]),
        HAS_TEMPERATURE=temperature != 1.0,
    )


def _seen(operand: Operand) -> tuple:
    return operand.tensor, operand.stride_b, operand.stride_l, operand.stride_h


def _beside(s: Operand, start: Tensor, end: Tensor, mask: Tensor | None) -> tuple:
    """Mask and targets with their strides. A mask that is none is a pointer never read."""
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
    tensors: tuple,
    length: int,
    numbers: tuple[float, ...],
    **constants,
) -> Launch:
    kernels = _kernels()
    is_double = constants["ACC"] == torch.float64
    constants["ACC"] = kernels.tl.float64 if is_double else kernels.tl.float32
    # A float is passed as fp32: for fp64 rows, with what that rounding lost beside it.
    kept = [c_float(number).value for number in numbers]
    lost = [n - k if is_double else 0.0 for n, k in zip(numbers, kept, strict=True)]
    floats = [part for both in zip(kept, lost, strict=True) for part in both]
    return Launch(
        getattr(kernels, name),
        grid,
        (*tensors, length, layout.offset, layout.stride, *floats),
        {
            **constants,
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
