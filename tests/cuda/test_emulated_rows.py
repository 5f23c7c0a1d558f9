"""The CUDA rows, run thread by thread on the CPU, against kdfast.kernels.reference in fp64.

The tolerance is the error of the reference itself on the same inputs, plus ULPS units in the last
place of the accumulating type at the size of the terms that are added up.
"""

import math

import emulator
import pytest
import torch

from kdfast.kernels import reference

pytestmark = pytest.mark.program

INF, NAN = math.inf, math.nan
FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
ALL_TYPES = [FP16, BF16, FP32, FP64]
ULPS = 4
SEEDS = (0, 1, 2, 3)
# kind, convention, soft_scale
KINDS = {
    "kl-haystack": (0, "haystack", 1.0),
    "kl-hf": (0, "hf", 0.5),
    "mse": (1, "haystack", 0.5),
}
FORMS = ["interleaved", "pair", "offset", "head-first", "every-second", "backwards", "expanded"]


def lay_out(values, form):
    """(B, L, 2) values as a tensor, or a pair, of the given layout in memory."""
    batch, length, _ = values.shape
    if form == "pair":
        return tuple(head.contiguous() for head in values.unbind(2))
    if form == "offset":  # one element in: aligned to nothing wider
        return torch.cat((values.new_full((1,), NAN), values.flatten()))[1:].view(values.shape)
    if form == "offset-pair":
        return tuple(
            torch.cat((values.new_full((1,), NAN), head.flatten()))[1:].view(batch, length)
            for head in values.unbind(2)
        )
    if form == "head-first":
        return values.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    if form == "every-second":
        wide = values.new_full((batch, 2 * length, 2), NAN)
        wide[:, ::2] = values
        return wide[:, ::2]
    if form == "backwards":  # a pair whose end head lies before its start head
        wide = torch.stack((values[..., 1], values[..., 0]))
        return wide[1], wide[0]
    if form == "expanded":  # all windows share the first one's memory
        return values[:1].expand(batch, length, 2)
    if form == "cut":  # the first positions of longer windows
        wide = values.new_full((batch, length + 5, 2), NAN)
        wide[:, :length] = values
        return wide[:, :length]
    return values.contiguous()


class Case:
    """One call: its arguments, and what it must give."""

    def __init__(
        self,
        student,
        teacher,
        start,
        end,
        mask=None,
        *,
        kind="kl-haystack",
        temperature=1.7,
        weight=0.6,
        divisor=1,
        forms=("interleaved", "interleaved"),
    ):
        self.student = lay_out(student, forms[0])
        self.teacher = None if teacher is None else lay_out(teacher, forms[1])
        self.targets = torch.as_tensor(start), torch.as_tensor(end)
        self.mask = mask
        number, self.convention, soft_scale = KINDS[kind]
        self.settings = {
            "temperature": temperature,
            "weight": weight,
            "kind": number,
            "soft_scale": soft_scale,
            "divisor": divisor,
        }
        torch.manual_seed(5)
        self.grad_row_loss = torch.randn(len(student), 2, dtype=emulator.sum_type(self.student))

    def run(self, rows, seed=0):
        """row_loss, row_parts and the gradient (B, L, 2) by the emulated kernels."""
        arguments = (self.student, self.teacher, self.targets, self.mask)
        row_loss, stats = rows.forward(*arguments, seed=seed, **self.settings)
        gradient = rows.backward(self.grad_row_loss, *arguments, stats, seed=seed, **self.settings)
        return row_loss, stats[..., 5:7], gradient

    def refer(self, dtype=None):
        """The same by the reference, in the student's type or in another."""
        student = torch.stack(emulator.heads(self.student), 2).detach()
        student = student.to(dtype or student.dtype).requires_grad_()
        teacher = self.teacher
        if teacher is not None:
            teacher = torch.stack(emulator.heads(teacher), 2).to(dtype or teacher[0].dtype)
        row_loss, parts = reference.kd_loss_rows(
            student,
            teacher,
            *self.targets,
            temperature=self.settings["temperature"],
            distillation_loss_weight=self.settings["weight"],
            distillation_loss="mse" if self.settings["kind"] else "kl_div",
            convention=self.convention,
            mask=self.mask,
        )
        row_loss = row_loss / self.settings["divisor"]
        if row_loss.requires_grad:
            row_loss.backward(self.grad_row_loss.to(row_loss.dtype))
        gradient = torch.zeros_like(student) if student.grad is None else student.grad
        return row_loss.detach(), parts, gradient

    def sizes(self):
        """Of the terms that are added up: a soft part is their difference, however small."""
        heads = emulator.heads(self.student)
        t, length = self.settings["temperature"], heads[0].shape[1]
        largest = max(float(head.nan_to_num(0, 0, 0).abs().max()) for head in heads)
        slope = float(self.grad_row_loss.abs().max()) * max(t, 1.0)
        term = t * max(t * (1 + math.log(length)), largest)
        if self.settings["kind"] == 1:
            term, slope = max(term, largest**2), slope * max(1.0, largest)
        divisor = self.settings["divisor"]
        return term / divisor, term, slope / divisor


