// The arithmetic of one row, for every place that computes rows: the loops of kd_rows_cpu.cpp
// and the threads of kd_rows_cuda.cu. A row is the start logits, or the end logits, of one window.
//
// s, c: logits of student and teacher, over the positions that take part. With base-2 exponents
//   v = (s - max s) log2(e)/T,  u = (c - max c) log2(e)/T,  h = (s - max s) log2(e)
// and the sums  z_sT = sum 2^v,  z_tT = sum 2^u,  z_s = sum 2^h,  a = sum 2^u (u - v):
//   KL = ln 2 (a / z_tT + log2(z_sT / z_tT)),  CE = ln 2 (log2 z_s - h[target]).
// Dividing the two sums before the logarithm keeps a small KL exact where log z_sT and log z_tT
// would cancel. Whatever is added to all exponents of a softmax by rounding cancels too, as long
// as forward and backward form the exponents in the same way.
#pragma once

#ifndef __CUDACC_RTC__
#include <cmath>
#endif

#ifndef KD_FN
#ifdef __CUDACC__
#define KD_FN __host__ __device__ __forceinline__
#else
#define KD_FN inline __attribute__((always_inline))
#endif
#endif

namespace kd {

constexpr double kLog2E = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;

// row_stats: (B, 2, kStats) of the accumulating type.
enum Stat { kMaxS, kSumST, kSumS, kMaxT, kSumTT, kSoftPart, kHardPart, kCount, kStats };

enum Kind { kKlDiv = 0, kMse = 1 };

// The settings of a call in the units of the sums.
template <class A>
struct Scales {
  A by_T;         // log2(e)/T, logit to exponent at the temperature
  A plain;        // log2(e), logit to exponent of the hard term
  A soft_scale;   // soft part of a unit of the row's soft sum
  A soft_weight;  // w, this and what follows over the divisor
  A hard_weight;  // 1 - w
  A soft_slope;   // w times the slope of the soft part in a logit, before q - p or (s - c)/n
  A hard_slope;   // (1 - w)/2
};

// soft_scale: 1 or 1/2 of the convention for kl_div, 1/2 for mse, whose T^2 and 1/T^2 cancel.
// divisor: of row_loss and so of the slopes, not of a row's parts.
template <class A>
KD_FN Scales<A> scales_of(double temperature, double weight, double soft_scale, int kind,
                          double divisor = 1) {
  Scales<A> scales;
  scales.by_T = A(kLog2E / temperature);
  scales.plain = A(kLog2E);
  scales.soft_scale =
      A(kind == kKlDiv ? soft_scale * temperature * temperature * kLn2 : soft_scale);
  scales.soft_weight = A(weight / divisor);
  scales.hard_weight = A((1.0 - weight) / divisor);
  scales.soft_slope = A(weight * soft_scale * (kind == kKlDiv ? temperature : 2.0) / divisor);
  scales.hard_slope = A((1.0 - weight) / 2 / divisor);
  return scales;
}

// What a pass over the row adds up. soft: sum 2^u (u - v), or sum (s - c)^2 for mse.
template <class A>
struct RowSums {
  A max_s, sum_sT, sum_s, max_t, sum_tT, soft, count;
};

template <class A>
KD_FN A select(bool condition, A yes, A no) {
  return condition ? yes : no;
}

// u - v, which 2^u weighs in the KL. A position of probability 0 adds 0, chosen and not multiplied:
// u - v may be infinite there. A NaN is not 0, so it comes through.
template <class A>
KD_FN A kl_gap(A power_u, A u, A v) {
  return select(!(power_u == A(0)), u - v, A(0));
}

// s - c, whose square the mse adds; 0 where the teacher excludes the position.
template <class A>
KD_FN A mse_gap(A s, A c) {
  return select(c == A(-INFINITY), A(0), s - c);
}

// The sums of a row after its maxima grew: each exponent shrinks by what its maximum grew by.
// grown_*: (new max - old max) log2(e)[/T] >= 0, finite; shrink_* = 2^-grown_*.
template <class A>
KD_FN void rebase(RowSums<A>& sums, A grown_sT, A shrink_sT, A shrink_s, A grown_tT, A shrink_tT) {
  sums.soft = shrink_tT * (sums.soft + sums.sum_tT * (grown_sT - grown_tT));
  sums.sum_sT *= shrink_sT;
  sums.sum_s *= shrink_s;
  sums.sum_tT *= shrink_tT;
}

KD_FN float log2_of(float x) { return log2f(x); }
KD_FN double log2_of(double x) { return log2(x); }

template <class A>
struct RowParts {
  A soft, hard, loss;
};

// counted: the target is inside the row and takes part; target_exponent: its h.
// A row without positions has no softmax: all its parts are 0. Without a teacher soft is 0.
template <class A>
KD_FN RowParts<A> finish_row(const Scales<A>& scales, const RowSums<A>& sums, int kind,
                             bool has_teacher, bool counted, A target_exponent) {
  RowParts<A> parts{A(0), A(0), A(0)};
  if (sums.count == A(0)) return parts;
  if (has_teacher && kind == kMse) {
    parts.soft = scales.soft_scale * (sums.soft / sums.count);
  } else if (has_teacher && sums.sum_tT != A(0)) {
    parts.soft = scales.soft_scale * (sums.soft / sums.sum_tT + log2_of(sums.sum_sT / sums.sum_tT));
  }
  if (counted) parts.hard = A(kLn2 / 2) * (log2_of(sums.sum_s) - target_exponent);
  // A part of weight 0 is left out, not multiplied: it may be infinite.
  if (scales.soft_weight != A(0)) parts.loss += scales.soft_weight * parts.soft;
  if (scales.hard_weight != A(0)) parts.loss += scales.hard_weight * parts.hard;
  return parts;
}

// d loss / d s[i] = student 2^v - teacher 2^u + hard 2^h - (target if i is the target)   (kl_div)
//                 = student mse_gap           + hard 2^h - (target if i is the target)   (mse)
template <class A>
struct RowSlopes {
  A student, teacher, hard, target;
};

// stats: the kStats numbers of the row; gradient: that of its row_loss.
// A term of weight 0 has slopes 0 here; its powers may be NaN, so the caller leaves it out.
template <class A>
KD_FN RowSlopes<A> slopes_of(const Scales<A>& scales, const A* stats, A gradient, int kind,
                             bool counted) {
  RowSlopes<A> slopes{A(0), A(0), A(0), A(0)};
  if (scales.soft_slope != A(0)) {
    const A soft = gradient * scales.soft_slope;
    if (kind == kMse) {
      slopes.student = soft / stats[kCount];
    } else if (stats[kSumTT] != A(0)) {
      slopes.student = soft / stats[kSumST];
      slopes.teacher = soft / stats[kSumTT];
    }
  }
  if (counted && scales.hard_slope != A(0)) {
    slopes.target = gradient * scales.hard_slope;
    slopes.hard = slopes.target / stats[kSumS];
  }
  return slopes;
}

}  // namespace kd
