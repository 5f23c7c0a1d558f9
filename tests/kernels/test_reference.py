"""The specification against numbers worked out without it: by hand, and in plain Python."""

import math

import pytest
import torch
from torch.nn import functional as F

from kdfast.fused_kd_loss import kd_loss_rows

INF = math.inf
KINDS = [("kl_div", "haystack"), ("kl_div", "hf"), ("mse", "haystack"), ("mse", "hf")]
LENGTHS = [1, 2, 7, 383, 385, 4096]


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def rows(student, teacher, start, end, **settings):
    """kd_loss_rows by the reference, with defaults; positions may be lists."""
    settings = {
        "temperature": 1.0,
        "distillation_loss_weight": 0.5,
        "distillation_loss": "kl_div",
        "convention": "haystack",
        "mask": None,
        "backend": "reference",
    } | settings
    return kd_loss_rows(student, teacher, torch.tensor(start), torch.tensor(end), **settings)


def log_softmax(values, temperature):
    top = max(values)
    total = math.fsum(math.exp((value - top) / temperature) for value in values)
    return [(value - top) / temperature - math.log(total) for value in values]


def by_hand(student, teacher, target, mask, temperature, weight, kind, convention):
    """Loss, soft part, hard part and gradient of one row, lists in, Python floats out.

    Only positions that take part are ever looked at; the gradients are the closed forms.
    """
    kept = [i for i in range(len(student)) if mask[i]]
    gradient = [0.0] * len(student)
    if not kept:
        return 0.0, 0.0, 0.0, gradient
    s, c = [student[i] for i in kept], [teacher[i] for i in kept]
    soft = hard = 0.0
    if kind == "kl_div":
        scale = temperature**2 * (1.0 if convention == "haystack" else 0.5)
        # A teacher that gives nothing to any position adds nothing.
        log_p = log_softmax(c, temperature) if max(c) > -INF else c
        log_q = log_softmax(s, temperature)
        p, q = [math.exp(value) for value in log_p], [math.exp(value) for value in log_q]
        pairs = zip(p, log_p, log_q, strict=True)
        soft = scale * math.fsum(pi * (lp - lq) for pi, lp, lq in pairs if pi > 0)
        total = math.fsum(p)
        slope = [scale / temperature * (total * qi - pi) for pi, qi in zip(p, q, strict=True)]
    else:
        differences = [si - ci if ci > -INF else 0.0 for si, ci in zip(s, c, strict=True)]
        soft = 0.5 * math.fsum(d * d for d in differences) / len(kept)
        slope = [d / len(kept) for d in differences]
    for i, value in zip(kept, slope, strict=True):
        gradient[i] += weight * value
    if target in kept:
        log_q = log_softmax(s, 1.0)
        hard = -0.5 * log_q[kept.index(target)]
        for i, lq in zip(kept, log_q, strict=True):
            gradient[i] += (1 - weight) * 0.5 * (math.exp(lq) - (i == target))
    return weight * soft + (1 - weight) * hard, soft, hard, gradient


def expected_rows(student, teacher, start, end, mask, *settings):
    """by_hand over a batch of (B, L, 2) tensors: row_loss, row_parts, gradient, in fp64."""
    batch, length, _ = student.shape
    row_loss = torch.zeros(batch, 2, dtype=torch.float64)
    row_parts = torch.zeros(batch, 2, 2, dtype=torch.float64)
    gradient = torch.zeros(batch, length, 2, dtype=torch.float64)
    for b in range(batch):
        for head, target in enumerate((start[b], end[b])):
            s, c = student[b, :, head].tolist(), teacher[b, :, head].tolist()
            loss, soft, hard, slope = by_hand(s, c, target, mask[b].tolist(), *settings)
            row_loss[b, head] = loss
            row_parts[b, head] = torch.tensor([soft, hard], dtype=torch.float64)
            gradient[b, :, head] = torch.tensor(slope, dtype=torch.float64)
    return row_loss, row_parts, gradient


