"""What only the C++ rows have: instruction sets, threads, conversions, a raw door of integers."""

import importlib
import math
import subprocess
import sys
import threading

import pytest
import torch

from kdfast.kernels import native

from .exact_rows import exact_rows, to_long

fault = native.why_not(torch.empty(0))
if fault is not None:
    pytest.skip(fault, allow_module_level=True)
_C = importlib.import_module("kdfast._C")

FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
SETTINGS = {"temperature": 1.7, "weight": 0.6, "kind": 0, "soft_scale": 1.0}
# The temperature whose terms share exponentials (2), ones where they do not, each part alone, mse.
MODES = [
    *(SETTINGS | {"temperature": temperature} for temperature in (1.0, 1.5, 1.7, 2.0)),
    *(SETTINGS | {"temperature": 2.0, "weight": weight} for weight in (0.0, 1.0)),
    SETTINGS | {"kind": 1, "soft_scale": 0.5},
]
ISAS = [
    pytest.param(
        isa,
        marks=pytest.mark.skipif(
            not native.has_isa(isa), reason=f"this processor has no {isa} instructions"
        ),
    )
    for isa in native.ISAS[1:]
]


def batch_of(batch, length, dtype=FP32, teacher_dtype=None, seed=0):
    """(student, teacher, targets) of (B, L, 2) logits as a reader has them."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, batch, length, 2, generator=generator, dtype=FP64)
    targets = tuple(torch.randint(0, length, (2, batch), generator=generator))
    return logits[0].to(dtype), logits[1].to(teacher_dtype or dtype), targets


def tensors_of(student, teacher, targets, mask=None):
    """What a backend takes: (B, L, 2) tensors of logits, or pairs."""
    whole = [
        (logits, None) if isinstance(logits, torch.Tensor) else logits
        for logits in (student, teacher)
    ]
    return (*whole[0], *whole[1], *targets, mask)


def rows(student, teacher, targets, mask=None, *, settings=SETTINGS, slope=1.0, **how):
    """row_loss, row_stats and the gradient, stacked to (B, L, 2), of slope * row_loss.sum()."""
    is_one = isinstance(student, torch.Tensor)
    tensors = tensors_of(student, teacher, targets, mask)
    settings = tuple(settings.values())
    row_loss, stats = native.forward(tensors, settings, **how)
    slopes = torch.tensor(slope, dtype=row_loss.dtype).expand(row_loss.shape)
    gradients = native.backward(slopes, tensors, stats, settings, **how)
    return row_loss, stats, gradients[0] if is_one else torch.stack(gradients, 2)


def assert_same_bits(actual, expected):
    for left, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)


def apart(logits):
    return tuple(head.contiguous() for head in logits.unbind(2))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP64])
@pytest.mark.parametrize("form", ["tensor", "pair"])
def test_threads_change_no_bit(form, dtype):
    student, teacher, targets = batch_of(37, 8192, dtype)
    mask = torch.arange(8192) < torch.randint(0, 8193, (37, 1), generator=torch.manual_seed(1))
    if form == "pair":
        student, teacher = apart(student), apart(teacher)
    for given in (None, mask):
        alone = rows(student, teacher, targets, given, threads=1)
        for threads in (2, 3, 8):
            assert_same_bits(rows(student, teacher, targets, given, threads=threads), alone)


def test_callers_that_meet_change_no_bit():
    arguments = batch_of(32, 8192)
    alone = rows(*arguments, threads=1)
    results = {}

    def call(name):
        results[name] = [rows(*arguments, threads=3) for _ in range(5)]

    callers = [threading.Thread(target=call, args=(name,)) for name in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for name in range(3):
        for result in results[name]:
            assert_same_bits(result, alone)


IN_A_CHILD = """
import os, signal, sys, torch
from kdfast.kernels import native
logits, at = torch.randn(2, 64, 4096, 2), torch.zeros(64, dtype=torch.long)
def forward():
    tensors = (logits[0], None, logits[1], None, at, at, None)
    return native.forward(tensors, (1.0, 0.5, 0, 1.0), threads=2)[0]
