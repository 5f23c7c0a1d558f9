"""`python -m kdfast.doctor --convert`: pickled weights to safetensors, in a process of their own.

A pickle may name any function, which is called as it is read. torch's weights_only refuses all but
what tensors are made of. Should that fail, the code runs in a process that has nothing else in its
memory: this module as a program.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download

from kdfast.common.errors import UserError
from kdfast.common.files import (
    listed,
    open_file,
    read_json_object,
    write_bytes,
    write_tensors,
)
from kdfast.common.folders import even_modes, fresh_folder, rename, scratch_folder, sync_folder
from kdfast.models.checks import MODEL_FILE, nonfinite_weight
from kdfast.models.hub import HUB_ERRORS, MODEL_FILES, PICKLES

INDEX = "pytorch_model.bin.index.json"
SAFE_TORCH = (2, 6)  # weights_only of earlier ones can be made to run code (CVE-2025-32434)


def convert(name: str, output_dir: str | None = None) -> Path:
    """Write pickled weights as model.safetensors. Nothing is overwritten.

    Args:
        name: A model's folder or hub id.
        output_dir: A new folder for the whole model. None: a folder gets the file next to its
            pickle, a hub model a folder of its own name.

    Returns:
        The file.

    Raises:
        UserError: There is nothing to convert, there is something in its place already, or the
            pickle holds more than weights.
    """
    folder = Path(name).expanduser()
    is_local = folder.is_dir()
    target = Path(output_dir or (name if is_local else name.rpartition("/")[2])).expanduser()
    in_place = is_local and target.resolve() == folder.resolve()
    if target.exists() and not in_place:
        raise UserError(f"--output_dir {target} is there already: name a folder to be made.")
    if not is_local:
        try:
            folder = Path(snapshot_download(name, allow_patterns=[*MODEL_FILES, PICKLES]))
        except HUB_ERRORS as error:
            raise UserError(
                f"--convert {name} is neither a folder nor a model that the hub gave "
                f"({type(error).__name__}): check the name and the network."
            ) from error
    if listed(folder, "*.safetensors"):
        raise UserError(f"--convert {name} has weights in safetensors already: use it as it is.")
    parts = pickles_in(folder, name)
    parent = target if in_place else target.absolute().parent
    try:
        with scratch_folder(parent) as scratch:
            made = fresh_folder(scratch / "model")
            _in_a_process(parts, made / MODEL_FILE)
            if not in_place:
                for path in (path for pattern in MODEL_FILES for path in folder.glob(pattern)):
                    if path.name != INDEX:
                        with open_file(path) as file:
                            write_bytes(made / path.name, file.read())
            even_modes(made)
            sync_folder(made)
            if in_place:
                rename(made / MODEL_FILE, target / MODEL_FILE)
            else:
                rename(made, target)
    except OSError as error:
        raise UserError(
            f"{target / MODEL_FILE} cannot be written ({error.strerror}): "
            "name another --output_dir."
        ) from error
    return target / MODEL_FILE


def pickles_in(folder: Path, name: str) -> list[Path]:
    """The files of pickled weights in a model's folder. Raises UserError where there are none."""
    parts = [folder / "pytorch_model.bin"]
    listed = read_json_object(folder / INDEX).get("weight_map")
    if not parts[0].is_file() and isinstance(listed, dict):
        parts = [folder / Path(str(part)).name for part in sorted(set(listed.values()))]
    lacking = [part.name for part in parts if not part.is_file()]
    if lacking:
        raise UserError(f"--convert {name} holds no {lacking[0]}: there is nothing to convert.")
    return parts


def _in_a_process(parts: list[Path], path: Path) -> None:
    """Run this module over `parts`. Raises UserError with what it says."""
    command = [sys.executable, "-m", __name__, str(path), *map(str, parts)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"]
        raise UserError(said[-1] if done.returncode == 2 else f"{parts[0]}: {said[-1]}")


def main(argv: list[str]) -> int:
    """The program: a file to write, then the pickles that it is made of."""
    path, *parts = map(Path, argv)
    try:
        if tuple(map(int, torch.__version__.split(".")[:2])) < SAFE_TORCH:
            raise UserError(
                f"torch {torch.__version__} reads no pickle safely: install torch 2.6 or newer."
            )
        tensors: dict[str, torch.Tensor] = {}
        for part in parts:
            tensors.update(_weights_in(part))
        if not tensors:
            raise UserError(f"{parts[0]} holds no weights: name a model with some.")
        if name := nonfinite_weight(tensors.items()):
            raise UserError(
                f"{parts[0]} holds weights that are not finite ({name}): ask its owner for sound "
                "ones."
            )
        write_tensors(path, dict(_apart(tensors)), {"format": "pt"})
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _weights_in(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file may raise any of them
        what = "is no file of torch.save, or a damaged one"
        if re.search("unsupported global|unrecognized function|can only", str(error), re.I):
            what = "holds more than weights, which may be code"
        raise UserError(
            f"{path} {what}, and was not read: ask its owner for model.safetensors."
        ) from error
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(each, torch.Tensor) for name, each in content.items()
    ):
        raise UserError(
            f"{path} holds something else than a model's weights by their names: it must be what "
            "save_pretrained wrote."
        )
    return content


def _apart(tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors, tied ones copied: safetensors takes none that share memory."""
    seen = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        place = tensor.untyped_storage().data_ptr()
        yield name, tensor.clone() if place in seen else tensor
        seen.add(place)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
