// The forward kernel of the CUDA rows, and the sums over a block.
#pragma once

#include "kd_cuda_windows.h"

namespace kd {

// By how much an exponent shrinks when its maximum grows; finite, so that no inf meets a 0.
template <class A>
__device__ A growth(A old_max, A new_max, A scale) {
  if (old_max == new_max || old_max == A(-INFINITY)) return A(0);  // sums of nothing are 0
  const A grown = (new_max - old_max) * scale;
  return grown < A(1e30) ? grown : A(1e30);
}

template <class A>
__device__ void raise_maxima(RowSums<A>& sums, A max_s, A max_t, const Scales<A>& scales,
                             int kind) {
  const A grown_sT = growth(sums.max_s, max_s, scales.by_T);
  const A grown_tT = growth(sums.max_t, max_t, scales.by_T);
  if (grown_sT > A(0) || grown_tT > A(0)) {
    const A shrink_tT = exp2_of(-grown_tT);
    // These positions have probability 0 now: their terms, maybe infinite, are left out.
    if (shrink_tT == A(0) && kind == kKlDiv) sums.soft = A(0);
    rebase(sums, grown_sT, exp2_of(-grown_sT),
           exp2_of(-growth(sums.max_s, max_s, scales.plain)), grown_tT, shrink_tT);
  }
  sums.max_s = max_s;
  sums.max_t = max_t;
}

template <int V, class A>
__device__ void add_chunk(RowSums<A>& sums, const A (&s)[V], const A (&c)[V],
                          const Scales<A>& scales, int kind) {
  A max_s = sums.max_s, max_t = sums.max_t;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    max_s = s[v] > max_s ? s[v] : max_s;
    if (kind == kKlDiv) max_t = c[v] > max_t ? c[v] : max_t;
  }
  raise_maxima(sums, max_s, max_t, scales, kind);
  // Against a maximum of -inf everything would be NaN, also where others take part elsewhere.
  const A base_s = max_s == A(-INFINITY) ? A(0) : max_s;
  const A base_t = max_t == A(-INFINITY) ? A(0) : max_t;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    sums.sum_s += exp2_of((s[v] - base_s) * scales.plain);
    if (kind == kMse) {
      const A gap = mse_gap(s[v], c[v]);
      sums.soft += gap * gap;
    } else {
      const A exponent_s = (s[v] - base_s) * scales.by_T;
      const A exponent_t = (c[v] - base_t) * scales.by_T;
      const A power_t = exp2_of(exponent_t);
      sums.sum_sT += exp2_of(exponent_s);
      sums.sum_tT += power_t;
      sums.soft += power_t * kl_gap(power_t, exponent_t, exponent_s);
    }
  }
}

// One block runs at a time on this memory: maxima of each warp, then sums of each warp, apart, so
// that a fast warp's sums never meet a slow warp's reading of the maxima.
constexpr int kMaxima = 4, kSums = 9;

__device__ static double* scratch() {
  __shared__ double numbers[kMaxWarps * (kMaxima + kSums)];
  return numbers;
}

template <class A>
__device__ A larger(A a, A b) {
  return b > a ? b : a;
}

// The largest of each number over the block, for every thread.
template <class A>
__device__ void block_max(A (&x)[kMaxima]) {
#pragma unroll
  for (int i = 0; i < kMaxima; ++i) {
#pragma unroll
    for (int lanes = kWarp / 2; lanes; lanes /= 2) {
      x[i] = larger(x[i], __shfl_xor_sync(kAllLanes, x[i], lanes));
    }
  }
  const int warps = blockDim.x / kWarp, lane = threadIdx.x % kWarp;
  if (warps == 1) return;
  A* maxima = reinterpret_cast<A*>(scratch());
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < kMaxima; ++i) maxima[threadIdx.x / kWarp * kMaxima + i] = x[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kMaxima; ++i) {
    x[i] = maxima[lane % warps * kMaxima + i];
#pragma unroll
    for (int lanes = kWarp / 2; lanes; lanes /= 2) {
      x[i] = larger(x[i], __shfl_xor_sync(kAllLanes, x[i], lanes));
    }
  }
}

// The sum of each number over the block, in an order that never changes, for the first warp.
template <class A>
__device__ void block_sum(A (&x)[kSums]) {
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
#pragma unroll
    for (int lanes = kWarp / 2; lanes; lanes /= 2) {
      x[i] += __shfl_xor_sync(kAllLanes, x[i], lanes);
    }
  }
  const int warps = blockDim.x / kWarp, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  if (warps == 1) return;
  A* sums = reinterpret_cast<A*>(scratch() + kMaxWarps * kMaxima);
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[warp * kSums + i] = x[i];
  }
  __syncthreads();
  if (warp != 0) return;
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    x[i] = lane < warps ? sums[lane * kSums + i] : A(0);
#pragma unroll
    for (int lanes = kMaxWarps / 2; lanes; lanes /= 2) {
      x[i] += __shfl_xor_sync(kAllLanes, x[i], lanes);
    }
  }
}