expected = forward()
child = os.fork()
if child == 0:
    signal.alarm(60)
    os._exit(0 if torch.equal(forward(), expected) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.program
def test_a_forked_child_has_threads_of_its_own():
    """A DataLoader's workers are forked, and a thread does not survive a fork."""
    subprocess.run([sys.executable, "-c", IN_A_CHILD], check=True, timeout=120)


TOO_LONG = """
import resource, torch
from kdfast import fused_kd_loss
logits, at = torch.zeros(1, 1, 1).expand({batch}, 2**29, 2), torch.zeros(1).long().expand({batch})
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
torch.set_num_threads(2)
try:
    fused_kd_loss(logits, logits, at, at, backend="native")
except MemoryError as error:
    print("refused")
"""


@pytest.mark.program
@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited in Linux's way")
@pytest.mark.parametrize("batch", [1, 2])
def test_rows_that_have_to_be_copied_and_find_no_memory(batch):
    """An error of this call, on one thread and on two, and not the end of the process."""
    run = [sys.executable, "-c", TOO_LONG.format(batch=batch)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert done.stdout == "refused\n", done.stderr


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 65, 383, 385])
def test_every_instruction_set_and_tail(length, isa):
    student, teacher, targets = batch_of(6, length, seed=length)
    for settings in MODES:
        expected = exact_rows(student, teacher, targets, None, **settings)
        for logits in ((student, teacher), (apart(student), apart(teacher))):
            row_loss, stats, gradient = rows(*logits, targets, settings=settings, isa=isa)
            for actual, exact in zip((row_loss, stats[..., 5:7], gradient), expected, strict=True):
                size = max(1.0, float(abs(exact).max()))
                assert float(abs(to_long(actual) - exact).max()) < 16 * 2**-24 * size


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_in_fp64(isa):
    student, teacher, targets = batch_of(4, 77, FP64)
    for settings in MODES:
        expected = exact_rows(student, teacher, targets, None, **settings)
        row_loss, stats, gradient = rows(student, teacher, targets, settings=settings, isa=isa)
        for actual, exact in zip((row_loss, stats[..., 5:7], gradient), expected, strict=True):
            size = max(1.0, float(abs(exact).max()))
            assert float(abs(to_long(actual) - exact).max()) < 16 * 2**-53 * size


