"""A benchmark's picture, where there is what draws it."""

from collections.abc import Callable
from pathlib import Path


def save(report: dict, path: Path, draw: Callable[[dict, Path], None]) -> str:
    """Let `draw` make the PNG `path` of the report; says what was written, or why nothing was."""
    try:
        import matplotlib
    except ImportError:
        return "no picture: matplotlib is not installed"
    matplotlib.use("Agg")
    draw(report, path)
    return f"written: {path}"
