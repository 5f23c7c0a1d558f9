"""The Triton kernels compiled for cards that are not here: registers, spills, width of loads.

**The register ceiling** is what keeps memory busy. A thread asks for 8 elements of student and
teacher at once: 32 bytes in fp16, 64 in fp32. An H100 delivers 3.35 TB/s x 0.6 us of latency, 15 kB
for each of its 132 multiprocessors on the way, a V100 7 kB: 480 and 224 threads of a multiprocessor
in fp16, so up to 128 and 256 of its 65,536 registers each would do. The ceiling is 64, for 1,024
threads (all that Turing can hold). Rows of several blocks may take 96 on Volta, for 640 threads:
it has no registers that a warp shares, and a loop keeps addresses. fp64, for gradient checks: 128.

Ceilings and spills are those of Triton 3.7 and newer, with its ptxas. Of these cases 3.1 takes up
to 80 for two, and spills 16 bytes of the loop on Volta.
"""

import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kdfast.kernels import triton_launch, triton_layout

triton = pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

pytestmark = [
    pytest.mark.program,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="Triton's interpreter compiles nothing"
    ),
]

IS_OLD = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 7)
CARDS = [70, 75, 80, 90]
NAMES = {
    **{torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"},
    **{torch.float64: "fp64", torch.int64: "i64", torch.bool: "i1"},
}


def launches(form, length, dtype, kind=0, teacher_dtype=None):
    """The forward and the backward launch for 8 windows with a mask, and T other than 1."""
    batch = 8

    def logits(dtype):
        if form == "interleaved":
            return torch.empty(batch, length, 2, dtype=dtype), None
        return torch.empty(batch, length, dtype=dtype), torch.empty(batch, length, dtype=dtype)

    positions = torch.zeros(batch, dtype=torch.int64)
    mask = torch.ones(batch, length, dtype=torch.bool)
    tensors = (*logits(dtype), *logits(teacher_dtype or dtype), positions, positions, mask)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    row_loss, row_stats = torch.empty(batch, 2, dtype=acc), torch.empty(batch, 2, 8, dtype=acc)
    settings = (1.7, 0.6, kind, 1.0)
    return {
        "forward": triton_launch.forward_launch(tensors, row_loss, row_stats, settings),
        "backward": triton_launch.backward_launch(
            row_loss, tensors, row_stats, logits(dtype), settings
        ),
    }


def type_of(argument):
    if isinstance(argument, torch.Tensor):
        return "*" + NAMES[argument.dtype]
    if isinstance(argument, float):
        return "fp32"
    return "i32" if -(2**31) <= argument < 2**31 else "i64"


def compiled(launch, card, **options):
    """Nothing is promised of the arguments: wide loads must follow from the kernel alone."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    types = dict(zip(names, map(type_of, launch.arguments), strict=False))
    if "constexprs" in inspect.signature(ASTSource.__init__).parameters:
        types |= dict.fromkeys(launch.constants, "constexpr")
        source = ASTSource(launch.kernel, types, constexprs=dict(launch.constants))
    else:  # before Triton 3.3
        source = ASTSource(launch.kernel, types, constants=dict(launch.constants))
    target = GPUTarget("cuda", card, 32)
    return triton.compile(source, target=target, options=launch.options | options)


def resources(binary, folder):
    """Registers of a thread, and bytes that it keeps in memory for want of them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    tool = tool if tool.exists() else shutil.which("cuobjdump")
    if tool is None:
        pytest.skip("cuobjdump is neither in Triton's wheel nor on the path")
    file = folder / "kernel.cubin"
    file.write_bytes(binary.asm["cubin"])
    said = subprocess.run(
        [tool, "--dump-resource-usage", file], capture_output=True, text=True, check=True
    ).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", said).groups()
    return int(registers), int(stack) + int(local)


def ceiling(card, dtype, length):
    if dtype == torch.float64:
        return 128
    return 96 if card == 70 and length > triton_layout.LARGEST_BLOCK // 2 else 64


def check_resources(binary, folder, most):
    registers, spilled = resources(binary, folder)
    assert IS_OLD or spilled == 0
    assert IS_OLD or registers <= most


def wide(binary, what):
    """How many 16-byte loads ("ld") or stores ("st") a thread has."""
    return len(re.findall(rf"\b{what}\.global\S*\.(?:v4\.b32|v2\.b64)", binary.asm["ptx"]))


def expected(launch, size):
    """Wide accesses of a thread to one operand's block."""
    elements = launch.constants["BLOCK"] * launch.constants["HEADS"]
    return elements * size // (launch.options["num_warps"] * 32 * 16)


@pytest.fixture(autouse=True)
def compiles_afresh(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


CASES = [
    *(("interleaved", length, torch.float32, card) for length in (384, 383) for card in CARDS),
    *(("pair", length, torch.float32, card) for length in (384, 383) for card in (70, 90)),
    *(("interleaved", 4095, torch.float32, card) for card in (70, 90)),
    *(("interleaved", length, torch.float16, card) for length in (384, 383) for card in (70, 80)),
    ("pair", 383, torch.float16, 75),
    ("interleaved", 384, torch.bfloat16, 90),
    ("interleaved", 384, torch.float64, 70),
]


@pytest.mark.parametrize("which", ["forward", "backward"])
@pytest.mark.parametrize("form, length, dtype, card", CASES)
def test_registers_and_loads(form, length, dtype, card, which, tmp_path):
    launch = launches(form, length, dtype)[which]
    binary = compiled(launch, card)
    check_resources(binary, tmp_path, ceiling(card, dtype, length))
    one = expected(launch, dtype.itemsize)
    assert one > 0
    assert wide(binary, "ld") == 2 * one  # student and teacher
    assert wide(binary, "st") == (one if which == "backward" else 0)


@pytest.mark.parametrize("which", ["forward", "backward"])
def test_mse(which, tmp_path):
    launch = launches("interleaved", 383, torch.float32, kind=1)[which]
    binary = compiled(launch, 70)
    check_resources(binary, tmp_path, 64)
    assert wide(binary, "ld") == 2 * expected(launch, 4)


def test_a_teacher_of_another_type_shares_the_frame(tmp_path):
    launch = launches("interleaved", 383, torch.float32, teacher_dtype=torch.float16)["forward"]
    binary = compiled(launch, 70)
    check_resources(binary, tmp_path, 64)
    assert wide(binary, "ld") == expected(launch, 4) + expected(launch, 2)


def test_options_do_not_hang_on_the_version():
    for launch in launches("interleaved", 8, torch.float32).values():
        assert launch.options["enable_fp_fusion"] is True


def test_the_checks_can_fail(tmp_path):
    launch = launches("interleaved", 384, torch.float32)["forward"]
    launch.constants["STUDENT"] = triton_layout.DENSE
    assert wide(compiled(launch, 70), "ld") == expected(launch, 4)
    launch = launches("interleaved", 384, torch.float32)["backward"]
    assert resources(compiled(launch, 70, maxnreg=16), tmp_path)[1] > 0


class TestWhyNot:
    """The sentences of a backend that cannot be used."""

    @pytest.fixture(autouse=True)
    def forgets(self):
        triton_launch._why_no_triton.cache_clear()
        yield
        triton_launch._why_no_triton.cache_clear()

    def test_no_cuda_tensor(self):
        assert triton_launch.why_not(torch.zeros(1)) == (
            "Triton's rows are for CUDA tensors, this one is on cpu"
        )

    def test_no_triton(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "triton", None)
        assert "cannot be imported" in triton_launch.why_not(torch.zeros(1))

    def test_old_triton(self, monkeypatch):
        monkeypatch.setattr(triton, "__version__", "3.0.0")
        assert "Triton 3.0.0 is too old, expected 3.1" in triton_launch.why_not(torch.zeros(1))
