"""Rows in C++ (csrc/, built into kdfast._C): on the CPU, and on CUDA where nvcc built them.

Nothing of torch is linked: what is passed is addresses and strides. The CPU rows take any strides
and any number of threads, and give the same bits whatever the number.
"""

import importlib
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}
Logits = Tensor | tuple[Tensor, Tensor]
STATS = 8  # numbers of row_stats for each row
ISAS = ("best", "portable", "avx2", "avx512")  # as numbered in csrc/kd_rows.h


def why_not(tensor: Tensor) -> str | None:
    """None where these rows can be computed for `tensor`, else the sentence that says why not."""
    return _why_not(tensor.device)


@cache
def _why_not(device: torch.device) -> str | None:
    module, fault = _loaded()
    if module is None:
        return fault
    if device.type == "cpu":
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return f"the native rows are for CPU and CUDA tensors, this one is on {device}"
    if not hasattr(module, "why_not_cuda"):
        return "kdfast._C was built without nvcc and has the CPU rows only"
    return module.why_not_cuda(_index(device))


@cache
def _loaded() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("kdfast._C"), None
    except ImportError as error:
        return None, f"the extension kdfast._C is missing or broken ({error}): reinstall kdfast"


def has_isa(isa: str) -> bool:
    """Whether this processor can run the CPU rows of `isa`, one of ISAS."""
    return isa == "best" or _loaded()[0].has_isa(ISAS.index(isa))


def built_architectures() -> str | None:
    """The CUDA architectures built in ("75,80+PTX", say); None for a build without CUDA."""
    module = _loaded()[0]
    return module.built_architectures() if hasattr(module, "built_architectures") else None


def forward(
    student: Logits,
    teacher: Logits | None,
    targets: tuple[Tensor, Tensor],
    mask: Tensor | None,
    *,
    temperature: float,
    weight: float,
    kind: int,
    soft_scale: float,
    divisor: int | None = None,
    threads: int | None = None,
    isa: str = "best",
) -> tuple[Tensor, Tensor]:
    """row_loss (B, 2) or the loss, and row_stats (B, 2, 8), as `kdfast.backends` says.

    threads: torch's number if None. isa: one of ISAS, for tests. Both matter on a CPU only.
    """
    first = student if isinstance(student, Tensor) else student[0]
    batch = first.shape[0]
    dtype = torch.float64 if first.dtype is torch.float64 else torch.float32
    row_stats = first.new_empty((batch, 2, STATS), dtype=dtype)
    # The CPU's rows are added up where they are computed; on a GPU another launch does it.
    is_sum_here = divisor is not None and first.device.type == "cpu"
    loss = first.new_empty(() if is_sum_here else (batch, 2), dtype=dtype)
    _loaded()[0].forward(
        *_inputs(student, teacher, targets, mask),
        temperature,
        weight,
        kind,
        soft_scale,
        0 if is_sum_here else loss.data_ptr(),
        row_stats.data_ptr(),
        *_place(first.device, threads, isa),
        divisor if is_sum_here else 1,
        loss.data_ptr() if is_sum_here else 0,
    )
    return loss if divisor is None or is_sum_here else loss.sum() / divisor, row_stats


def backward(
    grad_row_loss: Tensor,
    student: Logits,
    teacher: Logits | None,
    targets: tuple[Tensor, Tensor],
    mask: Tensor | None,
    row_stats: Tensor,
    *,
    temperature: float,
    weight: float,
    kind: int,
    soft_scale: float,
    interleaved: bool,
    divisor: int | None = None,
    threads: int | None = None,
    isa: str = "best",
) -> Logits:
    """The student's gradient, contiguous, as `kdfast.backends` says.

    grad_row_loss: (B, 2) of row_loss's dtype, any strides, or with a divisor the gradient of the
    loss. row_stats: as forward gave it.
    """
    first = student if interleaved else student[0]
    strides = grad_row_loss.stride()
    if divisor is not None:
        strides = (0, 0)
        if first.device.type != "cpu":
            grad_row_loss, divisor = grad_row_loss / divisor, None
    # empty_like is the fastest way to an empty tensor.
    grad = torch.empty_like(first, memory_format=torch.contiguous_format)
    grad_end = None if interleaved else torch.empty_like(grad)
    _loaded()[0].backward(
        *_inputs(student, teacher, targets, mask),
        temperature,
        weight,
        kind,
        soft_scale,
        row_stats.data_ptr(),
        grad_row_loss.data_ptr(),
        strides,
        grad.data_ptr(),
        0 if grad_end is None else grad_end.data_ptr(),
        *_place(first.device, threads, isa),
        1 if divisor is None else divisor,
    )
    return grad if interleaved else (grad, grad_end)


def _inputs(
    student: Logits,
    teacher: Logits | None,
    targets: tuple[Tensor, Tensor],
    mask: Tensor | None,
) -> tuple:
    """The first arguments of _C.forward and _C.backward; see csrc/bindings.cpp."""
    student, student_end = (student, None) if isinstance(student, Tensor) else student
    teacher, teacher_end = teacher if isinstance(teacher, (tuple, list)) else (teacher, None)
    start_positions, end_positions = targets
    return (
        student.shape[0],
        student.shape[1],
        student.data_ptr(),
        0 if student_end is None else student_end.data_ptr(),
        student.stride(),
        None if student_end is None else student_end.stride(),
        TYPES[student.dtype],
        0 if teacher is None else teacher.data_ptr(),
        0 if teacher_end is None else teacher_end.data_ptr(),
        None if teacher is None else teacher.stride(),
        None if teacher_end is None else teacher_end.stride(),
        2 if teacher is None else TYPES[teacher.dtype],
        start_positions.data_ptr(),
        start_positions.stride(0),
        start_positions.itemsize,
        end_positions.data_ptr(),
        end_positions.stride(0),
        end_positions.itemsize,
        0 if mask is None else mask.data_ptr(),
        None if mask is None else mask.stride(),
    )


def _place(device: torch.device, threads: int | None, isa: str) -> tuple[int, int, int, int]:
    """threads, isa, device and stream of a call."""
    if device.type == "cpu":
        return threads or torch.get_num_threads(), ISAS.index(isa), -1, 0
    index = _index(device)
    return 1, 0, index, torch.cuda.current_stream(index).cuda_stream


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
