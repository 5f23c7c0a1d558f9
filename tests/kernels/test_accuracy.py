"""Every backend that is usable here, against extended precision and against the reference.

Fresh tensors hold NaN while these tests run, so that what is not written is seen.
"""

import numpy as np
import pytest
import torch

from kdfast import fused_kd_loss

from .cases import (
    AWKWARD,
    BF16,
    FP16,
    FP32,
    FP64,
    KINDS,
    Case,
    assert_as_good,
    check,
    one_kind_of_window,
    random_case,
)
from .conftest import REFUSED, parameter
from .exact_rows import to_long

LENGTHS = [1, 7, 383, 385, 4096]
TYPES = [(FP32, FP32), (FP16, FP16), (BF16, BF16), (FP64, FP64), (FP16, FP32), (FP32, BF16)]


@pytest.mark.parametrize("pair", [parameter(*pair) for pair in REFUSED])
def test_backends_that_cannot_run_say_why(pair):
    pytest.skip(f"{pair[0]}: {REFUSED[pair]}")


def test_fresh_memory_is_poisoned():
    assert torch.empty(7).isnan().all()


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("kind, convention", KINDS)
def test_extended_precision_agrees_with_the_reference(kind, convention, name):
    """A wrong expectation would excuse a backend, as the reference would miss it too."""
    for length in (1, 7, 385):
        case = Case(*one_kind_of_window(name, length, FP64), kind, convention)
        # exp(x) has the error of x, which grows with it.
        ulp = torch.finfo(FP64).eps * (3000 if name == "huge in both" else 1)
        for known, want, size in zip(
            case.run("reference", "cpu"), case.exact(), case.sizes(), strict=True
        ):
            error = np.abs(to_long(known) - want).max()
            assert error <= 16 * ulp * (size + np.abs(want).max())


@pytest.mark.parametrize("types", TYPES, ids=lambda types: "-".join(str(t)[6:] for t in types))
@pytest.mark.parametrize("kind, convention", KINDS)
@pytest.mark.parametrize("length", LENGTHS)
def test_no_worse_than_the_reference(length, kind, convention, types, where):
    check(random_case(length, kind, convention, types), where)


@pytest.mark.parametrize("dtype", [FP16, BF16, FP32])
@pytest.mark.parametrize("length", [7, 385])
def test_under_a_loss_scale(length, dtype, where):
    for kind, convention in KINDS:
        check(random_case(length, kind, convention, (dtype, dtype)), where, scale=65536.0)


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("kind, convention", KINDS)
def test_awkward_windows(kind, convention, name, where):
    for length, dtype in ((1, FP32), (7, FP64), (383, BF16), (385, FP32), (4096, FP32)):
        if name == "target masked out" and length == 1:
            continue
        case = Case(*one_kind_of_window(name, length, dtype), kind, convention)
        check(case, where)
        if name in ("all masked", "equal logits"):
            check(case, where, form="pair")


@pytest.mark.parametrize("weight", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
def test_temperatures_and_weights(temperature, weight, where):
    for kind, convention in KINDS:
        settings = {"temperature": temperature, "distillation_loss_weight": weight}
        case = random_case(65, kind, convention, **settings)
        check(case, where)
        case.mask = None
        check(case, where)


def test_without_a_teacher(where):
    case = random_case(33, "kl_div", "haystack", distillation_loss_weight=0.0)
    case.teacher = None
    for form in ("tensor", "pair"):
        _, parts, _ = check(case, where, form=form)
        assert (parts[..., 0] == 0).all()


def test_the_comparison_can_fail(where):
    """One of 3,080 logits that the backend is given is off, the last by a billionth."""
    for dtype, shift in ((FP32, 1e-3), (FP16, 1e-2), (FP64, 1e-9)):
        case = random_case(385, "kl_div", "haystack", (dtype, dtype), batch=4)
        expected, known = case.exact(), case.run("reference", where[1])
        check(case, where)
        case.student[3, case.student[3, :, 0].argmax(), 0] += shift
        moved = case.run(*where)
        for which in range(3):
            one = [[three[which]] for three in (moved, expected, known)]
            with pytest.raises(AssertionError, match="error"):
                assert_as_good(case, *one, sizes=case.sizes()[which : which + 1])


@pytest.mark.parametrize("form", ["tensor", "pair"])
@pytest.mark.parametrize("kind, convention", KINDS)
def test_gradcheck(kind, convention, form, where):
    backend, device = where
    case = random_case(5, kind, convention, (FP64, FP64), batch=4)
    case.mask[2] = False
    inputs = case.student.unbind(2) if form == "pair" else (case.student,)
    inputs = [part.to(device).contiguous().requires_grad_() for part in inputs]

    def loss(*heads):
        logits = heads if form == "pair" else heads[0]
        teacher, mask = case.teacher.to(device), case.mask.to(device)
        targets = (target.to(device) for target in case.targets)
        return fused_kd_loss(logits, teacher, *targets, mask=mask, backend=backend, **case.settings)

    assert torch.autograd.gradcheck(loss, inputs)
