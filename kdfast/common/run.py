"""What all parts of a run share, made once and handed on as one thing."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from kdfast.common.precision import AUTOCAST
from kdfast.common.ranks import Ranks
from kdfast.common.signals import StopSignals


@dataclass
class Run:
    """Where and how a program computes, and where it writes.

    Attributes:
        device: Of this process.
        precision: "no", "fp16" or "bf16", the type of the matrix products.
        ranks: The processes that share the work.
        stop: SIGTERM, SIGINT and SIGHUP, and whether all ranks agreed to stop.
        output: The folder that the program writes.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: str = "no"
    ranks: Ranks = field(default_factory=Ranks)
    stop: StopSignals = field(default_factory=StopSignals)
    output: Path = Path()

    @property
    def dtype(self) -> torch.dtype | None:
        """Autocast's type, or None."""
        return AUTOCAST[self.precision]

    def autocast(self) -> torch.autocast:
        """Autocast to the run's precision."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    def full_precision(self) -> torch.autocast:
        """No autocast inside."""
        return torch.autocast(self.device.type, enabled=False)
