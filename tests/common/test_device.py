"""Which devices can be used; out of memory, as torch says it."""

import subprocess
import sys

import pytest
import torch

from kdfast.common.device import device_of, is_out_of_memory
from kdfast.common.errors import UserError

# What each of them said when it was refused memory.
REFUSALS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    MemoryError(),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 4096 bytes. Error code 12 (Cannot allocate memory)"
    ),
    RuntimeError("could not create a primitive"),
    RuntimeError("could not create a memory object"),
    RuntimeError("std::bad_alloc"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be"),
]
OTHERS = [
    RuntimeError("could not create a primitive descriptor for the matmul primitive. Run workload"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`"),
    torch.AcceleratorError("CUDA error: device-side assert triggered"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    ValueError("memory"),
]


@pytest.mark.parametrize("error", REFUSALS, ids=str)
def test_a_refusal_of_memory(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_any_other_error(error):
    assert not is_out_of_memory(error)


@pytest.mark.parametrize("device", ["meta", torch.device("meta")])
def test_a_device_that_computes_nothing_is_refused(device):
    with pytest.raises(UserError, match="device 'meta' is neither a CPU nor a GPU of CUDA: name"):
        device_of(device)
    assert device_of("cpu") == torch.device("cpu")


LIMITED = """
import resource
import torch
from kdfast.common.device import is_out_of_memory

dtype, count = torch.{dtype}, {count}
a, b = torch.ones(count, 256, dtype=dtype), torch.ones(256, 512, dtype=dtype)
out = torch.ones(count, 512, dtype=dtype)
torch.mm(a[:3], b)
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize(), resource.RLIM_INFINITY))
try:
    {work}
except Exception as error:
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
    print(is_out_of_memory(error), error)
"""


@pytest.mark.parametrize(
    ("dtype", "count", "work", "text"),
    [
        ("float32", 9, "torch.empty(1 << 28)", "DefaultCPUAllocator"),
        ("bfloat16", 19000, "torch.mm(a, b, out=out)", "could not create a primitive"),
        ("float32", 9, "bytearray(1 << 28)", ""),
    ],
)
def test_what_a_real_limit_of_memory_raises(dtype, count, work, text):
    """Of torch's own allocator, of oneDNN and of Python."""
    script = LIMITED.format(dtype=dtype, count=count, work=work)
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    if text.startswith("could") and not ended.stdout:
        pytest.skip("this machine's oneDNN needs no memory of its own for bf16")
    assert ended.stdout.startswith("True") and text in ended.stdout
