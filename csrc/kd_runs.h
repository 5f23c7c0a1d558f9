// The arithmetic of a run, in vectors: one head of one window, or both heads interleaved, which
// are one array whose even lanes are the start logits and odd lanes the end logits. Nothing else
// tells the two apart, so that a (B, L, 2) tensor costs no shuffling.
//
// Two passes, the maxima first: a window of 384 positions stays in the first-level cache, and a
// long one in the second, which is fast enough beside the exponentials. Included per instruction
// set.
#pragma once

#include "kd_lanes.h"

namespace kd {
namespace KD_ISA {

// Which exponentials a run needs. At T = 1, 2 and 3/2, those of the published recipes, the soft and
// the hard term share one: of y = 2^v, or of y = 2^(v/2) at 3/2, 2^v and 2^h are whole powers.
enum Mode {
  kHard,     // no teacher
  kSquares,  // mse
  kGaps,     // mse in backward without a hard term, whose exponentials may be NaN
  kAny,      // KL at any temperature
  kEqual,    // T = 1, 2^v = 2^h = y; in backward also KL without a hard term
  kSquare,   // T = 2, 2^v = y and 2^h = y^2
  kCube,     // T = 3/2, 2^v = y^2 and 2^h = y^3
};

// h for the exponent of y, where the terms share y.
constexpr int hard_power(int mode) {
  return mode == kCube ? 3 : mode == kSquare ? 2 : mode == kEqual ? 1 : 0;
}

template <class A>
struct Run {
  const A* student;
  const A* teacher;
  int64_t size;  // elements: positions, or twice as many where interleaved
  int heads;     // 1 or 2
};

// x -> exponent. The fused form rounds once, of the exact x scale - base, and what rounding the
// base adds is the same for the whole row. It is safe while that is less than 1; rows with huge
// logits take the far form, (x - max) scale, and so do machines without a fused multiply-add.
template <class A>
struct Line {
  A scale;
  Pair<A> base;
};

template <bool far, class V>
struct Exponent {
  V scale, base;
  template <class A>
  explicit Exponent(const Line<A>& line) : scale(line.scale), base(alternate(line.base)) {
    if (!far) base = V(A(0)) - base;
  }
  KD_FN V operator()(V x) const {
    if constexpr (far) return (x - base) * scale;
    return fma(x, scale, base);
  }
};

template <class A>
struct Lines {
  Line<A> student, hard, teacher;
  bool far;
};

// A row of nothing but -inf has no maximum to take off.
template <class A>
A finite_top(A top) {
  return top == A(-INFINITY) ? A(0) : top;
}

template <class A>
Lines<A> lines_of(const Scales<A>& scales, int mode, Pair<A> max_s, Pair<A> max_t, int heads) {
  constexpr A kSafe = sizeof(A) == sizeof(float) ? A(0x1p22) : A(0x1p50);
  const A of_y = mode == kCube ? scales.by_T / 2 : scales.by_T;
  Lines<A> lines{{of_y, {}}, {scales.plain, {}}, {scales.by_T, {}}, !kFused};
  const A largest = scales.by_T > scales.plain ? scales.by_T : scales.plain;
  for (int head = 0; head < 2; ++head) {
    max_s.of[head] = finite_top(max_s.of[head]);
    max_t.of[head] = finite_top(max_t.of[head]);
    if (head >= heads) continue;
    const A s = max_s.of[head] * largest, t = max_t.of[head] * largest;
    if (!(s < kSafe && s > -kSafe && t < kSafe && t > -kSafe)) lines.far = true;
  }
  for (int head = 0; head < 2; ++head) {
    const A s = max_s.of[head], t = max_t.of[head];
    lines.student.base.of[head] = lines.far ? s : s * of_y;
    lines.hard.base.of[head] = lines.far ? s : s * scales.plain;
    lines.teacher.base.of[head] = lines.far ? t : t * scales.by_T;
  }
  return lines;
}

// The exponent of the hard term of one logit, as the vectors form it.
template <class A>
double hard_exponent(const Lines<A>& lines, int mode, A logit, int head) {
  const int power = hard_power(mode);
  const Line<A>& line = power > 0 ? lines.student : lines.hard;
  const A base = line.base.of[head];
  const double exponent =
      lines.far ? double(logit - base) * line.scale : double(logit) * line.scale - base;
  return power > 0 ? power * exponent : exponent;
}

// Even and odd lanes of one head are one row.
template <class A>
Pair<A> sum_of_heads(Lanes<A> lanes, int heads) {
  const Pair<A> pair = fold_sum(lanes);
  if (heads == 2) return pair;
  return {pair.of[0] + pair.of[1], A(0)};
}

template <class A>
Pair<A> maximum(const A* from, int64_t size, int heads) {
  using V = Lanes<A>;
  V top(A(-INFINITY)), other = top;
  int64_t i = 0;
  for (; i + 2 * V::kCount <= size; i += 2 * V::kCount) {
    top = max(load(from + i), top);
    other = max(load(from + i + V::kCount), other);
  }
  for (; i + V::kCount <= size; i += V::kCount) top = max(load(from + i), top);
  if (i < size) other = max(load_part(from + i, int(size - i), A(-INFINITY)), other);
  Pair<A> pair = fold_max(max(top, other));
  if (heads == 2) return pair;
  if (pair.of[1] > pair.of[0]) pair.of[0] = pair.of[1];
  return {pair.of[0], pair.of[0]};
}

template <class A>
struct Sums {
  Lanes<A> student, hard, teacher, soft;

