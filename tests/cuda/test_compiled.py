"""What the compilers make of the CUDA rows: registers, spills, widths of loads and stores.

The most registers that a kernel may take:
80   fp32 on fp32, the common case: 24 warps on an SM.
104  with 16-bit or mixed operands, whose chunks of 8 positions live in registers: 19 warps. Each
     of their threads keeps 64 bytes or more in flight, 39 kB on an SM; a V100's memory (900 GB/s,
     80 SMs, a latency of some 0.6 us) asks for 7 kB, an H100's for 15.
128  fp64, which is for gradcheck: what the 65,536 registers of an SM give the 512 threads of the
     largest block. Above it a launch fails.
None may spill.
"""

import re
import shutil
import subprocess
from pathlib import Path

import emulator
import nvrtc
import pytest
import torch

from kdfast.kernels import native

pytestmark = pytest.mark.program

CEILINGS = {("f32", "f32"): 80, ("f64", "f64"): 128}
OTHERS = 104
NAMES = ("f16", "bf16", "f32", "f64")  # as numbered in kd_rows.h
KERNEL = r"(forward|backward)_rowsILNS_4TypeE(\d)ELS\d_(\d)E"
PAIRS = [("f16", "f16"), ("bf16", "bf16"), ("f32", "f32"), ("f16", "f32"), ("f64", "f64")]


def kernel_of(mangled):
    """("forward", student's type, teacher's type), or None."""
    found = re.search(KERNEL, mangled)
    return found and (found[1], NAMES[int(found[2])], NAMES[int(found[3])])


def check_resources(log, kernels):
    """ptxas -v: every one of that many kernels keeps within its ceiling and spills nothing."""
    found = re.findall(r"Function properties for (\S+)\n(.*)\n.*Used (\d+) registers", log)
    assert len(found) == kernels, log
    for mangled, memory, registers in found:
        kernel = kernel_of(mangled)
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in memory, kernel
        ceiling = CEILINGS.get(kernel[1:], OTHERS)
        assert int(registers) <= ceiling, f"{kernel} takes {registers} registers"


@pytest.fixture(scope="module")
def volta():
    wheels = nvrtc.wheels()
    if wheels is None:
        pytest.skip("the wheels nvidia-cuda-{nvrtc,runtime,cccl}-cu12 are not installed")
    kernels = [
        f"kd::{way}_rows<kd::Type::{student}, kd::Type::{teacher}>"
        for way in ("forward", "backward")
        for student, teacher in PAIRS
    ]
    return nvrtc.compile_rows(wheels, emulator.SOURCE, "sm_70", kernels)


def test_volta_registers(volta):
    check_resources(volta.log, 2 * len(PAIRS))


def test_volta_accesses_are_16_bytes_wide(volta):
    """One kernel serves every L: which of its loads run is what test_emulated_rows.py counts."""
    bodies = {kernel_of(body.split("(")[0]): body for body in volta.ptx.split(".entry ")[1:]}
    assert len(bodies) == 2 * len(PAIRS)
    for (way, student, teacher), body in bodies.items():
        # Interleaved and pair, student and teacher: each as many as hold its chunk.
        positions = 2 if student == "f64" else 8 if "16" in student + teacher else 4
        sizes = [{"f32": 4, "f64": 8}.get(name, 2) for name in (student, teacher)]
        loads = len(re.findall(r"ld\.global\.nc\.v4\.u32", body))
        assert loads == sum(2 * 2 * positions * size // 16 for size in sizes), (way, student)
        stores = len(re.findall(r"st\.global\.wb\.v4\.u32", body))
        assert stores == (2 * 2 * positions * sizes[0] // 16 if way == "backward" else 0)
        assert ".local" not in body  # nothing is indexed in memory


def nvcc_architectures():
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return []
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=False)
    known = {int(number) for number in re.findall(r"^sm_(\d+)$", listed.stdout, re.M)}
    return sorted(known & {70, 75, 80, 90, 100})


ARCHITECTURES = nvcc_architectures()


@pytest.mark.sample(2)
@pytest.mark.parametrize("architecture", ARCHITECTURES or [None])
def test_nvcc_registers(tmp_path, architecture):
    if architecture is None:
        pytest.skip("nvcc is not installed")
    log = run_nvcc(tmp_path / "rows.cubin", architecture, ["f16", "f32"])
    check_resources(log, 2 * 4)


def test_nvcc_wide_instructions(tmp_path):
    """In the machine code itself, where a disassembler is at hand: Triton brings one."""
    if not ARCHITECTURES:
        pytest.skip("nvcc is not installed")
    triton = pytest.importorskip("triton", reason="triton, which brings nvdisasm, is missing")
    nvdisasm = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    if not nvdisasm.exists():
        pytest.skip("this triton brings no nvdisasm")
    cubin = tmp_path / "rows.cubin"
    run_nvcc(cubin, ARCHITECTURES[0], ["f32"])
    listed = subprocess.run(
        [str(nvdisasm), "-c", str(cubin)], capture_output=True, text=True, check=True
    )
    sections = re.split(r"\t\.section\t\.text\.", listed.stdout)[1:]
    code = {kernel_of(section.split(",")[0])[0]: section for section in sections}
    for way, wide_stores in (("forward", 0), ("backward", 4)):
        assert len(re.findall(r"LDG\.E\.128", code[way])) == 8
        assert len(re.findall(r"STG\.E\.(?:STRONG\.\S+\.)?128", code[way])) == wide_stores
        assert not re.search(r"\b(LDL|STL)\b", code[way])  # no local memory


def run_nvcc(cubin, architecture, types):
    """Compiles the rows of these types, as setup.py does; what ptxas said."""
    cases = " ".join(f"X({name})" for name in types)
    done = subprocess.run(
        [
            *("nvcc", "-std=c++17", "-O3", "-DKDFAST_CUDA=1", f"-DKD_TYPES(X)={cases}"),
            *("-Xptxas", "-v", f"-arch=sm_{architecture}", "-cubin", str(emulator.SOURCE)),
            *("-o", str(cubin)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_without_a_card_a_launch_is_refused_and_said(monkeypatch):
    """The built extension, all the way to the runtime's own answer."""
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    if native.built_architectures() is None:
        pytest.skip("kdfast._C was built without CUDA")
    monkeypatch.setattr(native, "_place", lambda *call: (1, 0, 0, 0))
    logits, position = torch.zeros(1, 8, 2), torch.zeros(1, dtype=torch.int64)
    tensors = (logits, None, logits, None, position, position, None)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="CUDA: "):
            native.forward(tensors, (1.0, 0.5, 0, 1.0))
