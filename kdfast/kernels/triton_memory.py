"""How the Triton kernels read and write memory: windows, their rows, blocks of them, targets.

A program computes the rows of one window, HEADS of them: 2 where start and end logits lie side by
side, (B, L, 2), and 1 where each row has its own memory. Logits come in as flat blocks of
BLOCK * HEADS elements, seen as (BLOCK, HEADS), so that one reduction over dimension 0 serves both
heads and one wide load brings both.

**The frame.** A load is only wide from a 16-byte address, and a row of odd L rarely begins at one.
So a program counts its elements from the last such address before its row, `shift` elements
earlier: element j of the frame is element j - shift of the row. Blocks then begin and end at
16-byte addresses, loads are bounded there too, and what belongs to a neighbour is replaced after
the load, in registers. Only where that would leave the tensor, at its very ends, is a load bounded
by the row itself. UNIT is the number of elements, of the narrowest type, in 16 bytes.
"""

import triton
import triton.language as tl

# How an operand lies in memory. FRAMED: at the addresses of the frame. DENSE: elements of a row
# side by side, but elsewhere. STRIDED: apart.
FRAMED = tl.constexpr(2)
DENSE = tl.constexpr(1)
STRIDED = tl.constexpr(0)
NONE = tl.constexpr(-1)  # there is no such operand


@triton.jit
def window_of(
    length,
    frame_offset,
    frame_stride,
    HEADS: tl.constexpr,
    UNIT: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """What a program computes: window b (the last of all is last_b), its first head, its heads
    (HEADS,), the elements of its row, and how far its frame begins before them."""
    GROUPS: tl.constexpr = 2 // HEADS
    program = tl.program_id(0)
    b = (program // GROUPS).to(tl.int64)
    last_b = (tl.num_programs(0) // GROUPS - 1).to(tl.int64)
    first_head = program % GROUPS
    shift = 0
    if RAGGED:
        shift = ((frame_offset + b * frame_stride) % UNIT).to(tl.int32)
        shift = tl.multiple_of(shift, HEADS)
    return b, last_b, first_head, first_head + tl.arange(0, HEADS), length * HEADS, shift


@triton.jit
def row_of(base, stride_b, stride_h, b, head):
    """The address of the row of `head`."""
    return base + b * stride_b + head.to(tl.int64) * stride_h


@triton.jit
def frame_fits(b, last_b, stride_b, shift, width, UNIT: tl.constexpr):
    """Whether the row's frame, to the end of its last unit, lies inside the tensor."""
    begin = b * stride_b - shift
    length = (shift + width + UNIT - 1) // UNIT * UNIT
    return (begin >= 0) & (begin + length <= last_b * stride_b + width)


@triton.jit
def load_block(
    row,
    stride_l,
    fits,
    first,
    shift,
    width,
    N: tl.constexpr,
    LAYOUT: tl.constexpr,
    UNIT: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """N elements of the frame from `first`; those of other rows may hold any value."""
    flat = first + tl.arange(0, N)
    own = (flat >= shift) & (flat < shift + width)
    if LAYOUT == FRAMED:
        # What holds because the launcher chose this layout; the compiler cannot know.
        pointers = tl.multiple_of(row - shift + flat, 16)
        if RAGGED:
            end = (shift + width + UNIT - 1) // UNIT * UNIT
            if fits:
                block = tl.load(pointers, mask=flat < end, other=0.0)
            else:
                block = tl.load(pointers, mask=own, other=0.0)
        else:
            # The compiler must see that the bound is a multiple, or it looks at each element.
            block = tl.load(pointers, mask=flat < width // UNIT * UNIT, other=0.0)
    elif LAYOUT == DENSE:
        block = tl.load(row - shift + flat, mask=own, other=0.0)
    else:
        block = tl.load(row + (flat - shift).to(tl.int64) * stride_l, mask=own, other=0.0)
    return block


@triton.jit
def store_block(
    row,
    stride_l,
    block,
    first,
    shift,
    width,
    N: tl.constexpr,
    LAYOUT: tl.constexpr,
    UNIT: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """Write N elements of the frame from `first`: exactly those of the row."""
    flat = first + tl.arange(0, N)
    own = (flat >= shift) & (flat < shift + width)
    if LAYOUT == FRAMED:
        pointers = tl.multiple_of(row - shift + flat, 16)
        if RAGGED:
            # Whole units at once, then the units that are shared with a neighbour, if any.
            begin = (shift + UNIT - 1) // UNIT * UNIT
            end = (shift + width) // UNIT * UNIT
            whole = (flat >= begin) & (flat < end)
            tl.store(pointers, block, mask=whole)
            if (first < begin) | (first + N > end):
                tl.store(pointers, block, mask=own & ((flat < begin) | (flat >= end)))
        else:
            tl.store(pointers, block, mask=flat < width // UNIT * UNIT)
    elif LAYOUT == DENSE:
        tl.store(row - shift + flat, block, mask=own)
    else:
        tl.store(row + (flat - shift).to(tl.int64) * stride_l, block, mask=own)


@triton.jit
def participating(mask_row, mask_stride_l, position, length, MASK: tl.constexpr):
    """(BLOCK,): the positions of the row that take part."""
    part = (position >= 0) & (position < length)
    if MASK == DENSE:
        part = part & tl.load(mask_row + position, mask=part, other=0)
    elif MASK == STRIDED:
        part = part & tl.load(mask_row + position.to(tl.int64) * mask_stride_l, mask=part, other=0)
    return part


@triton.jit
def target_of(
    start_positions,
    end_positions,
    start_stride,
    end_stride,
    mask_row,
    mask_stride_l,
    b,
    head,
    length,
    MASK: tl.constexpr,
):
    """(HEADS,) int32: the answer's position, -1 where there is none to learn from."""
    start = tl.load(start_positions + b * start_stride).to(tl.int64)
    end = tl.load(end_positions + b * end_stride).to(tl.int64)
    target = tl.where(head == 0, start, end)
    counts = (target >= 0) & (target < length)
    if MASK != NONE:
        counts = counts & tl.load(mask_row + target * mask_stride_l, mask=counts, other=0)
    return tl.where(counts, target, -1).to(tl.int32)