  Sums() : student(A(0)), hard(A(0)), teacher(A(0)), soft(A(0)) {}

  void add(const Sums& other) {
    student = student + other.student;
    hard = hard + other.hard;
    teacher = teacher + other.teacher;
    soft = soft + other.soft;
  }
};

template <class A, int mode, bool far>
struct Adder {
  using V = Lanes<A>;
  Exponent<far, V> student, hard, teacher;

  explicit Adder(const Lines<A>& lines)
      : student(lines.student), hard(lines.hard), teacher(lines.teacher) {}

  KD_FN void operator()(Sums<A>& sums, V s, V c) const {
    if constexpr (mode == kHard || mode == kSquares) {
      sums.hard = sums.hard + exp2(hard(s));
      if constexpr (mode == kHard) return;
      const V gap = mse_gap(s, c);
      sums.soft = fma(gap, gap, sums.soft);
    } else {
      const V log_y = student(s), u = teacher(c);
      const V y = exp2(log_y), power_u = exp2(u);
      const V v = mode == kCube ? log_y + log_y : log_y;
      const V power_v = mode == kCube ? y * y : y;
      sums.student = sums.student + power_v;
      sums.teacher = sums.teacher + power_u;
      sums.soft = fma(power_u, kl_gap_where(is_positive(u), u, v), sums.soft);
      if constexpr (mode == kSquare || mode == kCube) sums.hard = fma(power_v, y, sums.hard);
      if constexpr (mode == kAny) sums.hard = sums.hard + exp2(hard(s));
    }
  }
};

template <class A, int mode, bool far>
void add_up(const Run<A>& run, const Lines<A>& lines, RowSums<A>* rows) {
  using V = Lanes<A>;
  constexpr bool kTeacher = mode != kHard;
  constexpr int64_t kBlock = 64 * V::kCount;  // short chains of additions, for their rounding
  const Adder<A, mode, far> add(lines);
  Sums<A> total;
  int64_t i = 0;
  while (i < run.size) {
    const int64_t end = run.size - i < kBlock ? run.size : i + kBlock;
    Sums<A> sums;
    for (; i + V::kCount <= end; i += V::kCount)
      add(sums, load(run.student + i), kTeacher ? load(run.teacher + i) : V(A(0)));
    if (i < end) {
      const int rest = int(end - i);
      add(sums, load_part(run.student + i, rest, A(-INFINITY)),
          kTeacher ? load_part(run.teacher + i, rest, A(-INFINITY)) : V(A(0)));
      i = end;
    }
    total.add(sums);
  }
  const Pair<A> student = sum_of_heads(total.student, run.heads);
  const Pair<A> hard = sum_of_heads(total.hard, run.heads);
  const Pair<A> teacher = sum_of_heads(total.teacher, run.heads);
  const Pair<A> soft = sum_of_heads(total.soft, run.heads);
  for (int head = 0; head < run.heads; ++head) {
    rows[head].sum_sT = student.of[head];
    rows[head].sum_s = mode == kEqual ? student.of[head] : hard.of[head];
    rows[head].sum_tT = teacher.of[head];
    rows[head].soft = soft.of[head];
  }
}

template <class A, int mode, bool far>
struct Slope {
  using V = Lanes<A>;
  Exponent<far, V> student, hard, teacher;
  V of_student, of_hard, of_teacher;

