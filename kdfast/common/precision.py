"""Which floating-point type the matrix products of a run use."""

import operator
import os

import torch

from kdfast.common.errors import UserError

AUTOCAST = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def pick_device(number: int = 0) -> torch.device:
    """GPU `number` of those that CUDA_VISIBLE_DEVICES leaves, or the CPU where there is none."""
    return torch.device("cuda", number) if torch.cuda.is_available() else torch.device("cpu")


def device_of(device: str | int | torch.device | None) -> torch.device:
    """The device of that name; a number is that GPU, or the CPU where it is below 0 or there is
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
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
        reason = str(error).splitlines()[0]
        raise UserError(
            f"device {str(device)!r} cannot be used ({reason}): name another."
        ) from None


def resolve(mixed_precision: str | None, device: torch.device) -> str:
    """`no`, `fp16` or `bf16`; None becomes fp16 on a GPU and no on a CPU.

    Raises UserError for bf16 on a card that only emulates it, as a V100 does.
    """
    if mixed_precision is None:
        return "fp16" if device.type == "cuda" else "no"
    if (
        mixed_precision == "bf16"
        and device.type == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise UserError(
            f"--mixed_precision bf16: {torch.cuda.get_device_name(device)} has no bf16 of its "
            "own: use fp16."
        )
    return mixed_precision


def enable_determinism(device: torch.device) -> None:
    """Make torch choose kernels that give the same bits every time, and refuse those that cannot.

    Raises UserError on a GPU where cuBLAS has not been told to do so, which only its own
    environment variable can (docs.nvidia.com/cuda/cublas, "Results reproducibility").
    """
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    if device.type == "cuda" and workspace not in (":4096:8", ":16:8"):
        raise UserError(
            "--deterministic: cuBLAS gives the same bits only with CUBLAS_WORKSPACE_CONFIG=:4096:8 "
            "in the environment: start with it."
        )
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def teacher_precision(mixed_precision: str, device: torch.device) -> str:
    """The teacher's type: fp16 on a GPU unless the run is bf16; on a CPU, bf16 or none."""
    if device.type == "cuda":
        return "bf16" if mixed_precision == "bf16" else "fp16"
    return "bf16" if mixed_precision == "bf16" else "no"
