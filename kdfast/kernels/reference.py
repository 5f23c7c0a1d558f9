"""The specification of the loss: plain PyTorch, plain autograd, every argument already checked.

Everything that computes the loss faster is measured against this file, so it is never optimised.
Source of the formulas: Haystack 1.26 (`farm-haystack`); the "hf" convention follows the script
`run_squad_w_distillation.py` of Hugging Face's research projects.
"""

import math

import torch
from torch import Tensor


def kl_div(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """(B,): KL(softmax(teacher/T) || softmax(student/T)) of logits (B, L), masked ones at -inf."""
    log_q = torch.log_softmax(student / temperature, 1)
    log_p = torch.log_softmax(teacher / temperature, 1)
    p = log_p.exp().masked_fill(teacher == -math.inf, 0.0)
    # Chosen, not multiplied: 0 * (-inf - -inf) is NaN. A NaN in p is not 0, so it comes through.
    return torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(1)


def mse(student: Tensor, teacher: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """(B,): mean over the participating positions of ((student - teacher)/T)^2, logits (B, L)."""
    difference = torch.where(teacher == -math.inf, 0.0, student - teacher) / temperature
    return difference.square().sum(1) / mask.sum(1).clamp(min=1)


def cross_entropy(student: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """(B,): -log softmax(student)[target]; 0 where the target is out of range or masked out."""
    position = target.long().clamp(0, student.shape[1] - 1)[:, None]
    counted = (target == position[:, 0]) & mask.gather(1, position)[:, 0]
    log_q = torch.log_softmax(student, 1).gather(1, position)[:, 0]
    return torch.where(counted, -log_q, 0.0)


def kd_loss_rows(
    student: Tensor | tuple[Tensor, Tensor],
    teacher: Tensor | tuple[Tensor, Tensor] | None,
    start_positions: Tensor,
    end_positions: Tensor,
    *,
    temperature: float,
    distillation_loss_weight: float,
    distillation_loss: str,
    convention: str,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """row_loss (B, 2) and row_parts (B, 2, 2), as `kdfast.fused_kd_loss.kd_loss_rows` says."""
    soft, hard = [], []
    for head, target in enumerate((start_positions, end_positions)):
        s = student[..., head] if isinstance(student, Tensor) else student[head]
        s = s.to(torch.float64 if s.dtype == torch.float64 else torch.float32)
        m = torch.ones_like(s, dtype=torch.bool) if mask is None else mask
        # A row of nothing but -inf has no softmax: an empty row gets zeros, and no gradient.
        s = s.masked_fill(~m, -math.inf).masked_fill(~m.any(1, keepdim=True), 0.0)
        hard.append(cross_entropy(s, target, m) / 2)
        if teacher is None:
            soft.append(torch.zeros_like(hard[-1]))
            continue
        c = teacher[..., head] if isinstance(teacher, Tensor) else teacher[head]
        c = c.to(s.dtype).masked_fill(~m, -math.inf)
        if distillation_loss == "kl_div":
            distance = kl_div(s, c, temperature) / (1 if convention == "haystack" else 2)
        else:
            distance = mse(s, c, m, temperature) / 2
        soft.append(temperature**2 * distance)
    parts = torch.stack(soft, 1), torch.stack(hard, 1)
    weights = (distillation_loss_weight, 1.0 - distillation_loss_weight)
    # A part of weight 0 is left out, not multiplied: it, or its gradient, may be infinite.
    row_loss = sum(w * part for w, part in zip(weights, parts, strict=True) if w != 0)
    return row_loss, torch.stack(parts, 2).detach()
