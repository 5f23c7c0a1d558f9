"""Rows in C++ (csrc/, built into kdfast._C): on the CPU, and on CUDA where nvcc built them.

Nothing of torch is linked: what is passed is addresses and strides. The CPU rows take any strides
and any number of threads, and give the same bits with each.
"""

import importlib
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from kdfast.kernels.backends import RowSettings, RowTensors, sum_of_divided

TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}
STATS = 8  # numbers of row_stats for each row
REMEDY = "install a C++ compiler, such as g++, then kdfast again by pip install"
ISAS = ("best", "portable", "avx2", "avx512")  # as numbered in csrc/kd_rows.h


def why_not(tensor: Tensor) -> str | None:
    """None where these rows can be computed for `tensor`, else the sentence that says why not."""
    return _why_not(tensor.device)


@cache
def _why_not(device: torch.device) -> str | None:
    module = _loaded()
    if isinstance(module, str):
        return module
    if device.type == "cpu":
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return f"the native rows are for CPU and CUDA tensors, this one is on {device}"
    if not hasattr(module, "why_not_cuda"):
        return "kdfast._C was built without nvcc and has the CPU rows only"
    return module.why_not_cuda(_index(device))


@cache
def _loaded() -> ModuleType | str:
    """kdfast._C, or why there is none."""
    try:
        return importlib.import_module("kdfast._C")
    except ModuleNotFoundError:  # pip says success where no C++ compiler could build it
        fault = "was not built as kdfast was installed"
    except ImportError as error:
        fault = f"does not load ({error})"
    return f"the extension kdfast._C {fault}: {REMEDY}"


@cache
def _module() -> ModuleType:
    """kdfast._C, where `why_not` says that it is usable."""
    return importlib.import_module("kdfast._C")


def has_isa(isa: str) -> bool:
    """Whether this processor can run the CPU rows of `isa`, one of ISAS."""
    return isa == "best" or _module().has_isa(ISAS.index(isa))


def built_architectures() -> str | None:
    """The CUDA architectures built in ("75,80+PTX", say); None for a build without CUDA."""
    module = _module()
    return module.built_architectures() if hasattr(module, "built_architectures") else None


def forward(
    tensors: RowTensors,
    settings: RowSettings,
    divisor: int | None = None,
    *,
    threads: int | None = None,
    isa: str = "best",
) -> tuple[Tensor, Tensor]:
    """row_loss (B, 2) or the loss, and row_stats (B, 2, 8); see `Backend`.

    threads: torch's number if None. isa: one of ISAS, for tests. Both matter on a CPU only.
    """
    student = tensors[0]
    rows = (student.shape[0], 2)
    dtype = torch.float64 if student.dtype is torch.float64 else torch.float32
    row_stats = student.new_empty((*rows, STATS), dtype=dtype)
    # The CPU's rows are added up where they are computed; on a GPU, where they are divided already,
    # another launch does it.
    is_sum_here = divisor is not None and student.is_cpu
    loss = student.new_empty(() if is_sum_here else rows, dtype=dtype)
    _module().forward(
        *_inputs(*tensors),
        *settings,
        0 if is_sum_here else loss.data_ptr(),
        row_stats.data_ptr(),
        *_place(student, threads, isa),
        1 if divisor is None else divisor,
        loss.data_ptr() if is_sum_here else 0,
    )
    if divisor is not None and not is_sum_here:
        loss = sum_of_divided(loss, divisor)
    return loss, row_stats


def backward(
    grad_row_loss: Tensor,
    tensors: RowTensors,
    row_stats: Tensor,
    settings: RowSettings,
    divisor: int | None = None,
    *,
    threads: int | None = None,
    isa: str = "best",
) -> tuple[Tensor, Tensor | None]:
    """The student's gradient, contiguous, and that of student_end; see `Backend`.

    grad_row_loss: (B, 2) of row_loss's dtype, any strides, or with a divisor the gradient of the
    loss. row_stats: as forward gave it.
    """
    student, student_end, *_ = tensors
    # empty_like is the fastest way to an empty tensor.
    grad = torch.empty_like(student, memory_format=torch.contiguous_format)
    grad_end = None if student_end is None else torch.empty_like(grad)
    _module().backward(
        *_inputs(*tensors),
        *settings,
        row_stats.data_ptr(),
        grad_row_loss.data_ptr(),
        grad_row_loss.stride() if divisor is None else (0, 0),
        grad.data_ptr(),
        0 if grad_end is None else grad_end.data_ptr(),
        *_place(student, threads, isa),
        1 if divisor is None else divisor,
    )
    return grad, grad_end


def _inputs(
    student: Tensor,
    student_end: Tensor | None,
    teacher: Tensor | None,
    teacher_end: Tensor | None,
    start_positions: Tensor,
    end_positions: Tensor,
    mask: Tensor | None,
) -> tuple:
    """The first arguments of _C.forward and _C.backward; see csrc/bindings.cpp."""
    return (
        student.shape,
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
        start_positions.stride(),
        start_positions.itemsize,
        end_positions.data_ptr(),
        end_positions.stride(),
        end_positions.itemsize,
        0 if mask is None else mask.data_ptr(),
        None if mask is None else mask.stride(),
    )


def _place(student: Tensor, threads: int | None, isa: str) -> tuple[int, int, int, int]:
    """threads, isa, device and stream of a call."""
    if student.is_cpu:
        return threads or torch.get_num_threads(), ISAS.index(isa), -1, 0
    index = _index(student.device)
    return 1, 0, index, torch.cuda.current_stream(index).cuda_stream


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
