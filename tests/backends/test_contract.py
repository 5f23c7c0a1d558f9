"""Every backend that is usable here, against extended precision and against the reference.

The tolerance of a backend is the reference's own error on the same inputs, plus ULPS units in the
last place of the accumulating type at the size of the terms that are added up. Nothing is tuned
by dtype. Fresh tensors hold NaN while these tests run, so that what is not written is seen.
"""

import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kdfast import backends, fused_kd_loss, kd_loss_rows

from .exact_rows import LONG, exact_rows, to_long

INF = math.inf
ULPS = 4
LENGTHS = [1, 7, 383, 385, 4096]
KINDS = [("kl_div", "haystack"), ("kl_div", "hf"), ("mse", "haystack")]
FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
TYPES = [(FP32, FP32), (FP16, FP16), (BF16, BF16), (FP64, FP64), (FP16, FP32), (FP32, BF16)]
SETTINGS = {"temperature": 1.7, "distillation_loss_weight": 0.6}


def why_not(backend, device):
    """None where the backend runs on this machine's device, else the sentence."""
    if device == "cuda" and not torch.cuda.is_available():
        return "there is no CUDA device here"
    return backends.why_not(backend, torch.empty(0, device=device))


def parameter(backend, device, *marks):
    marks += (pytest.mark.gpu,) if device == "cuda" else ()
    return pytest.param((backend, device), marks=marks, id=f"{backend}-{device}")


EVERYWHERE = [(name, device) for device in ("cpu", "cuda") for name in ("native", "triton")]
REFUSED = {pair: sentence for pair in EVERYWHERE if (sentence := why_not(*pair))}
USABLE = [parameter(*pair) for pair in EVERYWHERE if pair not in REFUSED]


@pytest.fixture(params=USABLE)
def where(request):
    return request.param


@pytest.mark.parametrize("pair", [parameter(*pair) for pair in REFUSED])
def test_left_out(pair):
    pytest.skip(f"{pair[0]}: {REFUSED[pair]}")


@pytest.fixture(autouse=True)
def poison():
    """Memory that nobody has written yet is NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


def test_fresh_memory_is_poisoned():
    assert torch.empty(7).isnan().all()


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


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("kind, convention", KINDS)
def test_the_yardstick_is_right(kind, convention, name):
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


def module(why_not):
    return SimpleNamespace(why_not=lambda tensor: why_not)


def choose_among(monkeypatch, native, triton, device, backend=None):
    """What is chosen where native and triton have these answers, and what is warned of."""
    modules = {"native": module(native), "triton": module(triton)}
    monkeypatch.setattr(backends, "_imported", lambda name: (modules[name], None))
    backends._say_once.cache_clear()
    return backends.choose(SimpleNamespace(device=torch.device(device)), backend)


@pytest.mark.parametrize(
    "device, native, triton, chosen",
    [
        ("cpu", None, "no GPU", "native"),
        ("cpu", "is not built", None, "reference"),
        ("cuda", None, None, "native"),
        ("cuda", "is not built", None, "triton"),
        ("cuda", "is not built", "is too old", "reference"),
        ("mps", "is not for mps", None, "reference"),
    ],
)
def test_choice_by_device(monkeypatch, device, native, triton, chosen):
    if chosen == "native":
        assert choose_among(monkeypatch, native, triton, device) == chosen
        return
    with pytest.warns(RuntimeWarning, match=native) as warned:
        assert choose_among(monkeypatch, native, triton, device) == chosen
    assert len(warned) == 1
    assert (chosen == "triton") or (triton is None) or triton in str(warned[0].message)


def test_a_forced_backend_is_that_or_an_error(monkeypatch):
    assert choose_among(monkeypatch, "is broken", None, "cpu", "triton") == "triton"
    assert choose_among(monkeypatch, None, None, "cpu", "reference") == "reference"
    with pytest.raises(ValueError, match="'native' is not usable here: is broken"):
        choose_among(monkeypatch, "is broken", None, "cpu", "native")
    with pytest.raises(ValueError, match=r"for a tensor on cpu: 'reference', 'triton'$"):
        choose_among(monkeypatch, "is broken", None, "cpu", "cuda")


FALLS_BACK = """
import sys, warnings
{damage}
import torch
from kdfast import fused_kd_loss
z, p = torch.eye(5)[None, :, :2], torch.zeros(1, dtype=torch.long)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    losses = [fused_kd_loss(z, z, p, p) for _ in range(3)]
[one] = caught
assert one.filename == "<string>", one.filename
assert losses[0] == fused_kd_loss(z, z, p, p, backend="reference")
try:
    fused_kd_loss(z, z, p, p, backend="native")
except ValueError as error:
    print(error)
print(one.message)
"""
MISSING = "sys.modules['kdfast._C'] = None"
BROKEN = """
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "kdfast._C":
            raise ImportError("undefined symbol: _ZN2kd")
sys.meta_path.insert(0, Broken())
"""


@pytest.mark.parametrize("damage, word", [(MISSING, "kdfast._C"), (BROKEN, "undefined symbol")])
def test_without_a_working_extension_it_falls_back_and_says_so_once(damage, word):
    run = [sys.executable, "-c", FALLS_BACK.format(damage=damage)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    refusal, warning = done.stdout.splitlines()
    assert word in refusal
    assert word in warning
    assert "kdfast.doctor" in warning
