"""The checks of the loss's arguments: each fault gives one sentence, a good call pays little.

They run on every call of a loss that itself takes microseconds. So every check is one condition
over plain attributes, and what the sentence says is worked out only once it has failed.
"""

import sys
from typing import NoReturn

import torch
from torch import Tensor

from kdfast.kernels.backends import RowSettings, RowTensors

Logits = Tensor | tuple[Tensor, Tensor]

DISTANCES = ("kl_div", "mse")
CONVENTIONS = ("haystack", "hf")
FLOATS = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
POSITIONS = frozenset((torch.int64, torch.int32))
BOOLEAN = frozenset((torch.bool,))
LONGEST = 2**31 - 1
LARGEST = sys.float_info.max
STRIDED = torch.strided


def check_name(argument: str, given: str, known: tuple[str, ...]) -> None:
    """Raises ValueError unless `given` is one of `known`."""
    if given not in known:
        raise ValueError(f"{argument} is {given!r}, expected one of {', '.join(map(repr, known))}")


def check_settings(
    temperature: float, distillation_loss_weight: float, distillation_loss: str, convention: str
) -> RowSettings:
    """The settings of `fused_kd_loss` as a backend takes them.

    Raises ValueError for one that it does not know.
    """
    # A tensor would have to be read, which makes the host wait for the device.
    if not isinstance(temperature, (float, int)):
        _refuse_number("temperature", temperature)
    if not isinstance(distillation_loss_weight, (float, int)):
        _refuse_number("distillation_loss_weight", distillation_loss_weight)
    if not 0 < temperature <= LARGEST:
        raise ValueError(f"temperature is {temperature}, expected a finite number above 0")
    if not 0 <= distillation_loss_weight <= 1:
        raise ValueError(
            f"distillation_loss_weight is {distillation_loss_weight}, expected 0 to 1 inclusive"
        )
    if distillation_loss not in DISTANCES:
        check_name("distillation_loss", distillation_loss, DISTANCES)
    if convention not in CONVENTIONS:
        check_name("convention", convention, CONVENTIONS)
    kind = DISTANCES.index(distillation_loss)
    soft_scale = 1.0 if kind == 0 and convention == "haystack" else 0.5
    return RowSettings(temperature, distillation_loss_weight, kind, soft_scale)


def check_tensors(
    student: Logits,
    teacher: Logits | None,
    start_positions: Tensor,
    end_positions: Tensor,
    mask: Tensor | None,
    distillation_loss_weight: float,
) -> RowTensors:
    """The tensors of `fused_kd_loss` as a backend takes them.

    Raises ValueError for one that is not as `fused_kd_loss` says.
    """
    first, end = _check_logits("student", student)
    shape = first.shape
    batch, length = shape[0], shape[1]
    if length == 0:
        raise ValueError("the student's logits have L = 0 positions, expected at least one")
    if length > LONGEST or batch > LONGEST:
        raise ValueError(
            f"the student's logits have (B, L) = {(batch, length)}, expected neither above "
            f"{LONGEST}"
        )
    device = first.device
    other = other_end = None
    if teacher is not None:
        other, other_end = _check_logits("teacher", teacher)
        shape = other.shape
        if shape[0] != batch or shape[1] != length or other.device != device:
            _refuse_teacher(other, first)
        if other.requires_grad or (other_end is not None and other_end.requires_grad):
            raise ValueError(
                "the teacher's logits require grad, expected logits computed under "
                "torch.no_grad() or detached"
            )
    elif distillation_loss_weight > 0:
        raise ValueError(
            f"teacher logits are None with distillation_loss_weight {distillation_loss_weight}, "
            "expected logits, or weight 0 to train on positions alone"
        )
    _check_other("start_positions", start_positions, POSITIONS, (batch,), device)
    _check_other("end_positions", end_positions, POSITIONS, (batch,), device)
    if mask is not None:
        _check_other("mask", mask, BOOLEAN, (batch, length), device)
    return RowTensors(first, end, other, other_end, start_positions, end_positions, mask)