def close(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def awkward_batch(length, generator):
    """fp64 logits, targets and a mask: one line per case of a window that is easy to get wrong."""

    def noise():
        return 3 * torch.randn(7, length, 2, generator=generator, dtype=torch.float64)

    student, teacher = noise(), noise()
    mask = torch.rand(7, length, generator=generator) < 0.7
    start, end = [0, -100, length, 0, length - 1, 0, 2**40], [length - 1] * 7
    mask[0] = True  # nothing masked
    mask[1], mask[1, length // 2] = False, True  # one position takes part, no target
    mask[2], mask[3] = True, False  # target just outside; a window that is all masked
    mask[4, length - 1] = True  # target at the last position that takes part
    student[5], teacher[5], mask[5, 0] = 0.25, -1.0, True  # equal logits
    mask[6, 0], student[6] = True, student[6] * 200  # huge logits, target beyond int32
    teacher[4, :-1, 0] = -INF  # a teacher that is sure
    teacher[6, :, 1] = -INF  # a teacher that says nothing
    return student, teacher, start, end, mask


def test_kl_of_two_positions_by_hand():
    # softmax(0, ln 3) = (1/4, 3/4) against (1/2, 1/2); the end head agrees exactly.
    student = torch.zeros(1, 2, 2, dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[[0.0, 1.0], [math.log(3), 1.0]]], dtype=torch.float64)
    row_loss, row_parts = rows(student, teacher, [1], [-100], distillation_loss_weight=0.75)
    kl = math.log(3) * 3 / 4 - math.log(2)
    ce = math.log(2)
    close(row_parts, torch.tensor([[[kl, ce / 2], [0.0, 0.0]]], dtype=torch.float64))
    close(row_loss, torch.tensor([[0.75 * kl + 0.25 * ce / 2, 0.0]], dtype=torch.float64))
    row_loss.sum().backward()
    # 3/4 (q - p) + 1/4 (q - y)/2, y the second position: 3/16 + 1/16, and its opposite.
    close(student.grad[0, :, 0], torch.tensor([0.25, -0.25], dtype=torch.float64))
    assert torch.equal(student.grad[0, :, 1], torch.zeros(2, dtype=torch.float64))


def test_temperature_squared_by_hand():
    # Logits twice as far apart at T = 2 give the same p: 4 times the loss, 2 times the gradient.
    student = torch.zeros(1, 2, 2, dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[[0.0, 0.0], [2 * math.log(3), 0.0]]], dtype=torch.float64)
    row_loss, _ = rows(student, teacher, [0], [0], temperature=2.0, distillation_loss_weight=1.0)
    close(row_loss[0, 0].item(), 4 * (math.log(3) * 3 / 4 - math.log(2)))
    row_loss.sum().backward()
    close(student.grad[0, :, 0], torch.tensor([0.5, -0.5], dtype=torch.float64))


def test_mse_of_three_positions_by_hand():
    # Start: differences 1, 2 and a masked one: (1 + 4)/2 positions/2 heads. End: 0, 3: 9/4.
    student = torch.tensor([[[1.0, 5.0], [2.0, 3.0], [9.0, math.nan]]], requires_grad=True)
    teacher = torch.tensor([[[0.0, 5.0], [0.0, 0.0], [math.nan, 9.0]]])
    mask = torch.tensor([[True, True, False]])
    for temperature in (1.0, 4.0):
        row_loss, row_parts = rows(
            *(student, teacher, [0], [0]),
            mask=mask,
            temperature=temperature,
            distillation_loss="mse",
            distillation_loss_weight=1.0,
        )
        close(row_loss, torch.tensor([[1.25, 2.25]]), 1e-6)
        close(row_parts[..., 0], torch.tensor([[1.25, 2.25]]), 1e-6)
    row_loss.sum().backward()
    close(student.grad, torch.tensor([[[0.5, 0.0], [1.0, 1.5], [0.0, 0.0]]]), 1e-6)


def haystack_loss(student, teacher, start, end, temperature, weight):
    """As Haystack computes it, the whole batch at once: batchmean divides by B and sums the heads.

    Cross-entropy is taken per head and averaged over the two; the soft term carries T^2.
    """
    distance = F.kl_div(
        torch.log_softmax(student / temperature, dim=1),
        torch.softmax(teacher / temperature, dim=1),
        reduction="batchmean",
    )
    hard = (
        F.cross_entropy(student[..., 0], torch.tensor(start), reduction="none")
        + F.cross_entropy(student[..., 1], torch.tensor(end), reduction="none")
    ) / 2
    return weight * temperature**2 * distance + (1 - weight) * hard.mean()


