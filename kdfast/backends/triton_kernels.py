"""The two kernels of `triton_rows`, kept apart because their decorator needs Triton at import.

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

MINUS_INFINITY = tl.constexpr(float("-inf"))


@triton.jit
def _number(high, low, ACC: tl.constexpr):
    """A Python float, which a launch rounds to fp32, given as what was kept and what was lost."""
    return tl.cast(high, ACC) + tl.cast(low, ACC)


@triton.jit
def _or_zero(top):
    """A maximum to subtract: 0 for a row that has none yet, as -inf - -inf would be NaN."""
    return tl.where(top == MINUS_INFINITY, 0.0, top)


@triton.jit
def _shift(
    b, frame_offset, frame_stride, UNIT: tl.constexpr, HEADS: tl.constexpr, RAGGED: tl.constexpr
):
    """How far the frame of window b begins before its row."""
    shift = 0
    if RAGGED:
        shift = ((frame_offset + b * frame_stride) % UNIT).to(tl.int32)
        shift = tl.multiple_of(shift, HEADS)
    return shift


@triton.jit
def _row(base, stride_b, stride_h, b, head):
    """The address of the row of `head`."""
    return base + b * stride_b + head.to(tl.int64) * stride_h


@triton.jit
def _fits(b, last_b, stride_b, shift, width, UNIT: tl.constexpr):
    """Whether the row's frame, to the end of its last unit, lies inside the tensor."""
    begin = b * stride_b - shift
    length = (shift + width + UNIT - 1) // UNIT * UNIT
    return (begin >= 0) & (begin + length <= last_b * stride_b + width)


