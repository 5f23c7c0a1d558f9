"""What a benchmark measured, as JSON and as a picture, with the machine that it was measured on."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from kdfast.common.machine import cpu_name

HERE = Path(__file__).parent


def machine(device: str) -> dict[str, str | int]:
    """Hardware, versions, commit and command: what a figure means nothing without."""
    commit = _output("git", "rev-parse", "--short=12", "HEAD") or "unknown"
    changed = _output("git", "status", "--porcelain", "--", "../kdfast", "../csrc", "*.py")
    found = {
        "processor": cpu_name(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit + ("-dirty" if changed else ""),
        "command": "pytest " + " ".join(sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d"),
        "load at the start": f"{os.getloadavg()[0]:.1f}",
    }
    if device != "cpu":
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found |= {
            "card": torch.cuda.get_device_name(device),
            "capability": "sm_{}{}".format(*torch.cuda.get_device_capability(device)),
            "memory": f"{torch.cuda.mem_get_info(device)[1] / 2**30:.1f} GB",
            "driver": driver.split("\n")[0] or "unknown",
            "CUDA": torch.version.cuda,
            **{package: _version(package) for package in ("triton", "transformers", "accelerate")},
        }
    return found


def write(path: Path, report: dict) -> str:
    """Write a report whose lists of dicts have a line for each; says what was written."""
    parts = []
    for name, value in report.items():
        if isinstance(value, list) and value:
            rows = ",\n".join(f"  {json.dumps(row)}" for row in value)
            parts.append(f' "{name}": [\n{rows}\n ]')
        else:
            parts.append(f' "{name}": {json.dumps(value, indent=1)}')
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
    return f"written: {path}"


def add_to_card(found: dict, parts: dict, folder: Path = HERE) -> str:
    """Write parts into the one record of a card, gpu_<card>.json.

    found: of `machine`. What the record holds of another commit goes, as one record is of one.
    """
    name = found["card"].lower().replace(" ", "_").replace("/", "_")
    path = folder / f"gpu_{name}.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if before.get("machine", {}).get("commit") != found["commit"]:
        before = {}
    return write(path, before | {"machine": found} | parts)


def picture(report: dict, path: Path, draw: Callable[[dict, Path], None]) -> str:
    """Let `draw` make the PNG `path` of the report, where there is what draws it; says what was
    written, or why nothing was."""
    try:
        import matplotlib
    except ImportError:
        return "no picture: matplotlib is not installed"
    matplotlib.use("Agg")
    draw(report, path)
    return f"written: {path}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=HERE)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()
