"""The two kernels that `triton_launch` starts. Importing this file needs Triton."""

import triton
import triton.language as tl

from kdfast.kernels.triton_memory import (
    NONE,
    frame_fits,
    load_block,
    participating,
    row_of,
    store_block,
    target_of,
    window_of,
)

MINUS_INFINITY = tl.constexpr(float("-inf"))


@triton.jit
def _number(high, low, ACC: tl.constexpr):
    """A Python float, which a launch rounds to fp32, given as what was kept and what was lost."""
    return tl.cast(high, ACC) + tl.cast(low, ACC)


@triton.jit
def _or_zero(top):
    """A maximum to subtract: 0 for a row that has none yet, as -inf - -inf would be NaN."""
    return tl.where(top == MINUS_INFINITY, 0.0, top)


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
    start,
    start_stride,
    end,
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
    b, last_b, first_head, head, width, shift = window_of(
        length, frame_offset, frame_stride, HEADS, UNIT, RAGGED
    )
    inverse_t = _number(inverse_temperature, inverse_temperature_low, ACC)

    s_row = row_of(student, student_stride_b, student_stride_h, b, first_head)
    c_row = row_of(teacher, teacher_stride_b, teacher_stride_h, b, first_head)
    mask_row = mask + b * mask_stride_b
    target = target_of(
        start, end, start_stride, end_stride, mask_row, mask_stride_l, b, head, length, MASK
    )
    at_target = s_row + target.to(tl.int64) * student_stride_l + tl.arange(0, HEADS)
    s_target = tl.load(at_target, mask=target >= 0, other=0.0).to(ACC)

    s_fits = frame_fits(b, last_b, student_stride_b, shift, width, UNIT)
    c_fits = frame_fits(b, last_b, teacher_stride_b, shift, width, UNIT)

    zero = tl.zeros((HEADS,), ACC)
    m_s, z_s, z_st = zero + MINUS_INFINITY, zero, zero
    m_t, z_t = zero + MINUS_INFINITY, zero
    distance = zero  # of the soft part: see each kind below
    count = 0
    stop = shift + width
    if IS_SINGLE:
        stop = 1  # a loop of one known pass is none
    for first in range(0, stop, N):
        position = first // HEADS - shift // HEADS + tl.arange(0, BLOCK)
        part = participating(mask_row, mask_stride_l, position, length, MASK)
        if MASK != NONE:
            count += tl.sum(part.to(tl.int32), 0)
        s = load_block(
            s_row, student_stride_l, s_fits, first, shift, width, N, STUDENT, UNIT, RAGGED
        )
        s = tl.where(part[:, None], tl.reshape(s, (BLOCK, HEADS)).to(ACC), MINUS_INFINITY)
        s_top = tl.maximum(m_s, tl.max(s, 0))
        s_base = _or_zero(s_top)
        x = s - s_base[None, :]
        z_s = z_s * tl.exp(m_s - s_base) + tl.sum(tl.exp(x), 0)
        if HAS_TEACHER:
            c = load_block(
                c_row, teacher_stride_l, c_fits, first, shift, width, N, TEACHER, UNIT, RAGGED
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
    start,
    start_stride,
    end,
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
    b, last_b, first_head, head, width, shift = window_of(
        length, frame_offset, frame_stride, HEADS, UNIT, RAGGED
    )
    inverse_t = _number(inverse_temperature, inverse_temperature_low, ACC)
    first = tl.program_id(1) * N

    position = first // HEADS - shift // HEADS + tl.arange(0, BLOCK)
    mask_row = mask + b * mask_stride_b
    part = participating(mask_row, mask_stride_l, position, length, MASK)
    s_row = row_of(student, student_stride_b, student_stride_h, b, first_head)
    s_fits = frame_fits(b, last_b, student_stride_b, shift, width, UNIT)
    s = load_block(s_row, student_stride_l, s_fits, first, shift, width, N, STUDENT, UNIT, RAGGED)
    s = tl.where(part[:, None], tl.reshape(s, (BLOCK, HEADS)).to(ACC), MINUS_INFINITY)
    if HAS_SOFT:
        c_row = row_of(teacher, teacher_stride_b, teacher_stride_h, b, first_head)
        c_fits = frame_fits(b, last_b, teacher_stride_b, shift, width, UNIT)
        c = load_block(
            c_row, teacher_stride_l, c_fits, first, shift, width, N, TEACHER, UNIT, RAGGED
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
        target = target_of(
            start, end, start_stride, end_stride, mask_row, mask_stride_l, b, head, length, MASK
        )
        by_hard = _number(hard_slope, hard_slope_low, ACC)
        by_hard = tl.where(target >= 0, by_hard, 0.0)
        one = (position[:, None] == target[None, :]).to(ACC)
        q = tl.exp(x) / tl.load(stats + 2)[None, :]
        slope += tl.where(target >= 0, 1.0, 0.0)[None, :] * (q - one) * by_hard[None, :]
    g = tl.load(grad_row_loss + b * grad_row_loss_stride_b + head * grad_row_loss_stride_h)
    slope = tl.where(part[:, None], slope * g.to(ACC)[None, :], 0.0)
    block = tl.reshape(slope, (N,)).to(grad.dtype.element_ty)
    grad_row = row_of(grad, grad_stride_b, grad_stride_h, b, first_head)
    store_block(grad_row, grad_stride_l, block, first, shift, width, N, GRAD, UNIT, RAGGED)
