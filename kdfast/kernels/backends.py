"""Ways to compute rows. A row is the start logits, or the end logits, of one window.

A backend is a module of three functions; it knows tensors, not text.

why_not(tensor) -> str | None
    None: usable for tensors like this one. Else the sentence that the user reads.
forward(tensors, settings, divisor=None) -> (row_loss (B, 2), row_stats (B, 2, 8)); with a divisor
    (row_loss.sum() / divisor, row_stats)
    tensors: (student, student_end, teacher, teacher_end, start_positions, end_positions, mask), as
    `kdfast.fused_kd_loss` has them, checked. One (B, L, 2) tensor of logits has no `_end`.
    settings: (temperature, weight, kind, soft_scale). kind: 0 kl_div, 1 mse. soft_scale: by what
    T^2 KL or T^2 mse of a row is multiplied to give its soft part.
    row_stats: maxima and sums of exponentials, enough for backward; then the soft and the hard
    part of the row; last the number of positions that took part.
    Both are fp32, or fp64 for an fp64 student.
backward(grad_row_loss, tensors, row_stats, settings, divisor=None) -> the student's gradient and
    that of student_end, or None, contiguous
    grad_row_loss: (B, 2), any strides; with a divisor the gradient of the scalar, which the
    divisor is yet to divide.

`reference` is a choice beside them but no such module: plain autograd goes through it.
"""

import functools
import importlib
import warnings
from types import ModuleType

import torch
from torch import Tensor

MODULES = {"native": "kdfast.kernels.native", "triton": "kdfast.kernels.triton_launch"}
NAMES = ("reference", *MODULES)


def choose(student: Tensor, backend: str | None) -> str:
    """The name of the backend that computes the rows of `student`.

    The only place that decides by hardware: CUDA takes native, else triton, else the reference;
    any other device takes native, else the reference. A fallback is said once, as a warning.

    Raises ValueError for a backend that is not usable for this tensor.
    """
    if backend is None:
        refused = why_not("native", student)
        return "native" if refused is None else _fall_back(student, refused)
    if backend not in NAMES:
        usable = ", ".join(repr(name) for name in NAMES if why_not(name, student) is None)
        raise ValueError(
            f"backend is {backend!r}, expected None or one that is usable for a tensor on "
            f"{student.device.type}: {usable}"
        )
    refused = why_not(backend, student)
    if refused is not None:
        raise ValueError(f"backend {backend!r} is not usable here: {refused}")
    return backend


def choose_while_tracing(device: torch.device, dtype: torch.dtype, backend: str | None) -> str:
    """`choose` for torch.compile: run while it traces, its answer a constant of the graph."""
    return choose(torch.empty(0, dtype=dtype, device=device), backend)


# What torch.compiler.assume_constant_result sets. Calling that would import torch._dynamo here,
# three seconds for everybody who compiles nothing.
choose_while_tracing._dynamo_marked_constant = True


def why_not(name: str, tensor: Tensor) -> str | None:
    """None where the backend `name` can take tensors like this one, else the sentence why not."""
    if name == "reference":
        return None
    module, refused = _imported(name)
    return refused if module is None else module.why_not(tensor)


def load(name: str) -> ModuleType:
    """The module of a usable backend other than the reference."""
    return _imported(name)[0]


@functools.cache
def _imported(name: str) -> tuple[ModuleType | None, str | None]:
    """The module, or why not. On first use: Triton is imported where a GPU tensor asks for it."""
    try:
        return importlib.import_module(MODULES[name]), None
    # Whatever a broken installation raises, the reference still computes the loss.
    except Exception as error:
        return None, f"{MODULES[name]} cannot be imported ({type(error).__name__}: {error})"


def _fall_back(student: Tensor, refused: str) -> str:
    if student.device.type == "cuda":
        also_refused = why_not("triton", student)
        if also_refused is None:
            _say_once(f"kdfast computes the loss with Triton, as native is not usable: {refused}")
            return "triton"
        refused = f"{refused}; nor is triton: {also_refused}"
    _say_once(
        f"kdfast computes the loss in plain PyTorch, many times slower, as native is not usable: "
        f"{refused} (python -m kdfast.doctor says more)"
    )
    return "reference"


@functools.cache
def _say_once(sentence: str) -> None:
    warnings.warn(sentence, RuntimeWarning, stacklevel=6)