template <Type S, Type C>
__global__ void __launch_bounds__(kMaxThreads, 1)
    forward_rows(Call<SumOf<S>> call, SumOf<S>* row_loss, SumOf<S>* row_stats) {
  using A = SumOf<S>;
  constexpr int V = kChunk<S, C>;
  const Rows& rows = call.rows;
  const int64_t b = window_index();
  if (b >= rows.batch) return;

  auto student = window_of<const WordOf<S>>(rows.student.head, rows.student.stride_b,
                                            rows.student.stride_l, call.student_form, b);
  auto teacher = window_of<const WordOf<C>>(rows.teacher.head, rows.teacher.stride_b,
                                            rows.teacher.stride_l, call.teacher_form, b);
  const bool has_teacher = rows.teacher.head[0] != nullptr;
  const uint8_t* mask = rows.mask ? rows.mask + b * rows.mask_stride_b : nullptr;
  int lead = 0;
  if (student.form != Form::strided) {
    lead = student.lead(V);
  } else if (has_teacher && teacher.form != Form::strided) {
    lead = teacher.lead(V);
  }
  student.settle(lead, V);
  teacher.settle(lead, V);
  const bool packed_mask =
      mask && rows.mask_stride_l == 1 && (reinterpret_cast<uintptr_t>(mask) - lead) % V == 0;

  // Asked for first: three loads, each of which waits for the one before.
  Target target{0, false};
  A target_logit = A(0);
  if (threadIdx.x < 2) {
    const int h = threadIdx.x;
    target = target_of(rows, h, b);
    if (target.counted) {
      target_logit = Element<S>::decode(
          __ldg((h ? student.head[1] : student.head[0]) +
                target.position * (h ? student.step[1] : student.step[0])));
    }
  }

  RowSums<A> sums[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) sums[h] = {A(-INFINITY), 0, 0, A(-INFINITY), 0, 0, 0};
  unsigned count = 0;
  const int length = int(rows.length), chunks = (length + lead + V - 1) / V;
  for (int chunk = threadIdx.x; chunk < chunks; chunk += blockDim.x) {
    const int first = chunk * V - lead;
    A s[2][V], c[2][V];
    load_chunk<S>(s, student, first, length);
    if (has_teacher) load_chunk<C>(c, teacher, first, length);
    const unsigned take = load_mask<V>(mask, rows.mask_stride_l, packed_mask, first, length);
    count += __popc(take);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const bool takes_part = take >> v & 1;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        s[h][v] = takes_part ? s[h][v] : A(-INFINITY);
        c[h][v] = takes_part && has_teacher ? c[h][v] : A(-INFINITY);
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) add_chunk(sums[h], s[h], c[h], call.scales, rows.kind);
  }

  A maxima[kMaxima] = {sums[0].max_s, sums[0].max_t, sums[1].max_s, sums[1].max_t};
  block_max(maxima);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    raise_maxima(sums[h], maxima[2 * h], maxima[2 * h + 1], call.scales, rows.kind);
  }
  A totals[kSums] = {sums[0].sum_sT, sums[0].sum_s, sums[0].sum_tT, sums[0].soft, sums[1].sum_sT,
                     sums[1].sum_s,  sums[1].sum_tT, sums[1].soft,  A(count)};
  block_sum(totals);
  if (threadIdx.x >= 2) return;

  const bool end = threadIdx.x == 1;
  const RowSums<A> total{end ? maxima[2] : maxima[0], end ? totals[4] : totals[0],
                         end ? totals[5] : totals[1], end ? maxima[3] : maxima[1],
                         end ? totals[6] : totals[2], end ? totals[7] : totals[3],
                         totals[8]};
  const A exponent = (target_logit - total.max_s) * call.scales.plain;
  const RowParts<A> parts =
      finish_row(call.scales, total, rows.kind, has_teacher, target.counted, exponent);
  const int64_t row = 2 * b + threadIdx.x;
  row_loss[row] = parts.loss;
  A* stats = row_stats + row * kStats;
  stats[kMaxS] = total.max_s;
  stats[kSumST] = total.sum_sT;
  stats[kSumS] = total.sum_s;
  stats[kMaxT] = total.max_t;
  stats[kSumTT] = total.sum_tT;
  stats[kSoftPart] = parts.soft;
  stats[kHardPart] = parts.hard;
  stats[kCount] = total.count;
}

}  // namespace kd