@pytest.mark.parametrize("isa", ISAS)
def test_an_offset_of_all_logits_changes_little_however_large(isa):
    """Up to 2^22 exponents are formed in one rounding, beyond from the distance to the maximum."""
    student, teacher, targets = batch_of(4, 100)
    # Multiples of 1/4: the offsets are added exactly.
    student, teacher = (4 * student).round() / 4, (4 * teacher).round() / 4
    for settings in MODES[:-1]:
        expected = rows(student, teacher, targets, settings=settings, isa=isa)
        for offset in (2.0**11, -(2.0**20), 2.0**21, 1.5 * 2.0**21):
            moved = rows(student + offset, teacher - offset, targets, settings=settings, isa=isa)
            torch.testing.assert_close(moved[0], expected[0], rtol=2e-6, atol=2e-6)
            torch.testing.assert_close(moved[2], expected[2], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("isa", ISAS)
def test_the_largest_logits_of_fp32(isa):
    """Exponents of 2 that would be infinite if they were formed before the maximum is taken off."""
    largest = torch.finfo(FP32).max
    student = torch.full((1, 20, 2), -largest)
    student[0, [3, 5]] = largest
    at = torch.tensor([3])
    settings = SETTINGS | {"weight": 0.5, "temperature": 1.0}
    row_loss, stats, gradient = rows(student, student, (at, at), settings=settings, isa=isa)
    torch.testing.assert_close(stats[0, :, 5:7], torch.tensor([[0.0, math.log(2) / 2]] * 2))
    torch.testing.assert_close(row_loss, torch.full((1, 2), math.log(2) / 4))
    expected = torch.zeros(1, 20, 2)
    expected[0, 3], expected[0, 5] = -0.125, 0.125
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [FP16, BF16, FP32, FP64])
def test_where_the_rows_lie_changes_no_bit(dtype, isa):
    """The same rows at odd addresses, with gaps, converted, and gathered from other strides."""
    student, teacher, targets = batch_of(5, 37, dtype)
    expected = rows(apart(student), apart(teacher), targets, isa=isa)

    def spread(logits, first, step):
        wide = torch.full((5, first + 37 * step, 2), math.nan, dtype=dtype)
        wide[:, first::step] = logits
        return wide[:, first::step]

    views = [spread(logits, 2, 3).unbind(2) for logits in (student, teacher)]
    assert_same_bits(rows(*views, targets, isa=isa), expected)
    at_odd_addresses = [
        [torch.cat([head[:, :1], head], 1)[:, 1:] for head in logits.unbind(2)]
        for logits in (student, teacher)
    ]
    assert_same_bits(rows(*at_odd_addresses, targets, isa=isa), expected)
    heads_apart = student.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert_same_bits(rows(heads_apart, teacher, targets, isa=isa), expected)
    if dtype in (FP16, BF16):
        wide = rows(apart(student.float()), apart(teacher.double()), targets, isa=isa)
        assert_same_bits(expected[:2], wide[:2])
        assert_same_bits(expected[2:], [wide[2].to(dtype)])
    # Interleaved rows are summed in another order of lanes, but among themselves alike.
    whole = rows(student, teacher, targets, isa=isa)
    views = spread(student, 3, 1), spread(teacher, 1, 1)
    assert_same_bits(rows(*views, targets, isa=isa), whole)
    assert_same_bits(rows(*(view.unbind(2) for view in views), targets, isa=isa), whole)
    assert_same_bits(rows(student, apart(teacher), targets, isa=isa), whole)


@pytest.mark.parametrize("begin, end", [(9, 29), (0, 49), (1, 50), (20, 21)])
@pytest.mark.parametrize("isa", ISAS)
def test_a_mask_of_one_stretch_is_the_shorter_row(isa, begin, end):
    student, teacher, targets = batch_of(3, 50)
    targets = tuple(target % (end - begin) + begin for target in targets)
    mask = torch.zeros(3, 50, dtype=torch.bool)
    mask[:, begin:end] = True
    short = rows(
        *(student[:, begin:end], teacher[:, begin:end], [target - begin for target in targets]),
        isa=isa,
    )
    student = student.masked_fill(~mask[..., None], math.nan)
    for given in (mask, mask.t().contiguous().t()):
        row_loss, stats, gradient = rows(student, teacher, targets, given, isa=isa)
        assert_same_bits((row_loss, stats, gradient[:, begin:end]), short)
        assert torch.equal(gradient[~mask], torch.zeros_like(gradient[~mask]))


def converted(student, teacher, length, isa):
    """What mse's gradient makes of student - teacher: exact, and cast to the student's type."""
    student, teacher = (logits.reshape(-1, length, 2) for logits in (student, teacher))
    at = torch.full((len(student),), -100)
    settings = {"temperature": 1.0, "weight": 1.0, "kind": 1, "soft_scale": 0.5}
    return rows(student, teacher, (at, at), settings=settings, slope=float(length), isa=isa)[2]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize("length", [1, 64])
def test_every_half_is_read_and_written_exactly(length, dtype, isa):
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    # A huge logit squared is beyond fp32, but its gradient is not; zero signs may differ.
    values = torch.where(values.isfinite(), values, 0)
    gradient = converted(values, torch.zeros(2**16), length, isa)
    assert torch.equal(gradient.flatten(), values)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize("length", [1, 64])
