"""How the tensors of a call lie in memory, which decides what is compiled. Needs no Triton.

`triton_memory` says what a frame is.
"""

from dataclasses import dataclass

from torch import Tensor

# Elements of a block: 8 for each of 256 threads, so that student and teacher together keep four
# 16-byte loads of a thread in flight in fp32, within 64 registers. See tests/triton.
LARGEST_BLOCK = 2048
FRAMED, DENSE, STRIDED, NONE = 2, 1, 0, -1


@dataclass(frozen=True, slots=True)
class Operand:
    """Start and end logits, or their gradient, as a kernel sees them: strides in elements."""

    tensor: Tensor  # the start logits
    end: Tensor  # found through stride_h; here so that it lives as long
    stride_b: int
    stride_l: int
    stride_h: int
    size: int  # bytes of an element
    first: int  # address of the start logits, in elements

    @classmethod
    def of(cls, start: Tensor, end: Tensor | None) -> "Operand":
        """Of one (B, L, 2) tensor, or of two (B, L)."""
        if end is None:
            start, end = start.unbind(-1)
        if start.stride() != end.stride():
            # One kernel argument serves both: heads that lie differently are worth a copy.
            start, end = start.contiguous(), end.contiguous()
        size = start.element_size()
        address = start.data_ptr()
        stride_b, stride_l = start.stride()
        stride_h = (end.data_ptr() - address) // size
        if start.shape[1] == 1:
            stride_l = 2 if stride_h == 1 else 1
        return cls(start, end, stride_b, stride_l, stride_h, size, address // size)

    @property
    def is_interleaved(self) -> bool:
        return self.stride_h == 1 and self.stride_l == 2

    @property
    def arguments(self) -> tuple[Tensor, int, int, int]:
        """As the kernels take them."""
        return self.tensor, self.stride_b, self.stride_l, self.stride_h


@dataclass(frozen=True, slots=True)
class Layout:
    """How the rows of a call lie in memory, of which kernels are compiled."""

    heads: int  # rows of a program
    unit: int  # elements, of the narrowest type, in 16 bytes
    is_ragged: bool  # not every row begins and ends at a 16-byte address
    offset: int  # the frame of window b begins (offset + b stride) % unit elements early
    stride: int
    each: tuple[int, ...]  # FRAMED, DENSE or STRIDED, for each operand
    elements: int  # of a block
    blocks: int  # that cover the longest frame

    @classmethod
    def of(cls, operands: list[Operand], length: int) -> "Layout":
        """Of operands that are read together: the first whose rows are dense gives the frame."""
        heads = 2 if all(operand.is_interleaved for operand in operands) else 1
        dense = [heads == 2 or operand.stride_l == 1 for operand in operands]
        unit = 16 // min(operand.size for operand in operands)
        offset = stride = 0
        if any(dense):
            lead = operands[dense.index(True)]
            offset, stride = lead.first % unit, lead.stride_b % unit
        framed = [
            is_dense
            # A frame that would part a pair is none.
            and offset % heads == stride % heads == 0
            and (operand.first - offset) % unit == 0
            and (operand.stride_b - stride) % unit == 0
            and (heads == 2 or operand.stride_h % unit == 0)
            for operand, is_dense in zip(operands, dense, strict=True)
        ]
        if not any(framed):
            offset = stride = 0
        each = tuple(
            FRAMED if is_framed else DENSE if is_dense else STRIDED
            for is_framed, is_dense in zip(framed, dense, strict=True)
        )
        width = length * heads
        is_ragged = any(framed) and bool(offset or stride or width % unit)
        longest = width + (unit - heads if offset or stride else 0)
        elements = min(LARGEST_BLOCK, max(64, 1 << (longest - 1).bit_length()))
        blocks = -(-longest // elements)
        return cls(heads, unit, is_ragged, offset, stride, each, elements, blocks)
