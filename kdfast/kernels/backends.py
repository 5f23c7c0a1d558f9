"""Which backend computes the rows of a call. A row is the start or the end logits of one window.

A backend is a module with the functions of `Backend`; it knows tensors, not text. `reference` is a
choice too but no such module: plain autograd goes through it.
"""

import functools
import importlib
import warnings
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor


class RowTensors(NamedTuple):
    """The tensors of a call, as `kdfast.fused_kd_loss` describes them, checked.

    One (B, L, 2) tensor of logits has no `_end`; a pair of (B, L) tensors has.
    """

    student: Tensor
    student_end: Tensor | None
    teacher: Tensor | None
    teacher_end: Tensor | None
    start_positions: Tensor
    end_positions: Tensor
    mask: Tensor | None


class RowSettings(NamedTuple):
    """The numbers of a call.

    weight: distillation_loss_weight. kind: 0 kl_div, 1 mse. soft_scale: by what T^2 KL or T^2 mse
    of a row is multiplied to give its soft part.
    """

    temperature: float
    weight: float
    kind: int
    soft_scale: float


class Backend(Protocol):
    """What a module of this folder offers to be a backend."""

    def why_not(self, tensor: Tensor) -> str | None:
        """None: usable for tensors like this one. Else the sentence that the user reads."""

    def forward(
        self, tensors: RowTensors, settings: RowSettings, divisor: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """row_loss (B, 2), or with a divisor row_loss.sum() / divisor; and row_stats (B, 2, 8).

        row_stats: maxima and sums of exponentials, enough for backward; then the soft and the hard
        part of the row; last the number of positions that took part. Both results are fp32, or
        fp64 for an fp64 student.
        """

    def backward(
        self,
        grad_row_loss: Tensor,
        tensors: RowTensors,
        row_stats: Tensor,
        settings: RowSettings,
        divisor: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The gradients of student and student_end, contiguous.

        grad_row_loss: (B, 2), any strides; with a divisor the gradient of the scalar, which the
        divisor is yet to divide.
        """


def sum_of_divided(row_loss: Tensor, divisor: int) -> Tensor:
    """The sum of row losses that a kernel has divided; of no rows 0 / 0 is NaN, as in torch."""
    total = row_loss.sum()
    return total if divisor else total / divisor


MODULES = {"native": "kdfast.kernels.native", "triton": "kdfast.kernels.triton_launch"}
NAMES = ("reference", *MODULES)


def choose(student: Tensor, backend: str | None) -> str:
    """The name of the backend that computes the rows of `student`.

    The only place that decides by hardware: CUDA takes native, else triton, else the reference;
    any other device takes native, else the reference. It warns once of a fallback.

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
vars(choose_while_tracing)["_dynamo_marked_constant"] = True


def why_not(name: str, tensor: Tensor) -> str | None:
    """None where the backend `name` can take tensors like this one, else the sentence why not."""
    if name == "reference":
        return None
    found = _imported(name)
    return found if isinstance(found, str) else found.why_not(tensor)


def load(name: str) -> Backend:
    """The module of a usable backend other than the reference."""
    return cast(Backend, _imported(name))


@functools.cache
def _imported(name: str) -> Backend | str:
    """The module, or why not. On first use: Triton is imported where a GPU tensor asks for it."""
    try:
        return cast(Backend, importlib.import_module(MODULES[name]))
    # Whatever a broken installation raises, the reference still computes the loss.
    except Exception as error:
        return f"{MODULES[name]} cannot be imported ({type(error).__name__}: {error})"


def _fall_back(student: Tensor, refused: str) -> str:
    if student.device.type == "cuda":
        also_refused = why_not("triton", student)
        if also_refused is None:
            _warn_once(f"kdfast computes the loss with Triton, as native is not usable: {refused}")
            return "triton"
        refused = f"{refused}; nor is triton: {also_refused}"
    _warn_once(
        f"kdfast computes the loss in plain PyTorch, many times slower, as native is not usable: "
        f"{refused} (python -m kdfast.doctor says more)"
    )
    return "reference"


@functools.cache
def _warn_once(sentence: str) -> None:
    warnings.warn(sentence, RuntimeWarning, stacklevel=6)
