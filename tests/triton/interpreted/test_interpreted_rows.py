"""The Triton kernels, run by Triton's interpreter, against the reference in fp64.

Tolerance: maximum and mean error, of loss, parts and gradient apart, may be as large as those of
the fp32 reference on the same inputs plus EPSILON. Errors are relative: to a loss or part, where it
is above 1, and to a row's largest gradient or the gradient of its loss. EPSILON is 8 roundings of
fp32: the chain from the sums to a row's loss has that many (1/T, T^2, /z, log, products, sums).
For fp64 it is 64 roundings of fp64, as nothing more exact is at hand: the reference's error counts
as 0.
"""

import math

import numpy as np
import pytest
import torch

from kdfast.kernels import reference, triton_launch

EPSILON = {torch.float32: 8 * 2.0**-24, torch.float64: 64 * 2.0**-53}
KINDS = [("kl_div", "haystack"), ("kl_div", "hf"), ("mse", "haystack")]
INF = math.inf

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy on -inf - -inf


def awkward_batch(length, seed=0):
    """fp64 (B, L, 2) student and teacher, targets, mask: a window for each awkward case."""
    generator = torch.Generator().manual_seed(seed)

    def noise():
        return 3 * torch.randn(7, length, 2, generator=generator, dtype=torch.float64)

    student, teacher = noise(), noise()
    mask = torch.rand(7, length, generator=generator) < 0.7
    start = torch.tensor([0, -100, length, 0, length - 1, 0, 2**40])
    end = torch.full((7,), length - 1, dtype=torch.int32)
    mask[0] = True
    mask[1], mask[1, length // 2] = False, True  # one position takes part, no target
    mask[2], mask[3] = True, False  # a target just outside; nothing takes part
    mask[4, length - 1] = True  # the target is the last position that takes part
    student[5], teacher[5], mask[5, 0] = 0.25, -1.0, True  # equal logits
    mask[6, 0], student[6] = True, student[6] * 200  # huge logits
    teacher[4, :-1, 0] = -INF  # a teacher that is sure
    teacher[6, :, 1] = -INF  # a teacher that says nothing
    return student, teacher, (start, end), mask


def contiguous(x):
    return x.contiguous()


def pair(x):
    return x[..., 0].contiguous(), x[..., 1].contiguous()


def behind_a_window(x):
    """A view whose first row begins one (odd) row into its memory, NaN around it."""
    buffer = x.new_full((x.shape[0] + 2, *x.shape[1:]), math.nan)
    buffer[1:-1] = x
    return buffer[1:-1]


def behind_an_element(x):
    """Start logits at odd elements."""
    buffer = x.new_full((x.numel() + 2,), math.nan)
    buffer[1:-1] = x.reshape(-1)
    return buffer[1:-1].view(x.shape)


def padded(x):
    buffer = x.new_full((x.shape[0], x.shape[1] + 3, 2), math.nan)
    buffer[:, :-3] = x
    return buffer[:, :-3]


def heads_first(x):
    return x.permute(2, 0, 1).contiguous().permute(1, 2, 0)


def windows_last(x):
    return x.permute(1, 2, 0).contiguous().permute(2, 0, 1)


def uneven_pair(x):
    return x[..., 0].contiguous(), padded(x)[..., 1]


FORMS = [
    *(contiguous, pair, behind_a_window, behind_an_element, padded),
    *(heads_first, windows_last, uneven_pair),
]


def settings_of(kind, convention, temperature, weight):
    half = kind == "mse" or convention == "hf"
    return temperature, weight, 0 if kind == "kl_div" else 1, 0.5 if half else 1.0


def heads(logits):
    """As a backend is given logits: one tensor and None, or two."""
    return logits if isinstance(logits, tuple) else (logits, None)


def by_triton(memory, student, teacher, targets, mask, g, kind, convention, temperature, weight):
    """Loss, parts and gradient (B, L, 2)."""
    settings = settings_of(kind, convention, temperature, weight)
    memory.allow(student, teacher, targets, mask, g)
    tensors = (*heads(student), *heads(teacher), *targets, mask)
    if isinstance(student, tuple):  # what an uneven pair is copied to
        copy, operand_of = [], triton_launch.Operand.of

        def seen(*logits):
            operand = operand_of(*logits)
            copy.append(operand)
            memory.allow(operand.tensor, operand.end)
            return operand

        triton_launch.Operand.of = seen
    try:
        row_loss, row_stats = triton_launch.forward(tensors, settings)
        grads = triton_launch.backward(g, tensors, row_stats, settings)
    finally:
        if isinstance(student, tuple):
            triton_launch.Operand.of = operand_of
    is_one = grads[1] is None
    for grad in grads[:1] if is_one else grads:
        assert grad.is_contiguous()
    return row_loss, row_stats[..., 5:7], grads[0] if is_one else torch.stack(grads, 2)


def by_reference(student, teacher, targets, mask, g, kind, convention, temperature, weight):
    student = torch.stack(student, 2) if isinstance(student, tuple) else student
    student = student.detach().clone().requires_grad_()
    row_loss, row_parts = reference.kd_loss_rows(
        *(student, teacher, *targets),
        temperature=temperature,
        distillation_loss_weight=weight,
        distillation_loss=kind,
        convention=convention,
        mask=mask,
    )
    (grad,) = torch.autograd.grad(row_loss, student, g.to(row_loss.dtype))
    return row_loss.detach(), row_parts, grad


def doubled(logits):
    if isinstance(logits, tuple):
        return tuple(tensor.double() for tensor in logits)
    return None if logits is None else logits.double()


def summary(error, actual, exact):
    """Maximum and mean over what is finite; the rest must be non-finite in both."""
    is_finite = exact.to(actual.dtype).isfinite()
    assert torch.equal(actual.isfinite(), is_finite), "finite in one, not in the other"
    error = error[is_finite]
    return (error.max().item(), error.mean().item()) if error.numel() else (0.0, 0.0)


def errors(actual, exact, g):
    """Maximum and mean relative errors of loss, parts and gradient, by name."""
    found = {}
    for name, ours, true in zip(("loss", "parts", "gradient"), actual, exact, strict=True):
        size = torch.nan_to_num(true, posinf=0.0, neginf=0.0).abs()
        if name == "gradient":
            size = torch.maximum(size.amax(1, keepdim=True), g.double()[:, None, :])
            size = size.clamp(min=1e-300)
        else:
            size = size.clamp(min=1.0)
        error = (ours.double() - true).abs() / size
        maximum, mean = summary(error, ours, true)
        found |= {f"maximum error of {name}": maximum, f"mean error of {name}": mean}
    return found


def compare(actual, exact, plain, g, epsilon=None):
    """Each: loss, parts, gradient; plain by the reference in the type of actual."""
    acc = actual[0].dtype
    allowed = errors(plain, exact, g)
    for name, error in errors(actual, exact, g).items():
        bound = (epsilon or EPSILON[acc]) + (allowed[name] if acc == torch.float32 else 0.0)
        assert error <= bound, f"{name}: {error:.3g}, allowed {bound:.3g}"


def check(memory, student, teacher, targets, mask, g, *settings, epsilon=None):
    actual = by_triton(memory, student, teacher, targets, mask, g, *settings)
    exact = by_reference(doubled(student), doubled(teacher), targets, mask, g.double(), *settings)
    plain = by_reference(student, teacher, targets, mask, g, *settings)
    compare(actual, exact, plain, g, epsilon)
    assert actual[2].dtype == (student if isinstance(student, torch.Tensor) else student[0]).dtype
    if mask is not None:
        assert (actual[2][~mask] == 0).all()


def grad_row_loss(student, scale=1.0):
    first = student[0] if isinstance(student, tuple) else student
    acc = torch.float64 if first.dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(1)
    return scale / 7 * torch.rand(first.shape[0], 2, generator=generator).to(acc)


def poisoned(logits, mask):
    return logits.masked_fill(~mask[..., None], math.nan)


@pytest.mark.sample(2)
@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("kind, convention", KINDS)
@pytest.mark.parametrize("length", [1, 7, 383, 385])
def test_awkward_windows(length, kind, convention, temperature, memory):
    student, teacher, targets, mask = awkward_batch(length)
    student, teacher = poisoned(student, mask).float(), poisoned(teacher, mask).float()
    g = grad_row_loss(student)
    check(memory, student, teacher, targets, mask, g, kind, convention, temperature, 0.6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind, convention", KINDS)
def test_the_kernels_divide_loss_and_gradient(kind, convention, dtype, memory):
    student, teacher, targets, mask = awkward_batch(37)
    student, teacher = student[:5].to(dtype), teacher[:5].to(dtype)
    targets, mask = tuple(target[:5] for target in targets), mask[:5]
    settings, one = (kind, convention, 1.7, 0.6), torch.tensor(3.0, dtype=dtype)
    memory.allow(student, teacher, targets, mask, one)
    tensors = (student, None, teacher, None, *targets, mask)
    numbers = settings_of(*settings)
    loss, row_stats = triton_launch.forward(tensors, numbers, 7)
    gradient, _ = triton_launch.backward(one, tensors, row_stats, numbers, 7)
    each = one.expand(5, 2)
    given = [
        (s, t, targets, mask, g, *settings)
        for s, t, g in (
            (student.double(), teacher.double(), each.double() / 7),
            (student, teacher, each / 7),
        )
    ]
    (rows, parts, slope), plain = (by_reference(*arguments) for arguments in given)
    exact = rows.sum()[None] / 7, parts, slope
    plain = plain[0].sum()[None] / 7, *plain[1:]
    compare((loss[None], row_stats[..., 5:7], gradient), exact, plain, each / 7)


@pytest.mark.parametrize("form", [contiguous, pair])
@pytest.mark.parametrize("kind, convention", KINDS)
def test_long_rows(kind, convention, form, memory):
    student, teacher, targets, mask = awkward_batch(4097)
    some = [0, 4, 6]
    targets = tuple(target[some] for target in targets)
    student, teacher, mask = student[some], teacher[some], mask[some]
    # The first blocks are left out altogether, as a question's tokens might be: no maximum yet.
    mask[1, :2200] = False
    student = form(poisoned(student, mask).float())
    teacher = form(poisoned(teacher, mask).float())
    g = grad_row_loss(student)
    check(memory, student, teacher, targets, mask, g, kind, convention, 1.7, 0.6)


def test_the_longest_rows(memory):
    generator = torch.Generator().manual_seed(0)
    # Both drift: every block finds new maxima, and what was summed before must follow.
    drift = torch.linspace(0, 60, 32_769)[:, None]
    student = torch.randn(1, 32_769, 2, generator=generator) + drift
    teacher = torch.randn(1, 32_769, 2, generator=generator) + drift.flip(0)
    targets = torch.tensor([32_768]), torch.tensor([5])
    g = grad_row_loss(student)
    check(memory, student, teacher, targets, None, g, "kl_div", "haystack", 2.0, 0.75)


@pytest.mark.sample(4)
@pytest.mark.parametrize("length", [7, 383, 384])
@pytest.mark.parametrize("form", FORMS)
def test_strides(form, length, memory):
    student, teacher, targets, mask = awkward_batch(length)
    student = form(poisoned(student, mask).float())
    g = grad_row_loss(student)
    mask = torch.stack((mask, ~mask), 2)[..., 0]
    settings = ("kl_div", "haystack", 1.7, 0.6)
    check(memory, student, form(teacher.float()), targets, mask, g, *settings)
    if length == 7:
        for other in (contiguous, pair):
            check(memory, student, other(teacher.float()), targets, mask, g, *settings)


@pytest.mark.sample(4)
@pytest.mark.parametrize("form", [contiguous, pair])
@pytest.mark.parametrize("scale", [1.0, 65_536.0])
@pytest.mark.parametrize(
    "student_type, teacher_type",
    [
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float64),
        (torch.float64, torch.float64),
        (torch.float64, torch.bfloat16),
    ],
)
def test_types(student_type, teacher_type, scale, form, memory):
    student, teacher, targets, mask = awkward_batch(51)
    student = form(poisoned(student, mask).to(student_type))
    teacher = form(poisoned(teacher, mask).to(teacher_type))
    g = grad_row_loss(student, scale)
    check(memory, student, teacher, targets, mask, g, "kl_div", "haystack", 1.7, 0.6)
    check(memory, student, teacher, targets, mask, g, "mse", "haystack", 1.0, 0.6)


@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["kl_div", "mse"])
def test_a_part_of_weight_zero_is_left_out(kind, weight, memory):
    """The student excludes the answer, or what the teacher allows: that part is infinite."""
    student = torch.tensor([0.0, -INF, 0.0])[None, :, None].repeat(1, 1, 2)
    teacher = torch.zeros(1, 3, 2)
    if weight == 1.0:
        teacher[:, 1] = -INF
    target = torch.tensor([0 if weight == 0.0 else 1])
    arguments = (memory, student, teacher, (target, target), None, grad_row_loss(student))
    check(*arguments, kind, "haystack", 1.5, weight)


