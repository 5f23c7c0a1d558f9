"""csrc/kd_rows_cuda.cu compiled by NVRTC 12.9 of the PyPI wheels: for sm_70, and without nvcc.

The wheels: nvidia-cuda-nvrtc-cu12 12.9, nvidia-cuda-runtime-cu12, nvidia-cuda-cccl-cu12.
"""

import ctypes
import importlib.util
from dataclasses import dataclass
from pathlib import Path

# NVRTC has these types, but no such header.
CSTDINT = b"""
typedef unsigned char uint8_t;
typedef int int32_t;
typedef long long int64_t;
typedef unsigned long long uintptr_t;
"""


@dataclass(frozen=True)
class Compiled:
    cubin: bytes
    ptx: str
    log: str  # ptxas -v: registers and spills of each kernel


def wheels() -> Path | None:
    """The folder `nvidia` of the wheels, or None where one of the three is missing."""
    spec = importlib.util.find_spec("nvidia")
    for place in spec.submodule_search_locations if spec else ():
        parts = ("cuda_nvrtc/lib/libnvrtc.so.12", "cuda_runtime/include/cuda_fp16.h")
        if all((Path(place) / part).exists() for part in (*parts, "cuda_cccl/include/nv/target")):
            return Path(place)
    return None


def compile_rows(nvidia: Path, source: Path, arch: str, kernels: list[str]) -> Compiled:
    """`source` for `arch` ("sm_70"), with the named template instances in it.

    Raises RuntimeError with NVRTC's log.
    """
    lib = ctypes.CDLL(str(nvidia / "cuda_nvrtc/lib/libnvrtc.so.12"))
    program = ctypes.c_void_p()
    headers, names = (ctypes.c_char_p * 1)(CSTDINT), (ctypes.c_char_p * 1)(b"cstdint")
    text = source.read_bytes()
    _check(lib.nvrtcCreateProgram(ctypes.byref(program), text, b"rows.cu", 1, headers, names))
    try:
        for kernel in kernels:
            _check(lib.nvrtcAddNameExpression(program, kernel.encode()))
        folders = (source.parent, nvidia / "cuda_runtime/include", nvidia / "cuda_cccl/include")
        options = [f"--gpu-architecture={arch}", "--std=c++17"]
        options += ["-default-device", "--ptxas-options=-v"]
        options += [f"--include-path={folder}" for folder in folders]
        array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        failed = lib.nvrtcCompileProgram(program, len(options), array)
        log = _text(lib, program, "ProgramLog").decode()
        if failed:
            raise RuntimeError(log)
        ptx = _text(lib, program, "PTX").rstrip(b"\0").decode()
        return Compiled(_text(lib, program, "CUBIN"), ptx, log)
    finally:
        lib.nvrtcDestroyProgram(ctypes.byref(program))


def _check(result: int) -> None:
    if result:
        raise RuntimeError(f"NVRTC answered {result}")


def _text(lib: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(getattr(lib, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(getattr(lib, f"nvrtcGet{what}")(program, buffer))
    return buffer.raw
