"""What no backend can compute, and what every one of them must refuse."""

import math

import pytest
import torch

from kdfast import fused_kd_loss

from .cases import INF, random_case
from .conftest import USABLE

EVERY = [*USABLE, pytest.param(("reference", "cpu"), id="reference-cpu")]


@pytest.mark.parametrize("value", [math.nan, INF, -INF])
@pytest.mark.parametrize("whose", ["student", "teacher"])
@pytest.mark.parametrize("kind", ["kl_div", "mse"])
def test_non_finite_logits_are_as_the_reference_has_them(kind, whose, value, where):
    """Never an error, and the loss and each part is finite, infinite or NaN as documented."""
    for length in (7, 385):
        case = random_case(length, kind, "haystack")
        case.mask = None
        logits = getattr(case, whose)
        logits[0, 0], logits[1, length - 1, 1], logits[2, 3] = value, value, value
        case.targets[0][2] = 3  # the hard part is infinite where the answer is excluded
        logits[3, ::2] = value
        logits[4] = value
        loss, parts, _ = case.run(*where)
        known_loss, known_parts, _ = case.run("reference", where[1])
        assert torch.equal(loss.isfinite(), known_loss.isfinite())
        finite = known_parts.isfinite()
        assert torch.equal(parts.isfinite(), finite)
        torch.testing.assert_close(parts[finite], known_parts[finite])
        torch.testing.assert_close(loss[5:], known_loss[5:])


def slope_of(case, where):
    loss, _, gradient = case.run(*where)
    return loss, gradient


@pytest.mark.parametrize("where", EVERY)
@pytest.mark.parametrize("temperature", [1.0, 1.5, 1.7, 2.0])
@pytest.mark.parametrize("kind", ["kl_div", "mse"])
def test_a_soft_part_of_weight_zero_is_left_out(kind, temperature, where):
    """Of the loss and of the gradient, whatever the teacher says."""
    settings = {"temperature": temperature, "distillation_loss_weight": 0.0}
    case = random_case(33, kind, "haystack", **settings)
    case.student[case.student > 6] = -INF
    case.teacher[1], case.teacher[2, 3], case.teacher[3, ::2] = math.nan, INF, -INF
    found = slope_of(case, where)
    case.teacher = None
    torch.testing.assert_close(found, slope_of(case, where))


@pytest.mark.parametrize("where", EVERY)
@pytest.mark.parametrize("temperature", [1.0, 1.5, 1.7, 2.0])
@pytest.mark.parametrize("kind", ["kl_div", "mse"])
def test_a_hard_part_of_weight_zero_is_left_out(kind, temperature, where):
    """Where the student excludes the answer as the teacher does; or, for mse, has no softmax."""
    settings = {"temperature": temperature, "distillation_loss_weight": 1.0}
    case = random_case(33, kind, "haystack", **settings)
    case.mask = None
    case.targets = torch.full((8,), 5), torch.full((8,), 7)
    case.student[:, 5], case.teacher[:, 5] = -INF, -INF
    if kind == "mse":
        case.student[1, 7], case.teacher[1, 7] = INF, -INF
        case.student[2], case.teacher[2] = -INF, -INF
    loss, gradient = slope_of(case, where)
    assert loss.isfinite().all()
    assert gradient.isfinite().all()
    case.targets = torch.full((2, 8), -100)
    torch.testing.assert_close((loss, gradient), slope_of(case, where))


def test_differentiated_twice_is_refused(where):
    backend, device = where
    student = torch.zeros(2, 5, 2, device=device, requires_grad=True)
    positions = torch.zeros(2, device=device).long()
    for logits in (student, student.unbind(2)):
        loss = fused_kd_loss(logits, student.detach(), positions, positions, backend=backend)
        slope = torch.autograd.grad(loss, student, create_graph=True)[0]
        with pytest.raises(RuntimeError, match="differentiated once; backend='reference' can"):
            slope.square().sum().backward()


def test_transforms_are_refused(where):
    backend, device = where
    student = torch.zeros(3, 2, 5, 2, device=device)
    positions = torch.zeros(2, device=device).long()

    def loss(logits, backend=backend):
        return fused_kd_loss(logits, logits.detach(), positions, positions, backend=backend)

    for transformed in (torch.func.vmap(loss), torch.func.vmap(torch.func.grad(loss))):
        with pytest.raises(RuntimeError, match=r"does not run inside torch.func .*'reference'"):
            transformed(student)


def test_batched_gradients_are_refused(where):
    backend, device = where
    student = torch.zeros(2, 5, 2, device=device, requires_grad=True)
    positions = torch.zeros(2, device=device).long()
    loss = fused_kd_loss(
        *(student, student.detach(), positions, positions), reduction="none", backend=backend
    )
    with pytest.raises(RuntimeError, match=r"does not run inside torch.func .*'reference'"):
        torch.autograd.grad(loss, student, torch.eye(2, device=device), is_grads_batched=True)


def test_inputs_changed_before_backward_are_noticed(where):
    backend, device = where
    student = torch.zeros(2, 5, 2, device=device, requires_grad=True)
    teacher, positions = torch.zeros(2, 5, 2, device=device), torch.zeros(2, device=device).long()
    loss = fused_kd_loss(student, teacher, positions, positions, backend=backend)
    teacher += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("shape", [(1, 2**31, 2), (2**31, 1, 2)])
def test_sizes_beyond_int32_are_refused(shape):
    logits = torch.zeros(1, 1, 1).expand(shape)
    positions = torch.zeros(1).long().expand(shape[0])
    with pytest.raises(ValueError, match="expected neither above 2147483647"):
        fused_kd_loss(logits, logits, positions, positions)