def test_a_hard_part_that_is_nan_is_left_out(memory):
    student, teacher, targets, _ = awkward_batch(9)
    student[0, 3], teacher[0, 3] = INF, -INF
    student[1], teacher[1] = -INF, -INF
    g = grad_row_loss(student.float())
    arguments = (memory, student.float(), teacher.float(), targets, None, g)
    row_loss, _, grad = by_triton(*arguments, "mse", "haystack", 1.5, 1.0)
    assert row_loss.isfinite().all()
    assert grad.isfinite().all()


def test_no_teacher(memory):
    student, _, targets, mask = awkward_batch(9)
    g = grad_row_loss(student)
    check(memory, student, None, targets, mask, g, "kl_div", "haystack", 1.5, 0.0)
    check(memory, pair(student.float()), None, targets, None, g, "mse", "haystack", 1.5, 0.0)


@pytest.mark.parametrize("kind", ["kl_div", "mse"])
@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_nan_that_takes_part_is_not_hidden(whose, kind, memory):
    logits = {"student": torch.zeros(1, 3, 2), "teacher": torch.zeros(1, 3, 2)}
    logits["teacher"][0, 2] = -INF
    logits[whose][0, 1, 0] = math.nan
    targets = torch.tensor([-100]), torch.tensor([0])
    g = grad_row_loss(logits["student"])
    student, teacher = logits.values()
    row_loss, _, _ = by_triton(
        memory, student, teacher, targets, None, g, kind, "haystack", 1.0, 0.5
    )
    assert row_loss[0, 0].isnan()
    assert row_loss[0, 1].isfinite()


