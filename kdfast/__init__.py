"""kdfast: distil extractive question-answering readers, fast.

The function is imported here, not on first use: the submodule has the same name, and whichever
of the two is bound last is what `kdfast.fused_kd_loss` means. Reader is imported on first use, for
it needs transformers.
"""

import sys

if sys.argv[:1] == ["-m"]:  # a program starts: torch takes seconds to load, and Ctrl-C may come
    from kdfast.common import program

    program.end_at_interrupt()

from kdfast.fused_kd_loss import FusedKDLoss, fused_kd_loss, kd_loss_rows

__version__ = "0.1.0"

__all__ = ["FusedKDLoss", "Reader", "__version__", "fused_kd_loss", "kd_loss_rows"]


def __getattr__(name: str) -> object:
    if name == "Reader":
        from kdfast.reader import Reader

        return Reader
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
