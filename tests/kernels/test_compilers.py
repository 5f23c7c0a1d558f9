"""csrc/kd_rows_cpu.cpp by each compiler at hand, for other processors, and under sanitizers."""

import itertools
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kdfast.kernels import native

from .exact_rows import exact_rows, to_long

pytestmark = pytest.mark.program

PROJECT = Path(__file__).parents[2]
FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
SETTINGS = {"temperature": 1.7, "weight": 0.6, "kind": 0, "soft_scale": 1.0}
MODES = [
    *(SETTINGS | {"temperature": temperature} for temperature in (1.7, 2.0)),
    *(SETTINGS | {"weight": weight} for weight in (0.0, 1.0)),
    *(SETTINGS | {"kind": 1, "soft_scale": 0.5, "weight": weight} for weight in (0.6, 1.0)),
]
SANITIZERS = ("-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
# Name, compiler, its flags, and what runs the program.
PROGRAMS = {
    "clang": ("clang++", (), ()),
    "g++ with sanitizers": ("g++", SANITIZERS, ()),
    "g++ for aarch64": ("aarch64-linux-gnu-g++", ("-static",), ("qemu-aarch64",)),
}


def needs(*programs):
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not on the PATH: the rows it would build are not tested")


def compile_flags():
    """The flags of setup.py, which decide what the compiler makes of the loops."""
    text = (PROJECT / "setup.py").read_text()
    line = next(line for line in text.splitlines() if "extra_compile_args" in line)
    return [word for word in line.split('"') if word.startswith("-")]


@pytest.fixture(scope="module", params=PROGRAMS)
def run_rows(request, tmp_path_factory):
    """Calls the program of one compiler: row_loss, row_parts and the gradient (B, L, 2)."""
    compiler, flags, runner = PROGRAMS[request.param]
    needs(compiler, *runner)
    program = tmp_path_factory.mktemp("rows") / "rows"
    sources = [PROJECT / "csrc" / "kd_rows_cpu.cpp", Path(__file__).parent / "rows_driver.cpp"]
    command = [compiler, "-std=c++17", *compile_flags(), "-Werror", *flags]
    command += [f"-I{PROJECT / 'csrc'}", *map(str, sources), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    def run(student, teacher, targets, mask, *, apart, isa="best", threads=1, **settings):
        tensors = [logits.permute(2, 0, 1) if apart else logits for logits in (student, teacher)]
        tensors = [*tensors, torch.stack(targets), *([] if mask is None else [mask])]
        batch, length, _ = student.shape
        types = native.TYPES[student.dtype], native.TYPES[teacher.dtype]
        places = apart, mask is not None, settings["kind"], native.ISAS.index(isa), threads
        scales = settings["temperature"], settings["weight"], settings["soft_scale"]
        given = struct.pack("9q3d", batch, length, *types, *places, *scales)
        given += b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in tensors)
        done = subprocess.run([*runner, program], input=given, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()
        wide = FP64 if student.dtype == FP64 else FP32
        sizes = [(batch, 2), (batch, 2, native.STATS), (2, batch, length)]
        results, at = [], 0
        for size, dtype in zip(sizes, (wide, wide, student.dtype), strict=True):
            end = at + int(np.prod(size)) * dtype.itemsize
            results.append(torch.frombuffer(bytearray(done.stdout[at:end]), dtype=dtype))
            at = end
        assert at == len(done.stdout)
        gradient = results[2].view(2, batch, length).permute(1, 2, 0) if apart else results[2]
        stats = results[1].view(batch, 2, native.STATS)
        return results[0].view(batch, 2), stats[..., 5:7], gradient.reshape(batch, length, 2)

    return run


def batch_of(length, dtype, teacher_dtype):
    """(student, teacher, targets, mask) of four windows, one without positions, one target out."""
    generator = torch.Generator().manual_seed(length)
    logits = 3 * torch.randn(2, 4, length, 2, generator=generator, dtype=FP64)
    targets = torch.randint(0, length, (2, 4), generator=generator)
    targets[0, 0] = -100
    mask = torch.rand(4, length, generator=generator) < 0.7
    # The last window lacks its first position: what is written for it ends where the memory does.
    mask[2], mask[3] = False, torch.arange(length) > 0
    return logits[0].to(dtype), logits[1].to(teacher_dtype), tuple(targets), mask


def assert_exact(actual, student, teacher, targets, mask, settings):
    dtype = student.dtype
    expected = exact_rows(student, teacher, targets, mask, **settings)
    ulp = 2.0**-53 if dtype == FP64 else 2.0**-24
    for i, (left, right) in enumerate(zip(actual, expected, strict=True)):
        rounding = torch.finfo(dtype).eps / 2 if i == 2 else 0.0
        error = abs(to_long(left) - right)
        size = max(1.0, float(abs(right).max()))
        assert float((error - rounding * abs(right)).max()) < 16 * ulp * size, f"{settings}"


TYPES = [(FP32, FP32), (FP16, FP16), (BF16, FP32), (FP64, FP64), (FP64, FP16)]
IDS = ["fp32", "fp16", "bf16-fp32", "fp64", "fp64-fp16"]


@pytest.mark.sample(3)
@pytest.mark.parametrize("types", TYPES, ids=IDS)
def test_the_rows_of_every_compiler(types, run_rows):
    for length, apart, is_masked in itertools.product((1, 7, 64, 100), (0, 1), (0, 1)):
        student, teacher, targets, mask = batch_of(length, *types)
        mask = mask if is_masked else None
        settings = MODES[(length + apart + is_masked) % len(MODES)]
        results = run_rows(student, teacher, targets, mask, apart=apart, **settings)
        assert_exact(results, student, teacher, targets, mask, settings)


@pytest.mark.sample(3)
@pytest.mark.parametrize("settings", MODES, ids=lambda s: "-".join(map(str, s.values())))
def test_the_modes_of_every_compiler(settings, run_rows):
    for length, threads in ((1, 1), (1500, 1), (40_000, 2)):
        student, teacher, targets, mask = batch_of(length, FP32, FP32)
        arguments = student, teacher, targets, mask
        results = run_rows(*arguments, apart=0, threads=threads, **settings)
        assert_exact(results, *arguments, settings)


@pytest.mark.slow
def test_setup_builds_with_clang(tmp_path):
    """pip keeps quiet about a build that failed: kdfast._C would be missing."""
    needs("clang++")
    build = ["build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path)]
    wanted = {"CC": "clang", "CXX": "clang++", "KDFAST_REQUIRE_EXTENSION": "1"}
    done = subprocess.run(
        [sys.executable, "setup.py", *build],
        env=os.environ | wanted | {"CUDA_HOME": str(tmp_path)},
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "clang++" in done.stdout
    assert "warning" not in done.stderr, done.stderr
    (built,) = (tmp_path / "lib" / "kdfast").glob("_C*")
    use = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("kdfast._C", {str(built)!r})
sys.modules["kdfast._C"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
import torch
from kdfast import fused_kd_loss
logits, at = torch.randn(2, 3, 50, 2), torch.arange(3)
losses = [
    fused_kd_loss(*logits, at, at, temperature=2.0, backend=backend)
    for backend in ("native", "reference")
]
torch.testing.assert_close(*losses)
print(module.__file__)
"""
    used = subprocess.run([sys.executable, "-c", use], capture_output=True, text=True, check=True)
    assert used.stdout.strip() == str(built)