def test_gradients_are_rounded_as_torch_rounds(length, dtype, isa):
    """To the nearest, ties to even, subnormals and the overflow to infinity included."""
    generator = torch.Generator().manual_seed(0)
    halves = torch.randint(-(2**15), 2**15, (2**15,), generator=generator, dtype=torch.int16)
    wide = halves.view(dtype).float()
    wide = torch.where(wide.isfinite(), wide, 0)
    # Halfway to the next half, and just beside that.
    ulp = (halves + 1).view(dtype).float() - wide
    ulp = torch.where(ulp.isfinite(), ulp, 0)
    values = torch.cat([wide + ulp / 2, (wide + ulp / 2) * (1 + 2**-22), wide + ulp / 3])
    values = torch.where(values.abs() < 1e37, values, 65520.0)
    gradient = converted(torch.zeros(len(values), dtype=dtype), -values, length, isa)
    assert torch.equal(gradient.flatten(), values.to(dtype))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("begin, end", [(0, 1), (0, 13), (0, 33), (1, 65), (8, 64), (3, 24)])
def test_nothing_beside_the_gradient_is_written(begin, end, isa):
    """Rows and stretches of a mask end inside a vector: what is around must stay as it was."""
    for dtype in (FP16, FP32, FP64):
        student, teacher, targets = batch_of(3, end, dtype)
        mask = (torch.arange(end) >= begin).expand(3, end) if begin else None
        _, stats, gradient = rows(student, teacher, targets, mask, isa=isa)
        memory = torch.full((64 + student.numel() + 64,), 7.0, dtype=dtype)
        middle = memory[64:-64]
        arguments = backward_arguments(student, teacher, targets, stats, mask)
        arguments[BACKWARD.index("grad")] = middle.data_ptr()
        arguments[BACKWARD.index("isa")] = native.ISAS.index(isa)
        _C.backward(*arguments)
        assert (memory[:64] == 7).all()
        assert (memory[-64:] == 7).all()
        assert torch.equal(middle.view(student.shape), gradient)


words = str.split
INPUTS = words(
    "shape student student_end student_strides student_end_strides student_type "
    "teacher teacher_end teacher_strides teacher_end_strides teacher_type "
    "start_target start_stride start_bytes end_target end_stride end_bytes mask mask_strides "
    "temperature weight kind soft_scale"
)
BACKWARD = INPUTS + words(
    "row_stats grad_row_loss grad_row_loss_strides grad grad_end threads isa device stream divisor"
)
ONE = torch.ones(1)


def backward_arguments(student, teacher, targets, stats, mask=None):
    start = [*native._inputs(*tensors_of(student, teacher, targets, mask)), *SETTINGS.values()]
    one = torch.ones(1, dtype=FP64) if student.dtype == FP64 else ONE
    backward_arguments.kept = one, grad = one, torch.empty_like(student)
    return [*start, stats.data_ptr(), one.data_ptr(), (0, 0), grad.data_ptr(), 0, 1, 0, -1, 0, 1.0]


def test_memory_at_an_odd_address_is_refused():
    """torch.frombuffer takes any offset; C++ may not read a number from there."""
    memory = torch.frombuffer(bytearray(4 * 2 * 3 * 5 + 2), dtype=torch.uint8)
    student, teacher, targets = batch_of(3, 5)
    odd = torch.frombuffer(memory.numpy(), dtype=FP32, offset=2, count=30).view(3, 5, 2)
    with pytest.raises(ValueError, match="student's address is not a multiple of 4 bytes"):
        rows(odd, teacher, targets)
    with pytest.raises(ValueError, match="teacher's address is not a multiple of 4 bytes"):
        rows(student, odd, targets)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            ModuleNotFoundError("No module named 'kdfast._C'"),
            "was not built as kdfast was installed",
        ),
        (ImportError("undefined symbol"), "does not load (undefined symbol)"),
    ],
)
def test_a_missing_extension_gives_a_sentence_with_the_remedy(monkeypatch, error, words):
    def refuse(name):
        raise error

    monkeypatch.setattr(native.importlib, "import_module", refuse)
    monkeypatch.setattr(native, "_loaded", native._loaded.__wrapped__)
    assert native._why_not.__wrapped__(torch.device("cpu")) == (
        f"the extension kdfast._C {words}: install a C++ compiler, such as g++, then kdfast again "
        "by pip install"
    )


def test_devices_that_are_not_for_these_rows():
    assert "CPU and CUDA" in native.why_not(torch.empty(0, device="meta"))