@triton.jit
def _load(
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
    """N elements of the frame from `first`; whatever does not belong to the row is arbitrary."""
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
def _store(
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
def _participating(mask_row, mask_stride_l, position, length, MASK: tl.constexpr):
    """(BLOCK,): the positions of the row that take part."""
    part = (position >= 0) & (position < length)
    if MASK == DENSE:
        part = part & tl.load(mask_row + position, mask=part, other=0)
    elif MASK == STRIDED:
        part = part & tl.load(mask_row + position.to(tl.int64) * mask_stride_l, mask=part, other=0)
    return part


@triton.jit
def _target(
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


@triton.jit(
    do_not_specialize=[
        *("student_stride_b", "student_stride_l", "student_stride_h"),
        *("teacher_stride_b", "teacher_stride_l", "teacher_stride_h"),
        *("mask_stride_b", "mask_stride_l", "start_stride", "end_stride"),
        *("length", "frame_offset", "frame_stride"),
    ]
)
def rows_forward(
    student,
    student_stride_b,
    student_stride_l,
    student_stride_h,
    teacher,
    teacher_stride_b,
    teacher_stride_l,
    teacher_stride_h,
    mask,
    mask_stride_b,
    mask_stride_l,
    start_positions,
    start_stride,
    end_positions,
    end_stride,
    row_loss,
    row_stats,
    length,
    frame_offset,
    frame_stride,
    inverse_temperature,
    inverse_temperature_low,
    soft_factor,
    soft_factor_low,
    soft_weight,
    soft_weight_low,
    hard_weight,
    hard_weight_low,
    ACC: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    UNIT: tl.constexpr,
    RAGGED: tl.constexpr,
    STUDENT: tl.constexpr,
    TEACHER: tl.constexpr,
    IS_SINGLE: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    MASK: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
):
    """row_loss (B, 2) and row_stats (B, 2, 8), one pass over the logits by online softmax."""
    N: tl.constexpr = BLOCK * HEADS
    GROUPS: tl.constexpr = 2 // HEADS
    program = tl.program_id(0)
    b = (program // GROUPS).to(tl.int64)
    first_head = program % GROUPS
    last_b = (tl.num_programs(0) // GROUPS - 1).to(tl.int64)
    head = first_head + tl.arange(0, HEADS)
    width = length * HEADS
    shift = _shift(b, frame_offset, frame_stride, UNIT, HEADS, RAGGED)
    inverse_t = _number(inverse_temperature, inverse_temperature_low, ACC)

    student_row = _row(student, student_stride_b, student_stride_h, b, first_head)
    teacher_row = _row(teacher, teacher_stride_b, teacher_stride_h, b, first_head)
    mask_row = mask + b * mask_stride_b
    target = _target(
        start_positions,
        end_positions,
        start_stride,
        end_stride,
        mask_row,
        mask_stride_l,
        b,
        head,
        length,
        MASK,
    )
    at_target = student_row + target.to(tl.int64) * student_stride_l + tl.arange(0, HEADS)
    s_target = tl.load(at_target, mask=target >= 0, other=0.0).to(ACC)

    student_fits = _fits(b, last_b, student_stride_b, shift, width, UNIT)
    teacher_fits = _fits(b, last_b, teacher_stride_b, shift, width, UNIT)

    zero = tl.zeros((HEADS,), ACC)
    m_s, z_s, z_st = zero + MINUS_INFINITY, zero, zero
    m_t, z_t = zero + MINUS_INFINITY, zero
    distance = zero  # of the soft part: see each kind below
    count = 0
    end = shift + width
    if IS_SINGLE:
        end = 1  # a loop of one known pass is none
    for first in range(0, end, N):
        position = first // HEADS - shift // HEADS + tl.arange(0, BLOCK)
        part = _participating(mask_row, mask_stride_l, position, length, MASK)
        if MASK != NONE:
            count += tl.sum(part.to(tl.int32), 0)
        s = _load(
            student_row,
            student_stride_l,
            student_fits,
            first,
            shift,
            width,
            N,
            STUDENT,
            UNIT,
            RAGGED,
        )
        s = tl.where(part[:, None], tl.reshape(s, (BLOCK, HEADS)).to(ACC), MINUS_INFINITY)
        s_top = tl.maximum(m_s, tl.max(s, 0))
        s_base = _or_zero(s_top)
        x = s - s_base[None, :]
        z_s = z_s * tl.exp(m_s - s_base) + tl.sum(tl.exp(x), 0)
        if HAS_TEACHER:
            c = _load(
                teacher_row,
                teacher_stride_l,
                teacher_fits,
                first,
                shift,
                width,
                N,
                TEACHER,
                UNIT,
                RAGGED,
            )
            c = tl.where(part[:, None], tl.reshape(c, (BLOCK, HEADS)).to(ACC), MINUS_INFINITY)
            if KIND == 0:
                # distance = sum of p z_t ((c - m_t) - (s - m_s)), relative to both maxima so that
                # logits far from 0 keep their digits. What was summed before moves with them.
                t_top = tl.maximum(m_t, tl.max(c, 0))
                t_base = _or_zero(t_top)
                y = c - t_base[None, :]
                p = tl.exp(y * inverse_t)
                fade = tl.exp((m_t - t_base) * inverse_t)
                move = (_or_zero(m_t) - t_base) - (_or_zero(m_s) - s_base)
                # Chosen, not multiplied: where p is 0 the difference may be infinite.
                distance = tl.where(fade == 0, 0.0, (distance + z_t * move) * fade)
                distance += tl.sum(tl.where(p == 0, 0.0, p * (y - x)), 0)
                z_t = z_t * fade + tl.sum(p, 0)
                m_t = t_top
                if HAS_TEMPERATURE:
                    fade = tl.exp((m_s - s_base) * inverse_t)
                    z_st = z_st * fade + tl.sum(tl.exp(x * inverse_t), 0)
            else:
                # distance = sum of (s - c)^2; a masked position has both at -inf.
                difference = tl.where(c == MINUS_INFINITY, 0.0, s - c)
                distance += tl.sum(difference * difference, 0)
        m_s = s_top

    n = zero + length
    if MASK != NONE:
        n = zero + count
    soft = zero
    if HAS_TEACHER:
        if KIND == 0:
            if not HAS_TEMPERATURE:
                z_st = z_s
            soft = distance / z_t * inverse_t + tl.log(z_st / z_t)
            soft = tl.where(z_t == 0, 0.0, soft)  # a teacher that says nothing adds nothing
        else:
            soft = distance / tl.maximum(n, 1.0)
        soft *= _number(soft_factor, soft_factor_low, ACC)
    m_s, m_t = _or_zero(m_s), _or_zero(m_t)
    hard = tl.where(target >= 0, (tl.log(z_s) - (s_target - m_s)) * 0.5, 0.0)
    w_soft = _number(soft_weight, soft_weight_low, ACC)
    w_hard = _number(hard_weight, hard_weight_low, ACC)
    # A part of weight 0 is left out, not multiplied: it may be infinite.
    loss = tl.where(w_soft == 0, 0.0, w_soft * soft) + tl.where(w_hard == 0, 0.0, w_hard * hard)

    row = b * 2 + head
    tl.store(row_loss + row, loss)
    stats = row_stats + row * 8
    tl.store(stats, m_s)
    tl.store(stats + 1, z_st)
    tl.store(stats + 2, z_s)
    tl.store(stats + 3, m_t)
    tl.store(stats + 4, z_t)
    tl.store(stats + 5, soft)
    tl.store(stats + 6, hard)
    tl.store(stats + 7, n)


@triton.jit(
    do_not_specialize=[
        *("student_stride_b", "student_stride_l", "student_stride_h"),
        *("teacher_stride_b", "teacher_stride_l", "teacher_stride_h"),
        *("grad_stride_b", "grad_stride_l", "grad_stride_h"),
        *("mask_stride_b", "mask_stride_l", "start_stride", "end_stride"),
        *("grad_row_loss_stride_b", "grad_row_loss_stride_h"),
        *("length", "frame_offset", "frame_stride"),
    ]
)
def rows_backward(
    student,
    student_stride_b,
    student_stride_l,
    student_stride_h,
    teacher,
    teacher_stride_b,
    teacher_stride_l,
    teacher_stride_h,
    grad,
    grad_stride_b,
    grad_stride_l,
    grad_stride_h,
    mask,
    mask_stride_b,
    mask_stride_l,
    start_positions,
    start_stride,
    end_positions,
    end_stride,
    grad_row_loss,
    grad_row_loss_stride_b,
    grad_row_loss_stride_h,
    row_stats,
    length,
    frame_offset,
    frame_stride,
    inverse_temperature,
    inverse_temperature_low,
    soft_slope,
    soft_slope_low,
    hard_slope,
    hard_slope_low,
    ACC: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    UNIT: tl.constexpr,
    RAGGED: tl.constexpr,
    STUDENT: tl.constexpr,
    TEACHER: tl.constexpr,
    GRAD: tl.constexpr,
    HAS_SOFT: tl.constexpr,
    HAS_HARD: tl.constexpr,
    MASK: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
):
    """The student's gradient, block `program_id(1)` of a window, from the forward's row_stats."""
    N: tl.constexpr = BLOCK * HEADS
    GROUPS: tl.constexpr = 2 // HEADS
    program = tl.program_id(0)
    b = (program // GROUPS).to(tl.int64)
    first_head = program % GROUPS
    last_b = (tl.num_programs(0) // GROUPS - 1).to(tl.int64)
    head = first_head + tl.arange(0, HEADS)
    width = length * HEADS
    shift = _shift(b, frame_offset, frame_stride, UNIT, HEADS, RAGGED)
    inverse_t = _number(inverse_temperature, inverse_temperature_low, ACC)
    first = tl.program_id(1) * N

    position = first // HEADS - shift // HEADS + tl.arange(0, BLOCK)
    mask_row = mask + b * mask_stride_b
    part = _participating(mask_row, mask_stride_l, position, length, MASK)
    student_row = _row(student, student_stride_b, student_stride_h, b, first_head)
    student_fits = _fits(b, last_b, student_stride_b, shift, width, UNIT)
    s = _load(
        student_row,
        student_stride_l,
        student_fits,
        first,
        shift,
        width,
        N,
        STUDENT,
        UNIT,
        RAGGED,
    )
    s = tl.where(part[:, None], tl.reshape(s, (BLOCK, HEADS)).to(ACC), MINUS_INFINITY)
    if HAS_SOFT:
        teacher_row = _row(teacher, teacher_stride_b, teacher_stride_h, b, first_head)
        teacher_fits = _fits(b, last_b, teacher_stride_b, shift, width, UNIT)
        c = _load(
            teacher_row,
            teacher_stride_l,
            teacher_fits,
            first,
            shift,
            width,
            N,
            TEACHER,
            UNIT,
            RAGGED,
        )
        c = tl.where(part[:, None], tl.reshape(c, (BLOCK, HEADS)).to(ACC), MINUS_INFINITY)

    stats = row_stats + (b * 2 + head) * 8
    slope = tl.zeros((BLOCK, HEADS), ACC)
    x = s - tl.load(stats)[None, :]
    if HAS_SOFT:
        by_soft = _number(soft_slope, soft_slope_low, ACC)
        if KIND == 0:
            z_t = tl.load(stats + 4)
            # A teacher that says nothing has no p: neither does q pull.
            by_t = tl.where(z_t == 0, 0.0, by_soft / z_t)
            by_s = tl.where(z_t == 0, 0.0, by_soft / tl.load(stats + 1))
            y = c - tl.load(stats + 3)[None, :]
            q, p = x, y
            if HAS_TEMPERATURE:
                q, p = x * inverse_t, y * inverse_t
            slope += tl.exp(q) * by_s[None, :] - tl.exp(p) * by_t[None, :]
        else:
            by_n = by_soft / tl.load(stats + 7)
            slope += tl.where(c == MINUS_INFINITY, 0.0, (s - c) * by_n[None, :])
    if HAS_HARD:
        target = _target(
            start_positions,
            end_positions,
            start_stride,
            end_stride,
            mask_row,
            mask_stride_l,
            b,
            head,
            length,
            MASK,
        )
        by_hard = _number(hard_slope, hard_slope_low, ACC)
        by_hard = tl.where(target >= 0, by_hard, 0.0)
        one = (position[:, None] == target[None, :]).to(ACC)
        q = tl.exp(x) / tl.load(stats + 2)[None, :]
        slope += tl.where(target >= 0, 1.0, 0.0)[None, :] * (q - one) * by_hard[None, :]
    g = tl.load(grad_row_loss + b * grad_row_loss_stride_b + head * grad_row_loss_stride_h)
    slope = tl.where(part[:, None], slope * g.to(ACC)[None, :], 0.0)
    block = tl.reshape(slope, (N,)).to(grad.dtype.element_ty)
    grad_row = _row(grad, grad_stride_b, grad_stride_h, b, first_head)
    _store(grad_row, grad_stride_l, block, first, shift, width, N, GRAD, UNIT, RAGGED)
