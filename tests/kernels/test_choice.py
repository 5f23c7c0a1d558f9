"""Which backend is chosen, and what is said where another would be faster."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from kdfast.kernels import backends


def module(why_not):
    return SimpleNamespace(why_not=lambda tensor: why_not)


def choose_among(monkeypatch, native, triton, device, backend=None):
    """What is chosen where native and triton have these answers, and what is warned of."""
    modules = {"native": module(native), "triton": module(triton)}
    monkeypatch.setattr(backends, "_imported", lambda name: modules[name])
    backends._warn_once.cache_clear()
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


@pytest.mark.program
@pytest.mark.parametrize("damage, word", [(MISSING, "kdfast._C"), (BROKEN, "undefined symbol")])
def test_without_a_working_extension_it_falls_back_and_says_so_once(damage, word):
    run = [sys.executable, "-c", FALLS_BACK.format(damage=damage)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    refusal, warning = done.stdout.splitlines()
    assert word in refusal
    assert word in warning
    assert "kdfast.doctor" in warning
