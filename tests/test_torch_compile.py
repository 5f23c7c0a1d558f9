"""The loss inside torch's machinery: torch.compile, its library ops, autocast, the loss scaler."""

import math
import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from kdfast import FusedKDLoss, fused_kd_loss, kd_loss_rows
from kdfast.kernels import backends
from kdfast.kernels.autograd import kinds_of

pytestmark = pytest.mark.program

REFUSED = backends.why_not("native", torch.empty(0))
needs_native = pytest.mark.skipif(REFUSED is not None, reason=f"native: {REFUSED}")
BACKENDS = [pytest.param("native", marks=needs_native), "reference"]
ROWS = {
    "temperature": 2.0,
    "distillation_loss_weight": 0.3,
    "distillation_loss": "mse",
    "convention": "hf",
}


@pytest.fixture(autouse=True)
def no_compiled_code_is_left():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def batch(size, length):
    """Features of a model, teacher logits, positions and a mask."""
    generator = torch.Generator().manual_seed(size * length)
    features = torch.randn(size, length, 4, generator=generator)
    teacher = torch.randn(size, length, 2, generator=generator)
    start, end = torch.randint(0, length, (2, size), generator=generator)
    mask = torch.rand(size, length, generator=generator) < 0.8
    return features, teacher, start, end, mask


class Step(torch.nn.Module):
    """Every door of the loss in one graph."""

    def __init__(self, backend):
        super().__init__()
        torch.manual_seed(0)
        self.head = torch.nn.Linear(4, 2)
        self.loss = FusedKDLoss(temperature=1.5, reduction="sum", backend=backend)
        self.backend = backend

    def forward(self, features, teacher, start, end, mask):
        logits = self.head(features)
        mean = fused_kd_loss(logits, teacher, start, end, mask=mask, backend=self.backend)
        total = self.loss(logits.unbind(2), teacher, start, end)
        row_loss, row_parts = kd_loss_rows(
            logits, teacher.unbind(2), start, end, mask=mask, backend=self.backend, **ROWS
        )
        return mean + total + row_loss.sum() / 7, row_parts

    def results(self, call, arguments):
        self.zero_grad()
        loss, parts = call(*arguments)
        loss.backward()
        return loss.detach(), parts, self.head.weight.grad.clone()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_graph_break(backend):
    step = Step(backend)
    arguments = batch(4, 16)
    compiled = torch.compile(step, fullgraph=True, dynamic=False, backend="aot_eager")
    expected = step.results(step, arguments)
    for actual, value in zip(step.results(compiled, arguments), expected, strict=True):
        torch.testing.assert_close(actual, value)


@needs_native
def test_dynamic_shapes_are_compiled_once():
    step = Step("native")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        # Sizes that are no number of features: torch would take equal ones for the same.
        for shape in ((5, 16), (6, 24), (3, 41)):
            arguments = batch(*shape)
            expected = step.results(step, arguments)
            for actual, value in zip(step.results(compiled, arguments), expected, strict=True):
                torch.testing.assert_close(actual, value)


@needs_native
def test_inductor():
    def loss(student, *others):
        return fused_kd_loss(2 * student, *others, backend="native")

    features, *others, _ = batch(4, 16)
    student = features[..., :2].contiguous().requires_grad_()
    compiled = torch.compile(loss, fullgraph=True)
    results = []
    for call in (compiled, loss):
        value = call(student, *others)
        results.append((value.detach(), torch.autograd.grad(value, student)[0]))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def samples():
    """Arguments of the op kd_rows, but for its settings."""
    features, teacher, start, end, mask = batch(3, 7)
    student = features[..., :2].contiguous().requires_grad_()
    heads = [head.detach().clone().requires_grad_() for head in student.unbind(2)]
    yield student, None, teacher, None, start, end, mask
    yield *heads, *teacher.unbind(2), start.int(), end, None
    yield student.detach().half(), None, None, None, start, end, mask
    yield student.detach().double(), None, teacher, None, start, end, mask


@needs_native
@pytest.mark.parametrize("form", ["fixed", "annealed"])
@pytest.mark.parametrize("tensors", list(samples()), ids=["tensor", "pair", "no teacher", "fp64"])
def test_ops_are_what_torch_expects(tensors, form):
    numbers = (1.5, 0.0 if tensors[2] is None else 0.75)
    if form == "annealed":
        numbers = [torch.tensor(number, dtype=torch.float64) for number in numbers]
    settings = (*numbers, 0, 1.0, "native")
    op = getattr(torch.ops.kdfast, f"kd_rows_{form}")
    torch.library.opcheck(op, (*tensors, *settings))
    fixed = [None if tensor is None else tensor.detach() for tensor in tensors]
    _, row_stats = op(*fixed, *settings)
    gradient = torch.ones(3, 1, dtype=row_stats.dtype).expand(3, 2)
    arguments = (gradient, *fixed, row_stats, *settings, kinds_of((*fixed, row_stats)))
    torch.library.opcheck(getattr(torch.ops.kdfast, f"kd_rows_{form}_backward"), arguments)


def annealed_weight(number, student, *others, backend):
    """Each of these uses the float elsewhere too, which is what torch.compile stumbles over."""
    loss = fused_kd_loss(
        student, *others, temperature=1.5, distillation_loss_weight=1 - number, backend=backend
    )
    return loss + number * student.square().mean()


def annealed_temperature(number, student, *others, backend):
    loss = fused_kd_loss(student, *others, temperature=1 + 4 * number, backend=backend)
    return loss + number * student.square().mean()