def check(rows, case, seeds=(0,)):
    """Every seed gives the same bits, as near to fp64 as the reference comes."""
    exact = [value.double() for value in case.refer(FP64)]
    own = [value.double() for value in case.refer()]
    ulp = torch.finfo(emulator.sum_type(case.student)).eps
    first = None
    for seed in seeds:
        found = case.run(rows, seed)
        first = first or found
        for name, want, reached, got, bits, size in zip(
            ("row_loss", "row_parts", "gradient"),
            exact,
            own,
            found,
            first,
            case.sizes(),
            strict=True,
        ):
            assert got.equal(bits), f"{name} depends on the order of the threads (seed {seed})"
            for measure in (torch.max, torch.mean):
                error = measure((got.double() - want).abs())
                allowed = measure((reached - want).abs()) + ULPS * ulp * size
                assert error <= allowed, (name, measure.__name__, float(error), float(allowed))
    if case.mask is not None:
        assert (first[2][~case.mask] == 0).all()


def random_case(length, batch=3, types=(FP32, FP32), scale=3.0, mask=None, **settings):
    generator = torch.Generator().manual_seed(length)
    logits = [
        (torch.randn(batch, length, 2, generator=generator) * scale).to(dtype) for dtype in types
    ]
    start = torch.randint(0, length, (batch,), generator=generator)
    end = torch.randint(0, length, (batch,), generator=generator, dtype=torch.int32)
    return Case(*logits, start, end, mask, **settings)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 2, 7, 37, 383, 384, 385])
def test_lengths(rows, length, kind):
    check(rows, random_case(length, kind=kind), SEEDS)


@pytest.mark.parametrize("length", [4096, 32_771])
@pytest.mark.parametrize("dtype", [FP16, FP32])
def test_long_rows(rows, length, dtype):
    check(rows, random_case(length, batch=1, types=(dtype, dtype)), seeds=(1, 2))


@pytest.mark.parametrize("teacher", ALL_TYPES)
@pytest.mark.parametrize("student", ALL_TYPES)
@pytest.mark.parametrize("form", ["interleaved", "pair"])
def test_types(rows, student, teacher, form):
    check(rows, random_case(101, types=(student, teacher), forms=(form, form)), seeds=(1,))


@pytest.mark.parametrize("teacher", [*FORMS, "offset-pair", "cut"])
@pytest.mark.parametrize("student", [*FORMS, "offset-pair", "cut"])
def test_layouts(rows, student, teacher):
    check(rows, random_case(37, types=(FP32, FP16), forms=(student, teacher)))


def masks(length, batch=4):
    """Padding; holes, whatever the alignment; one valid position; none."""
    mask = torch.zeros(batch, length, dtype=torch.bool)
    mask[0, : length - length // 3] = True
    mask[1] = torch.rand(length, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[2, length // 2] = True
    return mask


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 37, 384, 385])
@pytest.mark.parametrize("layout", ["contiguous", "shared", "strided"])
def test_masks(rows, length, kind, layout):
    mask = masks(length)
    if layout == "shared":
        mask = mask[:1].expand(4, length)
    if layout == "strided":
        mask = mask.t().contiguous().t()
    case = random_case(length, batch=4, mask=mask, kind=kind)
    for head in (*emulator.heads(case.student), *emulator.heads(case.teacher)):
        head.masked_fill_(~mask, NAN)  # what is masked never matters
    check(rows, case, SEEDS)


@pytest.mark.parametrize("start", [-100, -1, 0, 5, 24, 25, 36, 37, 2**31 - 1])
@pytest.mark.parametrize("bits", [torch.int32, torch.int64])
def test_targets(rows, start, bits):
    mask = masks(37)[:1]
    case = random_case(37, batch=1, mask=mask)
    case.targets = torch.tensor([start], dtype=bits), torch.tensor([24], dtype=bits)
    check(rows, case)


def test_strided_targets(rows):
    case = random_case(37, batch=4)
    both = torch.tensor([[1, 2], [3, -100], [5, 6], [36, 0]])
    case.targets = both[:, 0], both[:, 1].flip(0).contiguous().expand(4)
    check(rows, case)
    case.targets = both[:1, 0].expand(4), both[:, 1]
    check(rows, case)


@pytest.mark.parametrize("weight", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 20.0])
@pytest.mark.parametrize("kind", KINDS)
def test_settings(rows, kind, temperature, weight):
    check(rows, random_case(50, kind=kind, temperature=temperature, weight=weight))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("types", [(FP16, FP16), (FP32, FP16), (FP64, FP64)])