def test_gradient_of_rows_of_any_stride(memory):
    student, teacher, targets, mask = awkward_batch(9)
    settings = ("kl_div", "hf", 1.5, 0.5)
    for g in (torch.tensor(0.25).expand(7, 2), torch.rand(2, 7).t(), torch.rand(7, 5)[:, ::3]):
        check(memory, student.float(), teacher.float(), targets, mask, g, *settings)


def test_strided_masks_and_targets(memory):
    student, teacher, targets, mask = awkward_batch(9)
    masks = mask.t().contiguous().t(), mask[:1].expand(7, 9), torch.stack((mask, ~mask), 2)[..., 0]
    targets = tuple(torch.stack((target, target + 1), 1)[:, 0] for target in targets)
    g = grad_row_loss(student)
    for one in masks:
        check(memory, student, teacher, targets, one, g, "kl_div", "hf", 1.5, 0.5)


def test_an_expanded_teacher(memory):
    student, teacher, targets, mask = awkward_batch(383)
    teacher = teacher[:1].float().expand(7, 383, 2)
    g = grad_row_loss(student.float())
    check(memory, student.float(), teacher, targets, mask, g, "kl_div", "haystack", 1.5, 0.5)


def test_an_empty_batch(memory):
    student = torch.zeros(0, 5, 2)
    targets = (torch.zeros(0, dtype=torch.int64),) * 2
    row_loss, parts, grad = by_triton(
        memory, student, student, targets, None, torch.zeros(0, 2), "mse", "hf", 1.0, 0.5
    )
    assert row_loss.shape == (0, 2)
    assert parts.shape == (0, 2, 2)
    assert grad.shape == student.shape


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_with_exponentials_of_a_gpu(temperature, memory, monkeypatch):
    """tl.exp there is 2 to the fp32 product x log2(e), with a relative error up to 2^-22."""
    from triton.runtime import interpreter

    noise = np.random.default_rng(0)

    def exp(self, operand):
        x = operand.data
        error = noise.uniform(-(2.0**-22), 2.0**-22, x.shape)
        product = (x * np.float32(math.log2(math.e))).astype(np.float64)
        value = (np.exp2(product) * (1 + error)).astype(x.dtype)
        return interpreter.TensorHandle(value, operand.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_exp", exp)
    student, teacher, targets, mask = awkward_batch(385)
    student, teacher = poisoned(student, mask).float(), poisoned(teacher, mask).float()
    g = grad_row_loss(student)
    for kind, convention in KINDS:
        settings = (kind, convention, temperature, 0.6)
        # Numerator and sum both hold exponentials: two errors of 4 roundings on top of the 8.
        check(memory, student, teacher, targets, mask, g, *settings, epsilon=16 * 2.0**-24)


@pytest.mark.parametrize("what", ["student", "teacher", "target", "mask", "gradient of a row"])
def test_the_check_can_fail(what, memory):
    """The kernels are given one value of 383 that is a little off."""
    student, teacher, targets, mask = awkward_batch(383)
    student, teacher = student.float(), teacher.float()
    g = grad_row_loss(student)
    settings = ("kl_div", "haystack", 1.7, 0.6)
    exact = by_reference(student.double(), teacher.double(), targets, mask, g.double(), *settings)
    plain = by_reference(student, teacher, targets, mask, g, *settings)
    compare(by_triton(memory, student, teacher, targets, mask, g, *settings), exact, plain, g)
    likely = student[0, :, 0].argmax()
    if what == "student":
        student[0, likely, 0] += 1e-4
    elif what == "teacher":
        teacher[0, teacher[0, :, 0].argmax(), 0] += 1e-4
    elif what == "target":
        targets[0][0] += 1
    elif what == "mask":
        mask[0, likely] = False
    else:
        g[0, 0] *= 1.0 + 1e-5
    actual = by_triton(memory, student, teacher, targets, mask, g, *settings)
    for index in (0, 2) if what != "gradient of a row" else (2,):
        moved = list(plain)
        moved[index] = actual[index]
        with pytest.raises(AssertionError, match="error of"):
            compare(moved, exact, plain, g)


def test_memory_is_looked_at(memory):
    """A mask that is not known to the guard, and an output that a kernel leaves alone."""
    student = torch.zeros(2, 5, 2)
    memory.allow(student)
    start, end = (torch.zeros(2, dtype=torch.int64),) * 2
    tensors = (student, None, student, None, start, end, None)
    with pytest.raises(Exception, match="outside every tensor"):
        triton_launch.forward(tensors, settings_of("mse", "hf", 1.0, 0.5))
    assert memory.empty((3,), dtype=torch.float32, device="cpu").isnan().all()


def test_why_not():
    assert triton_launch.why_not(torch.zeros(1)) is None
    assert "interpreter" in triton_launch.why_not(torch.zeros(1, device="meta"))
