"""Every form and layout in memory of what a backend is given means the same."""

import math
from contextlib import nullcontext

import pytest
import torch

from kdfast import fused_kd_loss, kd_loss_rows

from .cases import FP16, FP32, SETTINGS, random_case

CALL = SETTINGS | {"distillation_loss": "kl_div", "convention": "haystack"}
VIEWS = {
    "heads apart": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "every second column": lambda x: x.repeat_interleave(2, 2)[..., ::2],
    "a slice at an odd address": lambda x: torch.cat([x[:, :1], x, x[:, :2]], 1)[:, 1:-2],
    "positions first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "heads swapped twice": lambda x: (
        x.flip(2).contiguous().as_strided(x.shape, (2 * x.shape[1], 2, 1))
    ),
    "one window for all": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("view", VIEWS)
def test_strided_views_are_their_copies(view, where):
    backend, device = where
    case = random_case(37, "kl_div", "haystack", (FP16, FP32))
    student, teacher = (VIEWS[view](logits.to(device)) for logits in (case.student, case.teacher))
    mask = torch.cat([case.mask, case.mask], 1).to(device)[:, ::2][:, :37]
    start = torch.stack(case.targets, 1).to(device)[:, 0]
    results = []
    for as_given in (True, False):
        part = (lambda x: x) if as_given else torch.clone
        logits = [part(x).detach() for x in (student, teacher)]
        logits[0].requires_grad_()
        loss = fused_kd_loss(
            *(*logits, part(start), part(start).int() if as_given else part(start)),
            mask=mask if as_given else mask.contiguous(),
            backend=backend,
            **SETTINGS,
        )
        results.append((loss.detach(), torch.autograd.grad(loss, logits[0])[0]))
    for viewed, copied in zip(*results, strict=True):
        torch.testing.assert_close(viewed, copied, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_forms_and_reductions_agree(reduction, where):
    backend, device = where
    case = random_case(19, "kl_div", "hf")
    student, teacher = case.student.to(device), case.teacher.to(device)
    beside = [*(target.to(device) for target in case.targets)]
    whole = student.clone().requires_grad_()
    pair = [head.clone().requires_grad_() for head in student.unbind(2)]
    settings = SETTINGS | {"mask": case.mask.to(device), "reduction": reduction}
    weights = torch.arange(1.0, 9.0, device=device) if reduction == "none" else 1.0

    def run(logits, teacher, backend):
        loss = fused_kd_loss(logits, teacher, *beside, backend=backend, **settings)
        return loss.detach(), torch.autograd.grad((loss * weights).sum(), logits)

    expected, (slope,) = run(whole, teacher, "reference")
    for form in (teacher, teacher.unbind(2), [head.contiguous() for head in teacher.unbind(2)]):
        loss, gradients = run(whole, form, backend)
        heads_loss, heads = run(pair, form, backend)
        assert gradients[0].is_contiguous()
        assert heads[0].is_contiguous()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradients[0], slope)
        # The other form is the same arithmetic in another order of the lanes.
        torch.testing.assert_close(heads_loss, expected)
        torch.testing.assert_close(torch.stack(heads, 2), slope)


def negated(logits):
    """A view of -logits whose memory holds logits."""
    view = torch.complex(torch.zeros_like(logits), logits).conj().imag
    assert view.is_neg()
    return view


def of_inference_mode(tensor):
    with torch.inference_mode():
        return tensor.clone()


def test_views_that_are_yet_to_be_negated(where):
    backend, device = where
    case = random_case(19, "kl_div", "haystack")
    student, teacher, *beside = (x.to(device) for x in (case.student, case.teacher, *case.targets))
    results = []
    for minus in (negated, torch.neg):
        leaf = student.clone().requires_grad_()
        loss = fused_kd_loss(minus(leaf), minus(teacher), *beside, backend=backend)
        results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_what_inference_mode_made(where):
    """Teacher logits, most of all; the rest of the arguments too."""
    backend, device = where
    case = random_case(19, "kl_div", "haystack")
    student = case.student.to(device).requires_grad_()
    others = [x.to(device) for x in (case.teacher, *case.targets, case.mask)]
    results = []
    for made in (of_inference_mode, torch.clone):
        teacher, start, end, mask = map(made, others)
        loss = fused_kd_loss(student, teacher, start, end, mask=mask, backend=backend)
        results.append((loss.detach(), torch.autograd.grad(loss, student)[0]))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    with torch.inference_mode():
        loss = fused_kd_loss(student, *others[:3], mask=others[3], backend=backend)
    torch.testing.assert_close(loss.clone(), results[0][0], rtol=0, atol=0)


