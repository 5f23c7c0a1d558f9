"""The page of `python -m kdfast.doctor`, on this machine and on ones that are broken."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kdfast import doctor
from kdfast.kernels import backends
from kdfast.kernels.native import REMEDY

ROOT = Path(__file__).parents[1]


@pytest.fixture
def page(capsys):
    def run():
        assert doctor.main([]) == 0
        return capsys.readouterr().out

    return run


def replace_native(monkeypatch, **functions):
    imported = backends._imported
    native = SimpleNamespace(ISAS=("best", "portable"), has_isa=lambda isa: True, **functions)
    monkeypatch.setattr(doctor, "native", native)
    monkeypatch.setattr(
        backends, "_imported", lambda name: native if name == "native" else imported(name)
    )


@pytest.mark.program
def test_program():
    run = [sys.executable, "-m", "kdfast.doctor"]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for word in ("torch", torch.__version__, "triton", "transformers", "driver", "nvcc", "sm_70"):
        assert word in done.stdout
    assert "The loss of tensors on cpu" in done.stdout
    assert "torch 2.14 or older" in done.stdout
    assert "cu126" in done.stdout


def test_every_backend_has_a_verdict(page):
    lines = page().splitlines()
    block = lines[lines.index("The loss of tensors on cpu") + 1 :][:4]
    assert [line.split()[0] for line in block] == ["native", "triton", "reference", "taken"]
    for line, name in zip(block, ("native", "triton", "reference"), strict=False):
        refused = backends.why_not(name, torch.empty(0))
        assert (f"not usable: {refused}" if refused else "usable") in line
    assert block[3].split()[1] == backends.choose(torch.empty(0), None)


def test_an_extension_that_is_not_there(monkeypatch, page):
    replace_native(monkeypatch, why_not=lambda tensor: "the extension is gone")
    text = page()
    assert "native        not usable: the extension is gone" in text
    assert "taken         reference" in text


def test_a_missing_extension_names_a_compiler(monkeypatch, page):
    replace_native(monkeypatch, why_not=lambda tensor: f"it was not built: {REMEDY}")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    text = page()
    assert "C++ compiler  not found" in text
    assert "install a C++ compiler, such as g++, then kdfast again by pip install. With KD" in text
    monkeypatch.setenv("CXX", f"{sys.executable} -I")
    assert f"C++ compiler  Python {platform.python_version()}" in page()


@pytest.mark.program
@pytest.mark.parametrize("required", [False, True])
def test_a_build_without_a_compiler(tmp_path, required):
    for name in ("setup.py", "csrc", "kdfast/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    env = {**os.environ, "CC": "false", "CXX": "false", "CUDA_HOME": str(tmp_path)}
    env["KDFAST_REQUIRE_EXTENSION"] = str(int(required))
    run = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(run, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert (done.returncode == 0) != required, done.stderr
    for words in ("kdfast._C is left out", "install a C++ compiler"):
        assert words in done.stdout
    assert "error" in done.stderr or not required


def test_a_backend_that_breaks_or_is_wrong_is_named(monkeypatch, page):
    def breaks(*arguments):
        raise OSError("illegal instruction\nat 0x0")

    replace_native(monkeypatch, why_not=lambda tensor: None, forward=breaks)
    assert "native        fails: OSError: illegal instruction\n" in page()

    def wrong(tensors, *others):
        return torch.ones(()), torch.ones(len(tensors[0]), 2, 8)

    def gradient(grad, tensors, *others):
        return torch.zeros_like(tensors[0]), None

    replace_native(monkeypatch, why_not=lambda tensor: None, forward=wrong, backward=gradient)
    assert "native        wrong: differs from the reference by" in page()


def test_a_volta_card_and_a_torch_without_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 0))
    monkeypatch.setattr(doctor, "nvcc", lambda: "13.0")
    old_torch, new_nvcc = doctor.faults()
    assert "no code for cuda:0 (sm_70)" in old_torch
    assert "13.0: it builds csrc for sm_75 and newer" in new_nvcc
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_70"])
    monkeypatch.setattr(doctor, "nvcc", lambda: "12.6")
    assert doctor.faults() == []