  Slope(const Lines<A>& lines, const RowSlopes<A>* slopes, int heads)
      : student(lines.student),
        hard(lines.hard),
        teacher(lines.teacher),
        of_student(alternate(Pair<A>{slopes[0].student, slopes[heads - 1].student})),
        of_hard(alternate(Pair<A>{slopes[0].hard, slopes[heads - 1].hard})),
        of_teacher(alternate(Pair<A>{-slopes[0].teacher, -slopes[heads - 1].teacher})) {
    if (mode == kEqual) of_student = of_student + of_hard;
  }

  KD_FN V operator()(V s, V c) const {
    if constexpr (mode == kHard) {
      return exp2(hard(s)) * of_hard;
    } else if constexpr (mode == kGaps) {
      return mse_gap(s, c) * of_student;
    } else if constexpr (mode == kSquares) {
      return fma(mse_gap(s, c), of_student, exp2(hard(s)) * of_hard);
    } else {
      const V y = exp2(student(s));
      const V power_v = mode == kCube ? y * y : y;
      V slope = exp2(teacher(c)) * of_teacher;
      if constexpr (mode == kSquare || mode == kCube)
        return fma(power_v, fma(y, of_hard, of_student), slope);
      if constexpr (mode == kAny) slope = fma(exp2(hard(s)), of_hard, slope);
      return fma(power_v, of_student, slope);
    }
  }
};

template <class A, int mode, bool far>
void differentiate(const Run<A>& run, const Lines<A>& lines, const RowSlopes<A>* slopes, A* grad) {
  using V = Lanes<A>;
  constexpr bool kTeacher = mode != kHard;
  const Slope<A, mode, far> slope(lines, slopes, run.heads);
  int64_t i = 0;
  for (; i + V::kCount <= run.size; i += V::kCount)
    store(grad + i, slope(load(run.student + i), kTeacher ? load(run.teacher + i) : V(A(0))));
  if (i < run.size) {
    const int rest = int(run.size - i);
    const V s = load_part(run.student + i, rest, A(-INFINITY));
    const V c = kTeacher ? load_part(run.teacher + i, rest, A(-INFINITY)) : V(A(0));
    store_part(grad + i, slope(s, c), rest);
  }
}

template <class A>
using AddUp = void (*)(const Run<A>&, const Lines<A>&, RowSums<A>*);
template <class A>
using Differentiate = void (*)(const Run<A>&, const Lines<A>&, const RowSlopes<A>*, A*);

template <class A, int mode>
AddUp<A> add_up_of(bool far) {
  return far ? add_up<A, mode, true> : add_up<A, mode, !kFused>;
}
template <class A, int mode>
Differentiate<A> differentiate_of(bool far) {
  return far ? differentiate<A, mode, true> : differentiate<A, mode, !kFused>;
}

template <class A>
AddUp<A> add_up_of(int mode, bool far) {
  switch (mode) {
    case kHard: return add_up_of<A, kHard>(far);
    case kSquares: return add_up_of<A, kSquares>(far);
    case kEqual: return add_up_of<A, kEqual>(far);
    case kSquare: return add_up_of<A, kSquare>(far);
    case kCube: return add_up_of<A, kCube>(far);
    default: return add_up_of<A, kAny>(far);
  }
}
template <class A>
Differentiate<A> differentiate_of(int mode, bool far) {
  switch (mode) {
    case kHard: return differentiate_of<A, kHard>(far);
    case kSquares: return differentiate_of<A, kSquares>(far);
    case kGaps: return differentiate_of<A, kGaps>(far);
    case kEqual: return differentiate_of<A, kEqual>(far);
    case kSquare: return differentiate_of<A, kSquare>(far);
    case kCube: return differentiate_of<A, kCube>(far);
    default: return differentiate_of<A, kAny>(far);
  }
}

}  // namespace KD_ISA
}  // namespace kd
