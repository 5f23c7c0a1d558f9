"""kdfast: distil extractive question-answering readers, fast.

The function is imported here, not on first use: the submodule has the same name, and whichever
of the two is bound last is what `kdfast.fused_kd_loss` means.
"""

from kdfast.fused_kd_loss import FusedKDLoss, fused_kd_loss, kd_loss_rows

__version__ = "0.1.0"

__all__ = ["FusedKDLoss", "__version__", "fused_kd_loss", "kd_loss_rows"]
