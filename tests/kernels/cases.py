"""Cases for every backend that is usable here, and how near to extended precision it must come.

The tolerance of a backend is the reference's own error on the same inputs, plus ULPS units in the
last place of the accumulating type at the size of the terms that are added up. Nothing is tuned
by dtype.
"""

import math

import numpy as np
import torch

from kdfast import fused_kd_loss, kd_loss_rows

from .exact_rows import LONG, exact_rows, to_long

INF = math.inf
ULPS = 4
KINDS = [("kl_div", "haystack"), ("kl_div", "hf"), ("mse", "haystack")]
FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
SETTINGS = {"temperature": 1.7, "distillation_loss_weight": 0.6}


class Case:
    """Arguments of one call, and what it must give."""

    def __init__(self, student, teacher, start, end, mask, kind, convention, **settings):
        self.student, self.teacher, self.mask = student, teacher, mask
        self.targets = torch.as_tensor(start), torch.as_tensor(end)
        self.settings = (
            SETTINGS
            | {"distillation_loss": kind, "convention": convention, "reduction": "none"}
            | settings
        )

    def run(self, backend, device, scale=1.0, form="tensor"):
        """loss (B,), row_parts (B, 2, 2) and the gradient (B, L, 2) of scale * sum / B."""
        student = self.student.detach().to(device)
        heads = student.unbind(2) if form == "pair" else (student,)
        heads = [head.clone().requires_grad_() for head in heads]
        teacher = None if self.teacher is None else self.teacher.to(device)
        logits = tuple(heads) if form == "pair" else heads[0]
        start, end = (target.to(device) for target in self.targets)
        mask = None if self.mask is None else self.mask.to(device)
        arguments = (logits, teacher, start, end)
        loss = fused_kd_loss(*arguments, mask=mask, backend=backend, **self.settings)
        rows = {name: value for name, value in self.settings.items() if name != "reduction"}
        _, parts = kd_loss_rows(*arguments, mask=mask, backend=backend, **rows)
        gradients = torch.autograd.grad(loss.sum() * (scale / len(loss)), heads)
        gradient = torch.stack(gradients, 2) if form == "pair" else gradients[0]
        return loss.detach(), parts, gradient

    def exact(self, scale=1.0):
        """The same three in extended precision."""
        is_kl = self.settings["distillation_loss"] == "kl_div"
        row_loss, parts, gradient = exact_rows(
            *(self.student, self.teacher, self.targets, self.mask),
            temperature=self.settings["temperature"],
            weight=self.settings["distillation_loss_weight"],
            kind=0 if is_kl else 1,
            soft_scale=1.0 if is_kl and self.settings["convention"] == "haystack" else 0.5,
        )
        return row_loss.sum(1), parts, gradient * LONG(scale / len(row_loss))

    def sizes(self, scale=1.0):
        """Of the terms that are added up: a soft part is their difference, however small."""
        batch, length, _ = self.student.shape
        temperature = self.settings["temperature"]
        term = temperature**2 * (1 + math.log(length))
        return term, term, scale * temperature / batch


def random_case(length, kind, convention, types=(FP32, FP32), batch=8, **settings):
    """Logits as a reader has them, a mask with holes, targets inside and outside."""
    generator = torch.Generator().manual_seed(length)
    student, teacher = 3 * torch.randn(2, batch, length, 2, generator=generator, dtype=FP64)
    start, end = torch.randint(0, length, (2, batch), generator=generator)
    end[0], start[1:2] = -100, length
    mask = torch.rand(batch, length, generator=generator) < 0.8
    mask[-1] = True
    return Case(
        *(student.to(types[0]), teacher.to(types[1]), start, end, mask, kind, convention),
        **settings,
    )


def one_kind_of_window(name, length, dtype):
    """Student, teacher, targets and mask of 8 windows that are awkward in the same way."""
    generator = torch.Generator().manual_seed(length + len(name))
    student, teacher = 3 * torch.randn(2, 8, length, 2, generator=generator, dtype=FP64)
    start = end = torch.full((8,), length // 2)
    mask = torch.rand(8, length, generator=generator) < 0.7
    mask[:, length // 2] = True
    if name == "one valid position":
        mask[:] = False
        mask[torch.arange(8), torch.arange(8) % length] = True
        start = torch.arange(8) % length
    elif name == "target at the last valid position":
        mask[:] = True
        for b in range(8):
            mask[b, max(1, length - b) :] = False
        start = end = mask.sum(1) - 1
    elif name == "ignored targets":
        start = torch.tensor([-100, -1, length, length + 1, 2**40, -(2**40), -(2**63), 2**63 - 1])
    elif name == "target masked out":
        mask[:, length // 2] = False
        mask[:, 0] = length > 1
    elif name == "all masked":
        mask[::2] = False
        student[::2], teacher[::2] = math.nan, math.nan
    elif name == "equal logits":
        student[:], teacher[:] = 0.25, -1.5
    elif name == "equal to the teacher":
        teacher = student.clone()
    elif name == "huge logits":
        student *= 200
    elif name == "huge in both":
        student, teacher = student * 3000, teacher * 3000
    elif name == "a sure teacher":
        teacher[torch.rand(8, length, 2, generator=generator) < 0.5] = -INF
        teacher[0] = -INF
        teacher[:4, length // 2] = 0
    elif name == "a sure student":
        gone = torch.rand(8, length, generator=generator) < 0.5
        gone[:, length // 2] = False
        student[gone], teacher[gone] = -INF, -INF
    return student.to(dtype), teacher.to(dtype), start, end, mask


AWKWARD = [
    "one valid position",
    "target at the last valid position",
    "ignored targets",
    "target masked out",
    "all masked",
    "equal logits",
    "equal to the teacher",
    "huge logits",
    "huge in both",
    "a sure teacher",
    "a sure student",
]


def assert_as_good(case, actual, expected, by_reference, sizes):
    """No worse than the reference, plus ULPS at the size of what is added up."""
    ulp = torch.finfo(FP64 if case.student.dtype == FP64 else FP32).eps
    for got, want, known, size in zip(actual, expected, by_reference, sizes, strict=True):
        assert got.dtype == known.dtype
        want = np.asarray(want)
        rounded = torch.from_numpy(want.astype(np.float64)).to(got.dtype)
        finite = rounded.isfinite().numpy()
        # Beyond the type's range, say fp16 gradients under a loss scale: infinite, and no NaN.
        outside = ~rounded.isfinite()
        torch.testing.assert_close(got.cpu()[outside], rounded[outside], equal_nan=True)
        if not finite.any():
            continue
        error = np.abs(to_long(got) - want)[finite]
        allowed = np.abs(to_long(known) - want)[finite]
        peak, mean = np.abs(want[finite]).max(), np.abs(want[finite]).mean()
        assert error.max() <= allowed.max() + ULPS * ulp * (peak + size), "largest error"
        assert error.mean() <= allowed.mean() + ULPS * ulp * (mean + size), "mean error"


def check(case, where, scale=1.0, form="tensor"):
    backend, device = where
    actual = case.run(backend, device, scale, form)
    known = case.run("reference", device, scale, form)
    assert_as_good(case, actual, case.exact(scale), known, case.sizes(scale))
    if case.mask is not None:
        assert (actual[2].cpu()[~case.mask] == 0).all()
    return actual
