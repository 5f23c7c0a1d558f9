"""The device that a program computes on: which, made the current one, out of memory."""

import operator
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import nn

from kdfast.common.errors import UserError

Model = TypeVar("Model", bound=nn.Module)
# What torch says where memory is refused by a library that has no error type of its own for it.
REFUSALS = (
    "DefaultCPUAllocator",
    "std::bad_alloc",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "could not create a memory object",  # oneDNN
)
# oneDNN's for room that it works in. (A "primitive descriptor" is another matter: no such kernel.)
ONEDNN_REFUSAL = "could not create a primitive"


def pick_device(number: int = 0) -> torch.device:
    """GPU `number` of those that CUDA_VISIBLE_DEVICES leaves, or the CPU where there is none."""
    return torch.device("cuda", number) if torch.cuda.is_available() else torch.device("cpu")


def device_of(device: str | int | torch.device | None) -> torch.device:
    """The CPU or GPU of that name; a number is that GPU, or the CPU where it is below 0 or there is
    no GPU; None is `pick_device`'s. Raises UserError for one that cannot be used."""
    if device is None:
        return pick_device()
    if not isinstance(device, (str, torch.device)):
        try:
            number = operator.index(device)
        except TypeError:
            raise UserError(f"device is {device!r}: give a number or a device.") from None
        device = pick_device(number) if number >= 0 else "cpu"
    try:
        found = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
        reason = str(error).splitlines()[0]
        raise UserError(
            f"device {str(device)!r} cannot be used ({reason}): name another."
        ) from None
    if found.type not in ("cpu", "cuda"):
        raise UserError(f"device {str(device)!r} is neither a CPU nor a GPU of CUDA: name another.")
    return found


def as_current(device: torch.device) -> AbstractContextManager[object]:
    """The device is the current one inside: events, streams and caches of torch.cuda are of that.

    Not around a `yield`: it would hold for the caller too.
    """
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def place(model: Model, device: torch.device) -> Model:
    """Move a model to the device. Raises UserError where memory does not suffice."""
    try:
        return model.to(device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    size = sum(each.nbytes for each in model.parameters()) / 2**30
    raise UserError(
        f"There is not enough memory on {device} for a model of {size:.2f} GiB: end what else is "
        "using it, or name a smaller model."
    )


def free_bytes(device: torch.device) -> int:
    """Memory of a GPU that is free, what torch holds in reserve included."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the host under a limit, refused memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return text == ONEDNN_REFUSAL or any(each in text for each in REFUSALS)
