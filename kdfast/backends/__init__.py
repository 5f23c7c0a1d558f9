"""Ways to compute rows. A row is the start logits, or the end logits, of one window."""

from types import ModuleType

from torch import Tensor

from kdfast import reference


def choose(student: Tensor, backend: str | None) -> ModuleType:
    """The module that computes the rows of `student`: the only place that decides by hardware.

    Raises ValueError for a backend that is not usable for this tensor.
    """
    if backend is None or backend == "reference":
        return reference
    raise ValueError(
        f"backend is {backend!r}, expected None or one that is usable for a tensor on "
        f"{student.device.type}: 'reference'"
    )
