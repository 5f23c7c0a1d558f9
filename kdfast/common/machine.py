"""What a run was made on and with: hardware, versions, this package's source."""

import hashlib
import json
import os
import platform
from collections.abc import Container
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from kdfast.common.files import sha256_of
from kdfast.common.ranks import Ranks

PACKAGES = ("kdfast", "torch", "triton", "transformers", "datasets", "tokenizers", "numpy")


def code_key() -> str:
    """A hash of this package's source. Ranks must share it; a resumed run says where it differs."""
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)} {sha256_of(path)}\n".encode())
    return digest.hexdigest()


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Hardware and versions, as run.json and the benchmark records name them."""
    hardware = {
        "device": str(device),
        "cpu": cpu_name(),
        "cpu_threads": torch.get_num_threads(),
        "cpu_cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {"hardware": hardware, "versions": versions}


def numeric_environment(device: torch.device, ranks: Ranks) -> dict[str, str]:
    """What the last bits of results depend on besides versions, by name. All ranks call it.

    On a CPU torch's kernels go by threads and by the instruction set that it sees; those of oneDNN,
    MKL and csrc/ go by the processor. Where ranks differ, a value names those of all.
    """
    if device.type == "cuda":
        own = {"device": torch.cuda.get_device_name(device)}
    else:
        own = {"device": cpu_name(), "threads": str(torch.get_num_threads())}
        own["instruction set"] = torch.backends.cpu.get_cpu_capability()
    everyone = [json.loads(text) for text in ranks.gather(json.dumps(own))]
    return {name: " and ".join(sorted({str(each.get(name)) for each in everyone})) for name in own}


def changes(before: dict[str, Any], now: dict[str, Any], hashes: Container[str] = ()) -> list[str]:
    """What differs between two environments, with both values unless these are `hashes`.

    What an earlier version did not note counts as unchanged.
    """
    return [
        name if name in hashes else f"{name} ({before[name]} -> {value})"
        for name, value in now.items()
        if name in before and before[name] != value
    ]


def cpu_name() -> str:
    """The processor's name as the system has it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
