"""The rows once more, in extended precision and without torch's help: what a backend must meet."""

import math

import numpy as np
import torch

LONG = np.longdouble  # 64 bits of mantissa on x86, never fewer than fp64's


def exact_rows(student, teacher, targets, mask, *, temperature, weight, kind, soft_scale):
    """row_loss (B, 2), row_parts (B, 2, 2) and d row_loss / d student (B, L, 2), in LONG.

    student, teacher: finite-precision tensors (B, L, 2); the teacher may be None. targets: (start,
    end). mask: (B, L) or None. The settings are those of a backend's forward.
    """
    batch, length, _ = student.shape
    s_all = to_long(student)
    c_all = None if teacher is None else to_long(teacher)
    m_all = np.ones((batch, length), bool) if mask is None else mask.cpu().numpy()
    row_loss = np.zeros((batch, 2), LONG)
    row_parts = np.zeros((batch, 2, 2), LONG)
    gradient = np.zeros((batch, length, 2), LONG)
    for b in range(batch):
        kept = np.flatnonzero(m_all[b])
        for head in range(2) if len(kept) else ():
            s = s_all[b, kept, head]
            c = None if c_all is None else c_all[b, kept, head]
            target = np.flatnonzero(kept == int(targets[head][b]))
            soft, slope = soft_part(s, c, temperature, kind, soft_scale)
            hard, step = hard_part(s, target)
            row_parts[b, head] = soft, hard
            # A part of weight 0 is left out even where it is infinite.
            for part, change, w in ((soft, slope, weight), (hard, step, 1 - LONG(weight))):
                if w != 0:
                    row_loss[b, head] += w * part
                    gradient[b, kept, head] += w * change
    return row_loss, row_parts, gradient


def soft_part(s, c, temperature, kind, soft_scale):
    if c is None:
        return LONG(0), np.zeros_like(s)
    t, scale = LONG(temperature), LONG(soft_scale)
    if kind == 1:
        difference = np.subtract(s, c, out=np.zeros_like(s), where=c > -math.inf)
        return scale * np.mean(difference**2), 2 * scale * difference / len(s)
    if c.max() == -math.inf:  # a teacher that says nothing
        return LONG(0), np.zeros_like(s)
    log_p, log_q = log_softmax(c / t), log_softmax(s / t)
    p = np.exp(log_p)
    some = p > 0
    kl = np.sum(p[some] * (log_p[some] - log_q[some]))
    return t**2 * scale * kl, t * scale * (np.exp(log_q) - p)


def hard_part(s, target):
    if len(target) == 0:
        return LONG(0), np.zeros_like(s)
    log_q = log_softmax(s)
    step = np.exp(log_q)
    step[target] -= 1
    return -log_q[target[0]] / 2, step / 2


def log_softmax(values):
    shifted = values - values.max()
    return shifted - np.log(np.sum(np.exp(shifted)))


def to_long(tensor: torch.Tensor) -> np.ndarray:
    """The values of a tensor, exactly."""
    return tensor.detach().cpu().double().numpy().astype(LONG)