def test_gradient_of_each_row(where):
    """kd_loss_rows under gradients that differ by row, transposed and expanded."""
    backend, device = where
    case = random_case(19, "kl_div", "haystack")
    results = []
    for name in (backend, "reference"):
        student = case.student.to(device).requires_grad_()
        rows = {key: value for key, value in case.settings.items() if key != "reduction"}
        row_loss, parts = kd_loss_rows(
            *(student, case.teacher.to(device), *(target.to(device) for target in case.targets)),
            mask=case.mask.to(device),
            backend=name,
            **rows,
        )
        assert not parts.requires_grad
        weight = torch.arange(16.0, device=device).reshape(2, 8).t()
        same_for_both = torch.arange(8.0, device=device)[:, None].expand(8, 2)
        slopes = [
            torch.autograd.grad(row_loss, student, weights, retain_graph=True)[0]
            for weights in (weight, same_for_both)
        ]
        results.append((row_loss.detach(), parts, *slopes))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_empty_batch(where):
    backend, device = where
    student = torch.zeros(0, 9, 2, device=device, requires_grad=True)
    teacher, positions = torch.zeros(0, 9, 2, device=device), torch.zeros(0, device=device).long()
    for reduction, expected in (("sum", 0.0), ("mean", math.nan)):
        loss = fused_kd_loss(
            *(student, teacher, positions, positions), reduction=reduction, backend=backend
        )
        torch.testing.assert_close(loss.item(), expected, equal_nan=True)
        assert torch.autograd.grad(loss, student)[0].shape == (0, 9, 2)
    row_loss, parts = kd_loss_rows(
        *(student, teacher, positions, positions),
        temperature=1.0,
        distillation_loss_weight=0.5,
        distillation_loss="mse",
        convention="hf",
        mask=torch.zeros(0, 9, dtype=torch.bool, device=device),
        backend=backend,
    )
    assert row_loss.shape == (0, 2)
    assert parts.shape == (0, 2, 2)


def only(what, change):
    """An unpack hook that changes floats, or those alone whose last dimension is `what`."""
    return lambda x: (
        change(x) if x.is_floating_point() and what in (None, x.shape[-1]) else x.clone()
    )


def transposed(x):
    return x.transpose(0, -1).contiguous().transpose(0, -1)


GIVEN_BACK = {
    "all in other strides": (only(None, transposed), True),
    "negated twice": (only(None, lambda x: torch._neg_view(-x)), True),
    "row_stats in other strides": (only(8, transposed), True),
    "a slice": (only(None, lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]]), True),
    "half": (only(None, torch.Tensor.half), False),
    "double": (only(None, torch.Tensor.double), False),
    "logits in half": (only(2, torch.Tensor.half), False),
    "row_stats in bfloat16": (only(8, torch.Tensor.bfloat16), False),
    "cut": (only(None, lambda x: x[:, :-1]), False),
    "without data": (only(None, lambda x: x.to("meta")), False),
    "sparse": (only(None, torch.Tensor.to_sparse), False),
}


@pytest.mark.parametrize("door", ["loss", "rows", "op"])
@pytest.mark.parametrize("change", GIVEN_BACK)
def test_saved_tensors_come_back_changed(change, door, where):
    """The right gradient, or an error as torch's own losses raise one; never a wrong gradient."""
    backend, device = where
    case = random_case(19, "kl_div", "haystack")
    student = case.student.to(device).requires_grad_()
    teacher, mask = case.teacher.to(device), case.mask.to(device)
    beside = [target.to(device) for target in case.targets]

    def loss():
        if door == "loss":
            return fused_kd_loss(student, teacher, *beside, mask=mask, backend=backend)
        if door == "rows":
            row_loss, _ = kd_loss_rows(
                *(student, teacher, *beside), mask=mask, backend=backend, **CALL
            )
        else:  # what torch.compile leaves in a graph
            op = torch.ops.kdfast.kd_rows_fixed
            row_loss, _ = op(student, None, teacher, None, *beside, mask, 1.7, 0.6, 0, 1.0, backend)
        return row_loss.sum()

    (expected,) = torch.autograd.grad(loss(), student)
    unpack, is_readable = GIVEN_BACK[change]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, unpack):
        value = loss()
    if is_readable:
        assert torch.equal(torch.autograd.grad(value, student)[0], expected)
    else:
        with pytest.raises(RuntimeError, match=r"other tensors than it had saved|invalid gradient"):
            torch.autograd.grad(value, student)


def test_saved_tensors_kept_on_the_cpu(where):
    backend, device = where
    case = random_case(19, "kl_div", "haystack")
    student = VIEWS["heads apart"](case.student.to(device)).requires_grad_()
    beside = [x.to(device) for x in (case.teacher, *case.targets)]
    gradients = []
    for hooks in (nullcontext, torch.autograd.graph.save_on_cpu):
        with hooks():
            loss = fused_kd_loss(student, *beside, backend=backend)
        gradients.append(torch.autograd.grad(loss, student)[0])
    assert torch.equal(*gradients)
