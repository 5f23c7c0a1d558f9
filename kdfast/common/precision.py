"""Which floating-point type the matrix products of a run use."""

import os
from collections.abc import Callable, Sequence

import torch

from kdfast.common.device import as_current
from kdfast.common.errors import UserError

AUTOCAST = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}
# What a GPU computes in by default: the first that model and card can.
PREFERRED = ("fp16", "bf16", "no")
# Model types that are refused in a precision, with the reason; all others are taken in all. The
# first DeBERTa's attention in transformers overflows in half precision. That of
# kdfast.models.deberta does not on random weights; on trained ones nobody has looked.
_UNTRIED = "nobody has tried it with trained weights"
CANNOT = {("deberta", "fp16"): _UNTRIED, ("deberta", "bf16"): _UNTRIED}


def works_in(model_type: str, precision: str) -> bool:
    """Whether models of that type compute in "no", "fp16" or "bf16" on a device that can."""
    return (model_type, precision) not in CANNOT


def why_not(precision: str, model_type: str, device: torch.device) -> str | None:
    """Why a model of that type cannot compute in a precision on a device; None: it can."""
    if not works_in(model_type, precision):
        return f"{model_type} is not computed in it ({CANNOT[model_type, precision]})"
    if precision == "bf16" and not _has_bf16(device):
        return f"{torch.cuda.get_device_name(device)} has no bf16 of its own"
    return None


def resolve(
    mixed_precision: str | None,
    device: torch.device,
    model_types: Sequence[str],
    log: Callable[[str], object] = lambda sentence: None,
    name: str = "--mixed_precision",
) -> str:
    """The precision in which models compute together.

    Args:
        mixed_precision: "no", "fp16" or "bf16". None, the default: "no" on a CPU, and on a GPU the
            first of "fp16", "bf16" and "no" that the models and the card can.
        device: Where they compute.
        model_types: Theirs, as config.json names them.
        log: Called with a sentence where the default on a GPU is not fp16.
        name: Of what is set, for messages.

    Returns:
        "no", "fp16" or "bf16".

    Raises:
        UserError: For one that a model or the card cannot compute in. A V100 only emulates bf16.
    """
    can = {}
    for each in PREFERRED:
        reasons = (why_not(each, model_type, device) for model_type in model_types)
        can[each] = next(filter(None, reasons), None)
    best = next(each for each in PREFERRED if can[each] is None)
    if mixed_precision is None and device.type == "cuda":
        if best != "fp16":
            log(f"{name} is {best}, not fp16: {can['fp16']}.")
        return best
    chosen = mixed_precision or "no"
    if reason := can[chosen]:
        raise UserError(f"{name} {chosen}: {reason}: leave it out or use {best}.")
    return chosen


def _has_bf16(device: torch.device) -> bool:
    """Whether the device computes in bf16 itself: on an older card torch would emulate it."""
    if device.type == "cpu":
        return True
    with as_current(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


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