def annealed_both(number, student, *others, backend):
    """A cosine, through the trainer's door."""
    settings = {"distillation_loss_weight": 0.5 + 0.5 * math.cos(3 * number)}
    settings |= {"temperature": 1 + number**2, "distillation_loss": "kl_div"}
    row_loss, _ = kd_loss_rows(
        student, *others, **settings, convention="hf", mask=None, backend=backend
    )
    return row_loss.sum() / number


class Annealed(torch.nn.Module):
    """Settings of a module that are changed between calls."""

    def __init__(self):
        super().__init__()
        self.loss = FusedKDLoss()

    def forward(self, number, student, *others, backend):
        self.loss.backend = backend
        return self.loss(student, *others) + self.loss.temperature * student.square().mean()

    def __call__(self, number, *arguments, backend):
        self.loss.temperature, self.loss.distillation_loss_weight = 1 + number, number
        return super().__call__(number, *arguments, backend=backend)


@needs_native
@pytest.mark.parametrize("compiler", ["inductor", "aot_eager", "eager"])
@pytest.mark.parametrize("loss", [annealed_weight, annealed_temperature, annealed_both, Annealed])
def test_a_setting_that_changes_each_step(loss, compiler):
    features, *others, _ = batch(4, 37)
    student = features[..., :2].contiguous().requires_grad_()
    loss = loss() if isinstance(loss, type) else loss
    counted = CompileCounterWithBackend(compiler)
    if isinstance(loss, Annealed):
        compiled = Annealed()
        compiled.compile(fullgraph=True, backend=counted)
    else:
        compiled = torch.compile(loss, fullgraph=True, backend=counted)
    for step in range(1, 15):
        values = []
        for call, backend in ((compiled, "native"), (loss, "reference")):
            value = call(step / 14, student, *others, backend=backend)
            values.append((value, *torch.autograd.grad(value, student)))
        for actual, expected in zip(*values, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert counted.frame_count <= 2


@needs_native
def test_a_captured_cuda_graph_would_not_read_what_changes():
    """torch cuts its CUDA graphs at ops with this tag."""
    unsafe = getattr(torch.Tag, "cudagraph_unsafe", None)
    if unsafe is None:
        pytest.skip("this torch has no such tag: it captures no graph with a CPU tensor in it")
    assert unsafe in torch.ops.kdfast.kd_rows_annealed.default.tags
    assert unsafe in torch.ops.kdfast.kd_rows_annealed_backward.default.tags
    assert unsafe not in torch.ops.kdfast.kd_rows_fixed.default.tags


@needs_native
def test_what_traces_sees_an_op():
    features, teacher, start, end, mask = batch(3, 7)

    def loss(student):
        return fused_kd_loss(student, teacher, start, end, mask=mask, backend="native")

    student = features[..., :2].contiguous()
    traced = torch.fx.experimental.proxy_tensor.make_fx(loss)(student)
    other = 2 * student
    assert torch.equal(traced(other), loss(other))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(student.half().requires_grad_())
        value = loss(fake)
        [slope] = torch.autograd.grad(value, fake)
    assert (value.shape, value.dtype) == ((), torch.float32)
    assert (slope.shape, slope.dtype) == (student.shape, torch.float16)
    # Fake through the teacher alone, outside of its mode: there is no memory to read.
    value = fused_kd_loss(student, mode.from_tensor(teacher), start, end, backend="native")
    assert type(value) is FakeTensor


@needs_native
def test_ops_are_differentiated_once():
    tensors = next(samples())
    row_loss, _ = torch.ops.kdfast.kd_rows_fixed(*tensors, 1.5, 0.75, 0, 1.0, "native")
    [slope] = torch.autograd.grad(row_loss.sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once; backend='reference' can"):
        slope.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(backend, dtype):
    features, *others = batch(4, 16)
    head = torch.nn.Linear(4, 2)
    results = []
    for is_inside in (True, False):
        with torch.autocast("cpu", dtype=dtype):
            logits = head(features)
        with torch.autocast("cpu", dtype=dtype, enabled=is_inside):
            loss = fused_kd_loss(logits, *others[:3], mask=others[3], backend=backend)
        assert logits.dtype == dtype
        assert loss.dtype == torch.float32
        results.append((loss.detach(), torch.autograd.grad(loss, head.weight)[0]))
    for inside, outside in zip(*results, strict=True):
        assert torch.equal(inside, outside)


@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_scaler(backend):
    """Scaled fp16 gradients are the fp32 ones after unscaling; an infinite one skips the step."""
    features, *others = batch(4, 64)
    head = torch.nn.Linear(4, 2)
    weight = head.weight.detach().clone()
    fused_kd_loss(head(features), *others[:3], backend=backend).backward()
    expected = head.weight.grad.clone()
    optimizer = torch.optim.SGD(head.parameters(), lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for name in ("finite", "infinite"):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            logits = head(features if name == "finite" else features * 1e5)
            loss = fused_kd_loss(logits, *others[:3], backend=backend)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if name == "finite":
            torch.testing.assert_close(head.weight.grad, expected, rtol=2e-2, atol=2e-3)
            head.weight.grad.copy_(expected)
        scaler.step(optimizer)
        scaler.update()
        torch.testing.assert_close(head.weight.detach(), weight - 0.5 * expected)
    assert scaler.get_scale() == 2.0**11


def test_the_compiler_is_not_imported_for_those_who_do_not_compile():
    program = "import sys, kdfast; print('torch._dynamo' in sys.modules, 'triton' in sys.modules)"
    run = [sys.executable, "-c", program]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["False", "False"]