def test_the_kernels_divide_loss_and_gradient(rows, types, kind):
    check(rows, random_case(50, types=types, kind=kind, divisor=7))
    case = random_case(50, weight=0.0, divisor=7)
    case.teacher = None
    check(rows, case)


def test_no_teacher(rows):
    case = random_case(50, weight=0.0)
    case.teacher = None
    check(rows, case)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("types", [(FP16, FP16), (FP32, FP32), (FP64, FP64)])
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e3, 6e4])
def test_sizes_of_logits(rows, scale, types, kind):
    """All equal; nearly equal; huge, as fp16 can hold them."""
    case = random_case(70, types=types, scale=1.0, kind=kind)
    for head in (*emulator.heads(case.student), *emulator.heads(case.teacher)):
        head.div_(max(float(head.abs().max()), 1.0)).mul_(scale)
    check(rows, case)


def test_shifted_logits(rows):
    """A constant on top of every logit changes nothing: maxima and sums are kept apart."""
    case = random_case(300, temperature=4.0)
    case.student += 3000.0
    case.teacher -= 5000.0
    check(rows, case, SEEDS)


@pytest.mark.parametrize("kind", KINDS)
def test_teacher_that_excludes(rows, kind):
    """-inf of a teacher: probability 0; of a whole row: nothing to learn."""
    case = random_case(300, batch=2, kind=kind)
    case.teacher[0, ::3] = -INF
    case.teacher[0, :64] = -INF
    case.teacher[1] = -INF
    check(rows, case, SEEDS)


def test_student_excludes_what_the_teacher_does(rows):
    """-inf of both: 0, also where a thread or a warp sees nothing else."""
    case = random_case(300, batch=1, weight=1.0)
    case.teacher[0, 4:200] = -INF
    case.student[0, 4:200] = -INF
    case.targets = torch.tensor([0]), torch.tensor([299])
    check(rows, case, SEEDS)


def test_infinity_at_what_is_negligible(rows):
    """A teacher's probability that underflows next to the others: no term, even if infinite."""
    case = random_case(300, batch=1, weight=1.0)
    case.teacher[0, 128:] -= 1e4
    case.student[0, 128:] = -INF
    case.targets = torch.tensor([0]), torch.tensor([1])
    check(rows, case, SEEDS)


@pytest.mark.parametrize("where", ["student", "teacher"])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("kind", ["kl-haystack", "mse"])
def test_non_finite(rows, where, bad, kind):
    """As finite, or as NaN, as the reference says; the other rows stay what they are."""
    case = random_case(300, batch=2, kind=kind)
    clean = case.run(rows)
    getattr(case, where)[0, 150, 0] = bad
    found, want = case.run(rows), case.refer(FP64)
    assert found[0][0, 0].isfinite() == want[0][0, 0].isfinite()
    assert found[0][1].equal(clean[0][1]) and found[2][1].equal(clean[2][1])
    assert found[2][0, :, 0].isnan().any() == want[2][0, :, 0].isnan().any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_of_weight_zero_is_left_out(rows, kind):
    """Of the loss and of the gradient, however infinite it is."""
    case = random_case(37, kind=kind, weight=0.0)
    case.teacher[0], case.teacher[1, 3] = NAN, INF
    loss, _, gradient = case.run(rows)
    case.teacher = None
    want, _, slope = case.run(rows)
    assert loss.equal(want) and gradient.equal(slope)
    case = random_case(37, kind=kind, weight=1.0)
    at = case.targets[0]
    case.student[range(3), at] = INF if kind == "mse" else -INF
    case.teacher[range(3), at] = -INF
    loss, _, gradient = case.run(rows)
    assert loss.isfinite().all() and gradient.isfinite().all()
    case.targets = torch.full((2, 3), -100)
    want, _, slope = case.run(rows)
    assert loss.equal(want) and gradient.equal(slope)