def _check_logits(whose: str, logits: Logits) -> tuple[Tensor, Tensor | None]:
    """One (B, L, 2) tensor and None, or the two (B, L) tensors of a pair."""
    if isinstance(logits, Tensor):
        if not _is_dense(logits) or logits.dim() != 3 or logits.shape[2] != 2:
            _refuse_logits(whose, logits)
        return logits, None
    if (
        not isinstance(logits, (tuple, list))
        or len(logits) != 2
        or not isinstance(logits[0], Tensor)
        or not isinstance(logits[1], Tensor)
    ):
        _refuse_logits(whose, logits)
    first, last = logits
    if (
        not _is_dense(first)
        or not _is_dense(last)
        or first.dim() != 2
        or last.dim() != 2
        or first.shape[0] != last.shape[0]
        or first.shape[1] != last.shape[1]
        or first.dtype != last.dtype
        or first.device != last.device
    ):
        _refuse_logits(whose, logits)
    return first, last


def _is_dense(logits: Tensor) -> bool:
    return (
        logits.layout is STRIDED
        and logits.dtype in FLOATS
        and not logits.is_nested
        and not logits.is_meta
    )


def _check_other(
    argument: str,
    given: Tensor,
    dtypes: frozenset[torch.dtype],
    shape: tuple[int, ...],
    device: torch.device,
) -> None:
    """Raises ValueError unless positions or a mask have this dtype, shape and device."""
    if (
        not isinstance(given, Tensor)
        or given.dtype not in dtypes
        # Number by number: comparing whole shapes would fix them in a graph of dynamic ones.
        or given.dim() != len(shape)
        or (own := given.shape)[0] != shape[0]
        or own[-1] != shape[-1]
        or given.layout is not STRIDED
        or given.device != device
    ):
        _refuse_other(argument, given, dtypes, shape, device)


def _refuse_number(argument: str, given: object) -> NoReturn:
    raise ValueError(f"{argument} is a {type(given).__name__}, expected a Python float")


def _refuse_logits(whose: str, logits: object) -> NoReturn:
    """Raises the ValueError of logits that are known to be wrong."""
    form = "expected one (B, L, 2) tensor or a (start, end) pair of (B, L) tensors"
    is_pair = isinstance(logits, (tuple, list))
    given = tuple(logits) if isinstance(logits, (tuple, list)) else (logits,)
    tensors = [tensor for tensor in given if isinstance(tensor, Tensor)]
    if len(tensors) != len(given) or len(tensors) != (2 if is_pair else 1):
        kinds = ", ".join(type(each).__name__ for each in given)
        raise ValueError(f"the {whose}'s logits are {f'({kinds})' if is_pair else kinds}, {form}")
    for tensor in tensors:
        if tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta:
            what = "a nested tensor" if tensor.is_nested else f"{tensor.layout} on {tensor.device}"
            raise ValueError(f"the {whose}'s logits are {what}, expected dense tensors with data")
        if tensor.dtype not in FLOATS:
            raise ValueError(
                f"the {whose}'s logits are {tensor.dtype}, expected float16, bfloat16, float32 "
                "or float64"
            )
    first, last = tensors[0], tensors[-1]
    one = not is_pair and first.dim() == 3 and first.shape[2] == 2
    two = is_pair and first.dim() == 2 and first.shape == last.shape
    if not (one or two):
        shapes = " and ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise ValueError(f"the {whose}'s logits have shape {shapes}, {form}")
    raise ValueError(
        f"the {whose}'s start logits are {first.dtype} on {first.device} and its end logits "
        f"{last.dtype} on {last.device}, expected the same for both"
    )


def _refuse_teacher(teacher: Tensor, student: Tensor) -> NoReturn:
    if teacher.shape[:2] != student.shape[:2]:
        raise ValueError(
            f"the teacher's logits have (B, L) = {tuple(teacher.shape[:2])}, expected the "
            f"student's {tuple(student.shape[:2])}"
        )
    raise ValueError(
        f"the teacher's logits are on {teacher.device}, expected the student's {student.device}"
    )


def _refuse_other(
    argument: str,
    given: object,
    dtypes: frozenset[torch.dtype],
    shape: tuple[int, ...],
    device: torch.device,
) -> NoReturn:
    if not isinstance(given, Tensor) or given.dtype not in dtypes or given.shape != shape:
        what = type(given).__name__
        if isinstance(given, Tensor):
            what = f"{given.dtype} of shape {tuple(given.shape)}"
        names = " or ".join(sorted(map(str, dtypes), reverse=True))
        raise ValueError(f"{argument} is {what}, expected {names} of shape {shape}")
    if given.layout != torch.strided:
        raise ValueError(f"{argument} is {given.layout}, expected a dense tensor")
    raise ValueError(f"{argument} is on {given.device}, expected the student's {device}")
