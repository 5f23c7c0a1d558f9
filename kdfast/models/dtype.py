"""The type of numbers that a Reader's model computes in, by transformers' names for them."""

from pathlib import Path

import torch
from safetensors import safe_open

from kdfast.common.errors import UserError
from kdfast.common.files import listed, read_json_object
from kdfast.common.precision import AUTOCAST, resolve, why_not
from kdfast.models.hub import local_folder
from kdfast.models.load import Loaded

PRECISION_OF = {"float32": "no", "float16": "fp16", "bfloat16": "bf16"}
OF_SAFETENSORS = {"F16": "float16", "BF16": "bfloat16"}


def asked_precision(dtype: str | torch.dtype | None, mixed_precision: str | None) -> str | None:
    """ "no", "fp16", "bf16" or "auto", as two arguments ask for it, or None.

    Raises UserError for one that does not exist, and where the two disagree.
    """
    if mixed_precision not in (None, *AUTOCAST):
        known = ", ".join(AUTOCAST)
        raise UserError(f"mixed_precision is {mixed_precision!r}: give one of {known}.")
    if dtype is None:
        return mixed_precision
    name = str(dtype).removeprefix("torch.")
    asked = "auto" if name == "auto" else PRECISION_OF.get(name)
    if asked is None:
        known = ", ".join(PRECISION_OF)
        raise UserError(f"dtype is {dtype!r}: give one of {known} or auto.")
    if mixed_precision not in (None, asked):
        raise UserError(
            f"dtype is {name} and mixed_precision is {mixed_precision}: give one of the two."
        )
    return asked


def change_type(
    loaded: Loaded, name: str | None, asked: str | None, device: torch.device
) -> torch.dtype | None:
    """Make the model compute in what is asked for, in place.

    Args:
        loaded: The model; a note is added where "auto" cannot be followed.
        name: Its folder or hub id. None: a model of transformers, which keeps its type by default.
        asked: What asked_precision gives.
        device: Where it will compute.

    Returns:
        Autocast's type, or None.

    Raises:
        UserError: The model or the device does not compute in it.
    """
    model_type = loaded.model.reader.config.model_type
    if asked in ("auto", None) and name is None:
        return None
    if asked == "auto":
        saved = saved_type(local_folder(str(name), "model"))
        asked = PRECISION_OF.get(saved, "no")
        if reason := why_not(asked, model_type, device):
            loaded.notes.append(f"{name} is saved in {saved}, and computes in float32: {reason}.")
            asked = "no"
    precision = resolve(asked or "no", device, [model_type], name="precision")
    dtype = AUTOCAST[precision]
    loaded.model.float()
    if dtype is not None:
        loaded.model.cast_linear_layers(dtype)
    return dtype


def saved_type(folder: Path) -> str:
    """The type of a model folder's weights: its config.json's, or the first weights' own."""
    config = read_json_object(folder / "config.json")
    if named := config.get("dtype") or config.get("torch_dtype"):
        return str(named).removeprefix("torch.")
    with safe_open(listed(folder, "*.safetensors")[0], "pt") as file:
        kinds = [file.get_slice(key).get_dtype() for key in file.keys()]  # noqa: SIM118, no dict
    return next((OF_SAFETENSORS[kind] for kind in kinds if kind in OF_SAFETENSORS), "float32")