@pytest.mark.parametrize("layout", ["scalar", "column", "row", "transposed"])
def test_strides_of_the_gradient(rows, layout):
    case = random_case(37, batch=4)
    values = case.grad_row_loss
    case.grad_row_loss = {
        "scalar": values[0, 0].expand(4, 2),
        "column": values[:, :1].expand(4, 2),
        "row": values[:1].expand(4, 2),
        "transposed": values.t().contiguous().t(),
    }[layout]
    check(rows, case)


def test_small_gradients_survive_fp16(rows):
    """A loss scale of 65,536 is applied before the one cast to fp16."""
    case = random_case(385, types=(FP16, FP16))
    case.grad_row_loss = torch.full((3, 2), 65_536 / 3e5)
    check(rows, case)
    assert (case.run(rows)[2] != 0).float().mean() > 0.9


def test_more_windows_than_the_grid_is_wide(tmp_path, rows):
    narrow = emulator.Emulator(emulator.build(tmp_path, types="f32", flags=("-DKD_MAX_GRID_X=3",)))
    check(narrow, random_case(37, batch=8), SEEDS)
    assert narrow.last_launch()["blocks"] > 8  # the last line of the grid is not full


def test_long_row_of_a_small_batch_is_cut_in_backward(rows):
    check(rows, random_case(9000, batch=1))
    assert rows.last_launch()["blocks"] > 1


def test_empty_batch(rows):
    before = rows.last_launch()["launches"]
    assert random_case(37, batch=1).run(rows)[0].shape == (1, 2)
    case = random_case(37, batch=0)
    assert case.run(rows)[0].shape == (0, 2)
    assert rows.last_launch()["launches"] == before + 2  # of the batch of one


def test_a_wrong_kernel_would_be_seen(rows):
    """The check itself: another input must fail it."""
    case, other = random_case(385), random_case(385)
    check(rows, case)
    other.student[1, :, 1] *= 1.0001
    case.run = other.run
    with pytest.raises(AssertionError, match="row_loss"):
        check(rows, case)


def share_of_wide(traffic, width=16):
    return traffic.get(width, 0) / sum(traffic.values())


@pytest.mark.parametrize("length", [383, 384, 385, 511, 4096])
@pytest.mark.parametrize("dtype", [FP16, FP32, FP64])
@pytest.mark.parametrize("form", ["interleaved", "pair", "cut"])
def test_accesses_are_16_bytes_wide(rows, length, dtype, form):
    """Whatever L: only the chunks that hang over an end of the row go element by element."""
    case = random_case(length, batch=5, types=(dtype, dtype), forms=(form, form))
    rows.traffic()
    arguments = (case.student, case.teacher, case.targets, case.mask)
    _, stats = rows.forward(*arguments, **case.settings)
    loads, _ = rows.traffic()
    rows.backward(case.grad_row_loss, *arguments, stats, **case.settings)
    _, stores = rows.traffic()
    assert share_of_wide(loads) > (0.99 if length % 16 == 0 and form != "cut" else 0.93)
    if form != "cut":  # whose gradient is contiguous, and starts elsewhere
        assert share_of_wide(stores) > 0.93


def test_device_and_stream(rows):
    case = random_case(37)
    arguments = (case.student, case.teacher, case.targets, case.mask)
    rows.forward(*arguments, device=1, stream=77, **case.settings)
    assert (rows.last_launch()["device"], rows.last_launch()["stream"]) == (1, 77)
    assert rows.lib.fiber_device() == 0
    assert rows.why_not(1) is None
    assert "device 9: invalid device ordinal" in rows.why_not(9)
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        rows.forward(*arguments, device=9, **case.settings)
    check(rows, case)  # and nothing of the fault stays behind


def test_rows_beyond_what_can_be_counted(rows):
    case = random_case(1, batch=1)
    case.student = case.student.expand(1, 2**31 - 1, 2)
    case.teacher = None
    arguments = (case.student, None, case.targets, None)
    with pytest.raises(RuntimeError, match="L is beyond"):
        rows.forward(*arguments, **case.settings)
