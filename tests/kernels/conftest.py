"""Where the tests of the backends run, and the memory that they are given."""

import pytest
import torch

from kdfast.kernels import backends


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


@pytest.fixture(autouse=True)
def poison():
    """Memory that nobody has written yet is NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)