def test_agrees_with_haystack_without_a_mask(generator):
    student = torch.randn(5, 11, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(5, 11, 2, generator=generator, dtype=torch.float64)
    start, end = [0, 3, 10, 1, 2], [0, 4, 10, 9, 2]
    row_loss, _ = rows(student, teacher, start, end, temperature=1.5, distillation_loss_weight=0.75)
    theirs = haystack_loss(student, teacher, start, end, 1.5, 0.75)
    close(row_loss.sum() / 5, theirs)
    ours_gradient = torch.autograd.grad(row_loss.sum() / 5, student)[0]
    close(ours_gradient, torch.autograd.grad(theirs, student)[0])


def test_conventions_differ_by_the_half_of_the_soft_part(generator):
    student, teacher = torch.randn(2, 3, 9, 2, generator=generator, dtype=torch.float64)
    _, summed = rows(student, teacher, [0] * 3, [1] * 3, convention="haystack")
    _, averaged = rows(student, teacher, [0] * 3, [1] * 3, convention="hf")
    close(summed[..., 0], 2 * averaged[..., 0])
    assert torch.equal(summed[..., 1], averaged[..., 1])


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind, convention", KINDS)
def test_awkward_windows_against_plain_python(kind, convention, length, generator):
    student, teacher, start, end, mask = awkward_batch(length, generator)
    expected = expected_rows(student, teacher, start, end, mask, 1.7, 0.6, kind, convention)
    # What is masked out is poison: it may reach neither the loss nor the gradient.
    student = student.masked_fill(~mask[..., None], math.nan).requires_grad_()
    teacher = teacher.masked_fill(~mask[..., None], math.nan)
    row_loss, row_parts = rows(
        *(student, teacher, start, end),
        temperature=1.7,
        distillation_loss_weight=0.6,
        distillation_loss=kind,
        convention=convention,
        mask=mask,
    )
    # Not even on the way: anomaly mode raises where a step of the backward pass makes a NaN.
    with torch.autograd.detect_anomaly():
        row_loss.sum().backward()
    for actual, value in zip((row_loss, row_parts, student.grad), expected, strict=True):
        close(actual.detach(), value)
    assert (student.grad[~mask] == 0).all()
    assert not row_parts.requires_grad


def test_the_comparison_can_fail(generator):
    student, teacher, start, end, mask = awkward_batch(7, generator)
    row_loss, _, _ = expected_rows(student, teacher, start, end, mask, 1.7, 0.6, "kl_div", "hf")
    student[0, 0, 0] += 1e-9
    moved, _ = rows(
        *(student, teacher, start, end),
        temperature=1.7,
        distillation_loss_weight=0.6,
        convention="hf",
        mask=mask,
    )
    with pytest.raises(AssertionError):
        close(moved, row_loss)


@pytest.mark.parametrize("form", ["tensor", "pair"])
@pytest.mark.parametrize("kind, convention", KINDS)
def test_gradcheck(kind, convention, form, generator):
    # Windows 0 and 2 of the awkward ones have a target to ignore; 3 has no position at all.
    student, teacher, start, end, mask = (part[:6] for part in awkward_batch(5, generator))
    inputs = student.unbind(-1) if form == "pair" else (student,)
    inputs = [part.contiguous().requires_grad_() for part in inputs]

    def loss(*logits):
        return rows(
            *(logits if form == "pair" else logits[0], teacher, start, end),
            temperature=1.3,
            distillation_loss_weight=0.4,
            distillation_loss=kind,
            convention=convention,
            mask=mask,
        )[0]

    assert torch.autograd.gradcheck(loss, inputs)


def test_student_may_be_sure_of_no_where_the_teacher_is():
    # Both give the middle position probability 0; the rest are two positions by hand.
    student = torch.tensor([[[0.0], [-INF], [0.0]]], dtype=torch.float64).repeat(1, 1, 2)
    teacher = torch.tensor([[[0.0], [-INF], [math.log(3)]]], dtype=torch.float64).repeat(1, 1, 2)
    student.requires_grad_()
    for kind, soft, slope in (
        ("kl_div", math.log(3) * 3 / 4 - math.log(2), [0.25, 0.0, -0.25]),
        ("mse", math.log(3) ** 2 / 3 / 2, [0.0, 0.0, -math.log(3) / 3]),
    ):
        row_loss, row_parts = rows(
            student, teacher, [0], [2], distillation_loss=kind, distillation_loss_weight=1.0
        )
        close(row_parts[0, :, 0], torch.tensor([soft, soft], dtype=torch.float64))
        gradient = torch.autograd.grad(row_loss.sum(), student)[0]
        close(gradient[0, :, 0], torch.tensor(slope, dtype=torch.float64))


def test_a_part_of_weight_zero_is_left_out():
    student = torch.tensor([[[0.0], [-INF], [0.0]]]).repeat(1, 1, 2).requires_grad_()
    teacher = torch.zeros(1, 3, 2)
    # The soft part is infinite: the student excludes what the teacher allows.
    hard_only, parts = rows(student, teacher, [0], [0], distillation_loss_weight=0.0)
    assert parts[0, 0, 0] == INF
    close(hard_only, torch.full((1, 2), math.log(2) / 2), 1e-6)
    # The hard part is infinite: the student excludes the answer.
    soft_only, parts = rows(student, student.detach(), [1], [1], distillation_loss_weight=1.0)
    assert parts[0, 0, 1] == INF
    assert torch.equal(soft_only, torch.zeros(1, 2))
    for loss in (hard_only, soft_only):
        assert torch.autograd.grad(loss.sum(), student)[0].isfinite().all()


@pytest.mark.parametrize("kind", ["kl_div", "mse"])
@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_nan_that_takes_part_is_not_hidden(whose, kind):
    logits = {"student": torch.zeros(1, 3, 2), "teacher": torch.zeros(1, 3, 2)}
    logits["teacher"][0, 2] = -INF
    logits[whose][0, 1, 0] = math.nan
    row_loss, _ = rows(logits["student"], logits["teacher"], [-100], [0], distillation_loss=kind)
    assert row_loss[0, 0].isnan()
    assert row_loss[0, 1].isfinite()
