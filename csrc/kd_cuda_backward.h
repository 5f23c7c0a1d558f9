// The backward kernel of the CUDA rows: no thread needs another.
#pragma once

#include "kd_cuda_windows.h"

namespace kd {

// What the gradient of one row needs, the same for every thread of the block.
template <class A>
struct RowGradient {
  RowSlopes<A> slopes;
  A max_s, max_t;
  int target;  // -1: it does not count
  bool soft, hard;
};

template <class A>
__device__ RowGradient<A> row_gradient(const Call<A>& call, const BackwardArgs& args, int head,
                                       int64_t b) {
  const A* from = static_cast<const A*>(args.row_stats) + (2 * b + head) * kStats;
  A stats[kStats];
#pragma unroll
  for (int i = 0; i < kStats; ++i) stats[i] = __ldg(from + i);
  const A gradient = __ldg(static_cast<const A*>(args.grad_row_loss) +
                           b * args.grad_row_loss_stride_b + head * args.grad_row_loss_stride_h);
  const Target target = target_of(call.rows, head, b);
  RowGradient<A> row;
  row.slopes = slopes_of(call.scales, stats, gradient, call.rows.kind, target.counted);
  row.max_s = stats[kMaxS];
  row.max_t = stats[kMaxT];
  row.target = target.counted ? int(target.position) : -1;
  // Left out, not multiplied by a slope of 0: the powers of such a term may be NaN.
  row.soft = call.scales.soft_slope != A(0) && (call.rows.kind == kMse || stats[kSumTT] != A(0));
  row.hard = call.scales.hard_slope != A(0) && target.counted;
  return row;
}

template <class A>
__device__ A slope_at(const RowGradient<A>& row, const Scales<A>& scales, int kind, A s, A c,
                      int position) {
  A slope = A(0);
  if (row.soft && kind == kMse) {
    slope = row.slopes.student * mse_gap(s, c);
  } else if (row.soft) {
    slope = row.slopes.student * exp2_of((s - row.max_s) * scales.by_T) -
            row.slopes.teacher * exp2_of((c - row.max_t) * scales.by_T);
  }
  if (row.hard) {
    slope += row.slopes.hard * exp2_of((s - row.max_s) * scales.plain);
    if (position == row.target) slope -= row.slopes.target;
  }
  return slope;
}

template <Type S, Type C>
__global__ void __launch_bounds__(kMaxThreads, 1)
    backward_rows(Call<SumOf<S>> call, BackwardArgs args, Form grad_form) {
  using A = SumOf<S>;
  constexpr int V = kChunk<S, C>;
  const Rows& rows = call.rows;
  const int64_t b = window_index();
  if (b >= rows.batch) return;

  auto student = window_of<const WordOf<S>>(rows.student.head, rows.student.stride_b,
                                            rows.student.stride_l, call.student_form, b);
  auto teacher = window_of<const WordOf<C>>(rows.teacher.head, rows.teacher.stride_b,
                                            rows.teacher.stride_l, call.teacher_form, b);
  auto grad = window_of<WordOf<S>>(args.grad, args.grad_stride_b, args.grad_stride_l, grad_form, b);
  const bool needs_teacher = call.scales.soft_slope != A(0);
  const uint8_t* mask = rows.mask ? rows.mask + b * rows.mask_stride_b : nullptr;
  int lead = 0;
  if (student.form != Form::strided) {
    lead = student.lead(V);
  } else if (grad.form != Form::strided) {
    lead = grad.lead(V);
  }
  student.settle(lead, V);
  teacher.settle(lead, V);
  grad.settle(lead, V);
  const bool packed_mask =
      mask && rows.mask_stride_l == 1 && (reinterpret_cast<uintptr_t>(mask) - lead) % V == 0;

  const RowGradient<A> start = row_gradient(call, args, 0, b);
  const RowGradient<A> end = row_gradient(call, args, 1, b);
  const int length = int(rows.length), chunks = (length + lead + V - 1) / V;
  for (int chunk = blockIdx.z * blockDim.x + threadIdx.x; chunk < chunks;
       chunk += gridDim.z * blockDim.x) {
    const int first = chunk * V - lead;
    A s[2][V], c[2][V], slope[2][V];
    load_chunk<S>(s, student, first, length);
    if (needs_teacher) load_chunk<C>(c, teacher, first, length);
    const unsigned take = load_mask<V>(mask, rows.mask_stride_l, packed_mask, first, length);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const bool takes_part = take >> v & 1;
      const A start_slope = slope_at(start, call.scales, rows.kind, s[0][v], c[0][v], first + v);
      const A end_slope = slope_at(end, call.scales, rows.kind, s[1][v], c[1][v], first + v);
      slope[0][v] = takes_part ? start_slope : A(0);
      slope[1][v] = takes_part ? end_slope : A(0);
    }
    store_chunk<S>(slope, grad, first, length);
  }
}

}  // namespace kd
