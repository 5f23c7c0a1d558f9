"""What the loss is timed against: the formula in eager PyTorch, compiled, and by Liger-Kernel.

And an autograd.Function that does nothing, which no loss can be faster than.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

TEMPERATURE, WEIGHT = 2.0, 0.75


def plain_loss(student, teacher, start, end) -> Tensor:
    """Haystack's formula with torch's own functions, softmax and sums in fp32.

    student, teacher: (B, L, 2), or pairs of (B, L) as Hugging Face's models split them.
    """
    if isinstance(student, Tensor):
        s, c = student.float(), teacher.float()
        soft = F.kl_div(
            torch.log_softmax(s / TEMPERATURE, 1),
            torch.softmax(c / TEMPERATURE, 1),
            reduction="batchmean",
        )
        hard = F.cross_entropy(s[..., 0], start) + F.cross_entropy(s[..., 1], end)
    else:
        soft = hard = 0.0
        for s, c, target in zip(student, teacher, (start, end), strict=True):
            s, c = s.float(), c.float()
            soft = soft + F.kl_div(
                torch.log_softmax(s / TEMPERATURE, 1),
                torch.softmax(c / TEMPERATURE, 1),
                reduction="batchmean",
            )
            hard = hard + F.cross_entropy(s, target)
    return WEIGHT * TEMPERATURE**2 * soft + (1 - WEIGHT) * hard / 2


def split_loss(student: Tensor, teacher: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """plain_loss after the split and the contiguous copies of Hugging Face's models."""
    pairs = [
        [head.squeeze(-1).contiguous() for head in logits.split(1, -1)]
        for logits in (student, teacher)
    ]
    return plain_loss(*pairs, start, end)


def compiled(function: Callable) -> Callable:
    """Compiled for the shapes of one cell: its best, though a reader's batches differ in shape."""
    return torch.compile(function, fullgraph=True, dynamic=False)


def liger_loss(student: Tensor, teacher: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Liger-Kernel's KLDiv and cross-entropy on the 2B rows."""
    from liger_kernel.transformers import LigerCrossEntropyLoss, LigerKLDIVLoss

    batch, length, _ = student.shape
    s = student.float().transpose(1, 2).reshape(2 * batch, length)
    c = teacher.float().transpose(1, 2).reshape(2 * batch, length)
    soft = LigerKLDIVLoss(reduction="sum")(
        torch.log_softmax(s / TEMPERATURE, 1), torch.softmax(c / TEMPERATURE, 1)
    )
    hard = LigerCrossEntropyLoss(reduction="sum")(s, torch.stack((start, end), 1).flatten())
    return (WEIGHT * TEMPERATURE**2 * soft + (1 - WEIGHT) * hard / 2) / batch


def liger_is_installed() -> bool:
    try:
        import liger_kernel.transformers  # noqa: F401
    except ImportError:
        return False
    return True


class Empty(torch.autograd.Function):
    """What autograd and Python cost a function that does nothing with the same tensors."""

    @staticmethod
    def forward(ctx, student, teacher, start, end, loss, gradient):
        ctx.save_for_backward(student, teacher, start, end, gradient)
        return loss

    @staticmethod
    def backward(ctx, _grad):
        return ctx.saved_tensors[4], None, None, None, None, None
