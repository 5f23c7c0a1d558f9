"""On a card: launches, synchronisation, graphs, streams, faults. Skipped where there is none.

That the numbers are right there is tests/kernels/test_accuracy.py's to say, for every backend.
"""

import shutil
import subprocess
import sys

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from kdfast import fused_kd_loss
from kdfast.kernels import backends

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["native", "triton"])
def backend(request):
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device here")
    refused = backends.why_not(request.param, torch.empty(0, device="cuda"))
    if refused is not None:
        pytest.skip(refused)
    return request.param


class Inputs:
    def __init__(self, batch=80, length=385, device="cuda", seed=0):
        generator = torch.Generator().manual_seed(seed)
        student, teacher = torch.randn(2, batch, length, 2, generator=generator)
        targets = torch.randint(0, length, (2, batch), generator=generator)
        mask = torch.arange(length) < torch.randint(1, length + 1, (batch, 1), generator=generator)
        self.student = student.to(device).requires_grad_()
        self.rest = teacher.to(device), *targets.to(device)
        self.mask = mask.to(device)

    def run(self, backend):
        loss = fused_kd_loss(self.student, *self.rest, mask=self.mask, backend=backend)
        (gradient,) = torch.autograd.grad(loss, self.student)
        return loss.detach(), gradient

    def check(self, loss, gradient):
        want, slope = self.run("reference")
        torch.testing.assert_close(loss, want)
        torch.testing.assert_close(gradient, slope)


def test_one_launch_each_way(backend):
    inputs = Inputs()
    inputs.run(backend)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        inputs.run(backend)
        torch.cuda.synchronize()
    kernels = [
        event.name
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    forward = [name for name in kernels if "forward" in name]
    backward = [name for name in kernels if "backward" in name]
    assert (len(forward), len(backward)) == (1, 1), kernels
    # Besides them: the sum of the rows, and the 1.0 that autograd begins with.
    assert len(kernels) <= 4, kernels


def test_never_waits_for_the_device(backend):
    inputs = Inputs()
    inputs.run(backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, gradient = inputs.run(backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    inputs.check(loss, gradient)


def test_graph(backend):
    inputs = Inputs()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        inputs.run(backend)  # loads the kernels, which a capture cannot
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, gradient = inputs.run(backend)
    for seed in (1, 2):
        other = Inputs(seed=seed)
        inputs.student.data.copy_(other.student)
        inputs.mask.copy_(other.mask)
        for kept, value in zip(inputs.rest, other.rest, strict=True):
            kept.copy_(value)
        loss.fill_(torch.nan)
        gradient.fill_(torch.nan)
        graph.replay()
        other.check(loss, gradient)


def test_two_streams_at_once(backend):
    inputs = [Inputs(batch=1024, length=385, seed=seed) for seed in (1, 2)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    inputs[0].run(backend)
    torch.cuda.synchronize()
    found = []
    for _ in range(20):
        for mine, stream in zip(inputs, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append((mine, *mine.run(backend)))
    torch.cuda.synchronize()
    for mine, loss, gradient in found:
        mine.check(loss, gradient)


def test_same_bits_every_time(backend):
    inputs = Inputs(batch=8, length=4096)
    loss, gradient = inputs.run(backend)
    for _ in range(10):
        again, slope = inputs.run(backend)
        assert again.equal(loss) and slope.equal(gradient)


def test_a_fault_stays_where_it_was(backend):
    if backend != "native":
        pytest.skip("the launch that fails is that of the native rows")
    inputs = Inputs()
    long = torch.zeros(1, 1, 1, device="cuda").expand(1, 2**31 - 1, 2)
    position = torch.zeros(1, dtype=torch.int64, device="cuda")
    with pytest.raises(RuntimeError, match="L is beyond"):
        fused_kd_loss(long, None, position, position, distillation_loss_weight=0.0, backend=backend)
    inputs.check(*inputs.run(backend))
    torch.cuda.synchronize()


def test_another_device_than_the_current_one(backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device here, this needs two")
    inputs = Inputs(device="cuda:1")
    with torch.cuda.device(0):
        loss, gradient = inputs.run(backend)
        assert torch.cuda.current_device() == 0
    inputs.check(loss, gradient)


SANITIZED = """
import torch
from kdfast import fused_kd_loss
for dtype in (torch.float16, torch.float32):
    for length in (1, 7, 383, 384, 4096):
        student, teacher = torch.randn(2, 3, length, 2, device="cuda", dtype=dtype)
        student.requires_grad_()
        position = torch.full((3,), length - 1, device="cuda")
        fused_kd_loss(student, teacher, position, position, backend="native").backward()
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer(backend, tool):
    if backend != "native":
        pytest.skip("the compute sanitizer is for the native rows")
    program = shutil.which("compute-sanitizer")
    if program is None:
        pytest.skip("compute-sanitizer is not installed")
    command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SANITIZED]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
