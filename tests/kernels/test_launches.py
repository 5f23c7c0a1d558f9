"""What a call of the loss launches on a GPU: the kernels of a backend, and what torch adds."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kdfast.kernels import native, triton_launch
from kdfast.kernels.autograd import differentiable_rows
from kdfast.kernels.backends import RowSettings, RowTensors

LAUNCH_NOTHING = {"empty", "empty_like", "new_empty", "expand", "unbind"}
BATCH = 5


class Launches(TorchDispatchMode):
    """Names of torch's operations that launch a kernel."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name not in LAUNCH_NOTHING:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.fixture(params=["native", "triton"])
def backend(request, monkeypatch):
    """A backend whose kernels are noted, not run: tensors on the device "meta" have no memory."""
    ran = []
    if request.param == "triton":
        if refused := triton_launch._why_no_triton():
            pytest.skip(refused)
        monkeypatch.setattr(triton_launch.Launch, "run", lambda launch: ran.append(launch))
    else:
        module = SimpleNamespace(
            forward=lambda *given: ran.append(given[-2]),
            backward=lambda *given: ran.append(given[-1]),
        )
        monkeypatch.setattr(native, "_module", lambda: module)
        monkeypatch.setattr(native, "_place", lambda *_: (1, 0, 0, 0))
    return request.param, ran


@pytest.mark.parametrize("divisor", [BATCH, 1])
@pytest.mark.parametrize("form", ["one tensor", "pair"])
def test_the_rows_and_their_sum_forward_the_rows_alone_backward(backend, form, divisor):
    name, ran = backend
    shape = (BATCH, 7, 2) if form == "one tensor" else (BATCH, 7)
    student, teacher = (torch.empty(shape, device="meta") for _ in range(2))
    ends = [torch.empty(shape, device="meta") if form == "pair" else None for _ in range(2)]
    targets = [torch.empty(BATCH, dtype=torch.int64, device="meta") for _ in range(2)]
    tensors = RowTensors(student.requires_grad_(), ends[0], teacher, ends[1], *targets, None)
    settings, one = RowSettings(2.0, 0.5, 0, 1.0), torch.empty((), device="meta")
    with Launches() as forward:
        loss = differentiable_rows(name, settings, divisor, *tensors)
    assert len(ran) == 1 and forward.names == ["sum"]
    with Launches() as backward:
        torch.autograd.grad(loss, student, one)
    assert len(ran) == 2 and backward.names == []
    if name == "native":
        assert ran == [divisor, divisor]
