"""The loss against what it replaces: the formula in eager PyTorch, and the same compiled.

Every cell is gated first: loss and gradient of each candidate agree with the reference in fp64.
The limit is a copy that moves the same bytes: forward reads student and teacher, backward reads
both and writes the gradient, and a copy of n bytes moves 2n.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kdfast import fused_kd_loss
from kdfast.kernels import backends

from . import kd_loss_report, records
from .loss_baselines import (
    TEMPERATURE,
    WEIGHT,
    Empty,
    compiled,
    liger_is_installed,
    liger_loss,
    plain_loss,
    split_loss,
)
from .measure import SECONDS, clock, time_interleaved

SHAPES = [(batch, length) for length in (384, 512, 4096) for batch in (8, 80, 1024)]
CARD_SHAPES = [(8, 384), (80, 384), (1024, 384), (80, 4096)]  # each is compiled for minutes
DTYPES = [torch.float32, torch.float16]
SETTINGS = {"temperature": TEMPERATURE, "distillation_loss_weight": WEIGHT}
STEPS = ("forward", "backward", "both")
MOVED = {"forward": 2, "backward": 3, "both": 5}  # tensors of (B, L, 2)


def usable(device: str) -> list[str]:
    """Backends to time there. (Triton's interpreter, on a CPU, is no candidate.)"""
    names = ("native",) if device == "cpu" else ("native", "triton")
    return [name for name in names if backends.why_not(name, torch.empty(0, device=device)) is None]


@dataclass
class Cell:
    """The inputs of one group of candidates."""

    device: str
    shape: tuple[int, int]
    dtype: torch.dtype

    def __post_init__(self):
        batch, length = self.shape
        generator = torch.Generator().manual_seed(batch * length)
        logits = 2 * torch.randn(2, batch, length, 2, generator=generator)
        positions = torch.randint(0, length, (2, batch), generator=generator).to(self.device)
        self.student, self.teacher = logits.to(self.device, self.dtype).unbind(0)
        self.start, self.end = positions.unbind(0)
        self.pairs = [
            [head.contiguous() for head in logits.unbind(2)]
            for logits in (self.student, self.teacher)
        ]

    def inputs(self, form: str):
        """Leaves of the student in a form, and the arguments made of them."""
        student, teacher = (
            (self.student, self.teacher) if form == "interleaved" else map(tuple, self.pairs)
        )
        leaves = [student] if form == "interleaved" else list(student)
        leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        logits = leaves[0] if form == "interleaved" else tuple(leaves)
        return leaves, (logits, teacher, self.start, self.end)

    def losses(self, with_compiled: bool) -> dict[str, tuple[str, Callable]]:
        """Name -> (form of the input, the loss)."""
        functions = {}
        for name in usable(self.device):
            for form in ("interleaved", "contiguous"):

                def public(*arguments, name=name):
                    return fused_kd_loss(*arguments, backend=name, **SETTINGS)

                functions[f"{name} {form}"] = form, public
        plain = {
            "interleaved": ("interleaved", plain_loss),
            "split": ("interleaved", split_loss),
            "contiguous": ("contiguous", plain_loss),
        }
        for name, (form, function) in plain.items():
            functions[f"eager {name}"] = form, function
            if with_compiled:
                functions[f"compile {name}"] = form, compiled(function)
        if self.device != "cpu" and liger_is_installed():
            functions["liger"] = "interleaved", liger_loss
        return functions

    def gate(self, functions: dict[str, tuple[str, Callable]]) -> None:
        """Every loss and gradient against the reference in fp64.

        Ours as closely as fp32 allows. The baselines a hundred times less so: compiled, they add
        up 4,096 positions one by one.
        """
        exact = self.student.double().requires_grad_()
        arguments = (exact, self.teacher.double(), self.start, self.end)
        expected = fused_kd_loss(*arguments, backend="reference", **SETTINGS)
        [slope] = torch.autograd.grad(expected, exact)
        for name, (form, function) in functions.items():
            leaves, arguments = self.inputs(form)
            loss = function(*arguments)
            gradients = torch.autograd.grad(loss, leaves)
            gradient = torch.stack(gradients, 2) if len(leaves) == 2 else gradients[0]
            # One rounding of the gradient to its dtype; fp32 inside.
            limits = torch.finfo(self.dtype)
            allowed = limits.eps / 2 * slope.abs() + limits.smallest_normal * limits.eps
            error = (gradient.double() - slope).abs() - allowed
            relative = 1e-6 if name.split()[0] in backends.NAMES else 1e-4
            assert (loss.detach() - expected).abs() <= 10 * relative * expected.abs(), name
            assert error.max() <= relative * slope.abs().max(), name


def with_gradient(device: str, function: Callable, leaves: list[Tensor], arguments: tuple):
    """A candidate of two steps: forward, and backward."""

    def candidate():
        started = clock(device)
        loss = function(*arguments)
        between = clock(device)
        torch.autograd.grad(loss, leaves)
        return between - started, clock(device) - between

    return candidate


def rows_alone(cell: Cell, name: str, form: str):
    """The backend without autograd: what the kernels and their launch cost."""
    _, (student, teacher, *others) = cell.inputs(form)
    heads = [
        (logits, None) if isinstance(logits, Tensor) else logits for logits in (student, teacher)
    ]
    tensors = (*heads[0], *heads[1], *others, None)
    settings = (TEMPERATURE, WEIGHT, 0, 1.0)
    module = backends.load(name)
    batch = cell.shape[0]
    gradient = torch.full((), 1 / batch, device=cell.device).expand(batch, 2)

    @torch.no_grad()
    def candidate():
        started = clock(cell.device)
        _, row_stats = module.forward(tensors, settings)
        between = clock(cell.device)
        module.backward(gradient, tensors, row_stats, settings)
        return between - started, clock(cell.device) - between

    return candidate


def copies(cell: Cell):
    """Copies that move the bytes of forward, and of backward."""
    elements = cell.student.numel()
    source = torch.zeros(2 * elements, dtype=cell.dtype, device=cell.device)
    target = torch.zeros_like(source)
    halves = [(target[: n * elements // 2], source[: n * elements // 2]) for n in (2, 3)]

    def candidate():
        moments = [clock(cell.device)]
        for to, of in halves:
            to.copy_(of)
            moments.append(clock(cell.device))
        return moments[1] - moments[0], moments[2] - moments[1]

    return candidate


def candidates(cell: Cell, functions: dict) -> dict[str, Callable]:
    group = {}
    for name, (form, function) in functions.items():
        group[name] = with_gradient(cell.device, function, *cell.inputs(form))
    for name in usable(cell.device):
        for form in ("interleaved", "contiguous"):
            group[f"{name} {form} rows alone"] = rows_alone(cell, name, form)
    leaves, arguments = cell.inputs("interleaved")
    nothing = (torch.zeros((), device=cell.device), torch.zeros_like(cell.student))
    group["empty function"] = with_gradient(
        cell.device, Empty.apply, leaves, (*arguments, *nothing)
    )
    group["copy"] = copies(cell)
    return group


def extra_memory(cell: Cell, function: Callable, form: str) -> int:
    """Bytes alive at the peak of forward and backward, beyond inputs and gradient."""
    leaves, arguments = cell.inputs(form)
    gradient = sum(leaf.numel() * leaf.element_size() for leaf in leaves)
    if cell.device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        torch.autograd.grad(function(*arguments), leaves)
        return torch.cuda.max_memory_allocated() - before - gradient
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        gradients = torch.autograd.grad(function(*arguments), leaves)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    del gradients
    return peak - gradient


def two_threads(cell: Cell, name: str) -> dict[str, Callable]:
    """The rows alone on one thread and on two."""
    alone = rows_alone(cell, name, "interleaved")

    def on(threads):
        def candidate():
            torch.set_num_threads(threads)
            moments = alone()
            torch.set_num_threads(1)
            return moments

        return candidate

    return {"1": on(1), "2": on(2)}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", SHAPES[:-1], ids=lambda shape: "x".join(map(str, shape)))
def test_gate(shape, dtype, device):
    skip_without_backend(device.type)
    cell = Cell(
        device.type, shape, dtype
    )  # the largest is gated where it is timed: it takes seconds
    cell.gate(cell.losses(with_compiled=False))


def test_the_gate_can_fail():
    cell = Cell("cpu", (8, 384), torch.float32)

    def moved(student, *others):
        return plain_loss(student + torch.eye(384)[:, :2] * 1e-1, *others)

    with pytest.raises(AssertionError, match="moved"):
        cell.gate({"moved": ("interleaved", moved)})


@pytest.mark.timed
def test_kd_loss(device, capsys, quick):
    skip_without_backend(device.type)
    found = records.machine(device.type)
    with capsys.disabled():
        shapes = SHAPES if device.type == "cpu" else CARD_SHAPES
        shapes, seconds = (shapes[:1], 0.1) if quick else (shapes, SECONDS)
        report = {"machine": found, **measure(device.type, shapes, seconds)}
        lines = kd_loss_report.text(report)
        if device.type == "cuda" and not quick:
            rows = kd_loss_report.summary(report)
            lines.append(records.add_to_card(found, {"kd_loss": rows}))
        elif not quick:
            lines += kd_loss_report.write(report)
        print("", *lines, sep="\n")


def skip_without_backend(device: str) -> None:
    if not usable(device):
        pytest.skip(f"native: {backends.why_not('native', torch.empty(0, device=device))}")


def measure(device: str, shapes: list[tuple[int, int]], seconds: float) -> dict:
    """Times, memory and threads of every cell, each once it has passed the gate."""
    times, memory, threads = [], [], []
    for shape in shapes:
        for dtype in DTYPES:
            print(f"{shape[0]} x {shape[1]} {dtype}", flush=True)
            torch._dynamo.reset()  # each guard of another cell's code would cost a baseline time
            cell = Cell(device, shape, dtype)
            functions = cell.losses(with_compiled=True)
            cell.gate(functions)
            taken = time_interleaved(candidates(cell, functions), seconds)
            times += kd_loss_report.rows_of(cell, taken)
            if shape == (80, 384):
                for name, (form, function) in functions.items():
                    extra = extra_memory(cell, function, form)
                    memory.append({"candidate": name, "dtype": str(dtype)[6:], "bytes": extra})
            if device == "cpu" and dtype == torch.float32 and shape[0] >= 80:
                taken = time_interleaved(two_threads(cell, "native"), seconds=3.0)
                threads.append(kd_loss_report.scaling_of(cell, taken))
    return {"times": times, "memory": memory, "threads": threads}
