"""Triton's interpreter, made faster, round as a GPU does, and strict about memory."""

import os

import numpy as np
import pytest
import torch

IS_ON = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if IS_ON else ["test_*.py"]

GUARD = 64  # elements around an output, which keep it at a 16-byte address

if IS_ON:
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def convert_to_nearest(value, source, target, rounding_mode):
        """The interpreter cuts fp32 -> bf16 off; a GPU rounds to the nearest, ties to even."""
        if source == tl.float32 and target == tl.bfloat16:
            rounded = torch.from_numpy(np.array(value)).bfloat16()
            return rounded.view(torch.int16).numpy().view(np.uint16)
        return convert(value, source, target, rounding_mode)

    def sum_of_halves(self, operand):
        """numpy adds a column from top to bottom; a GPU adds halves, and loses fewer digits."""
        data = np.moveaxis(operand.handle.data, self.axis, 0)
        while len(data) > 1:
            data = data[: len(data) // 2] + data[len(data) // 2 :]
        return self.to_tensor(data[0], operand.dtype)

    patched = {"kdfast.kernels.triton_kernels"}  # its launches patch it

    def call(self, *arguments, **named):
        """A helper inside a kernel. Triton patches its language again at each such call, for good:
        once for each module is as good, and ten times faster."""
        if self.fn.__module__ not in patched:
            patched.add(self.fn.__module__)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*arguments, **named)

    interpreter.ReduceOps.sum = sum_of_halves
    interpreter._convert_float = convert_to_nearest
    if hasattr(interpreter.InterpretedFunction, "rewrite"):
        interpreter.InterpretedFunction.__call__ = call


class Memory:
    """Knows where a kernel may read and write, and what it must not leave unwritten."""

    def __init__(self):
        self.spans = []
        self.buffers = []

    def allow(self, *tensors):
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor) and tensor.numel() > 0:
                steps = zip(tensor.shape, tensor.stride(), strict=True)
                last = sum((size - 1) * stride for size, stride in steps)
                begin = tensor.data_ptr()
                self.spans.append((begin, begin + (last + 1) * tensor.element_size()))
            elif isinstance(tensor, tuple):
                self.allow(*tensor)

    def empty(self, shape, *, dtype, device):
        count = int(np.prod(shape))
        buffer = torch.full((count + 2 * GUARD,), float("nan"), dtype=dtype, device=device)
        self.buffers.append(buffer)
        output = buffer[GUARD : GUARD + count].view(tuple(shape))
        self.allow(output)
        return output

    def check(self, pointers, mask):
        addresses = pointers.data[mask.data].astype(np.int64)
        size = pointers.get_element_ty().primitive_bitwidth // 8 or 1
        known = np.zeros(addresses.shape, bool)
        for begin, end in self.spans:
            known |= (addresses >= begin) & (addresses + size <= end)
        assert known.all(), f"{(~known).sum()} of {known.size} elements are outside every tensor"

    def check_guards(self):
        for buffer in self.buffers:
            assert buffer[:GUARD].isnan().all(), "a kernel wrote before its output"
            assert buffer[-GUARD:].isnan().all(), "a kernel wrote behind its output"


@pytest.fixture
def memory(monkeypatch):
    """Outputs are NaN until written; every address is looked at. Inputs: memory.allow(...)."""
    memory = Memory()
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def checked_load(self, pointers, mask, *others):
        memory.check(pointers, mask)
        return load(self, pointers, mask, *others)

    def checked_store(self, pointers, value, mask, *others):
        memory.check(pointers, mask)
        return store(self, pointers, value, mask, *others)

    monkeypatch.setattr(builder, "create_masked_load", checked_load)
    monkeypatch.setattr(builder, "create_masked_store", checked_store)
    monkeypatch.setattr(torch, "empty", memory.empty)
    monkeypatch.setattr(
        torch, "empty_like", lambda t: memory.empty(t.shape, dtype=t.dtype, device=t.device)
    )
    yield memory
    memory.check_guards()
