// CPU rows, for any type, stride and mask: plain loops, which the compiler turns into vectors for
// each kind of processor.
//
// A window is one array here, whose even elements are start logits and odd ones end logits. Nothing
// else tells the two apart: a (B, L, 2) tensor is read where it lies. Other layouts are copied.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "kd_row_math.h"
#include "kd_rows.h"

namespace kd {

namespace {

constexpr int kLanes = 16;  // elements computed at once: one register of AVX-512, two of AVX2

// Before a loop over the lanes: unrolled too early it would stay a row of single numbers.
#ifdef __clang__
#define KD_VECTOR _Pragma("clang loop vectorize(enable)")
#else
#define KD_VECTOR _Pragma("GCC unroll 1")
#endif

template <class To, class From>
KD_FN To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "as many bits");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// 2^t for t up to about 100; 0, exactly, where the power would be subnormal; a NaN stays one.
// t = n + r with n whole, found by adding 1.5 2^23 (2^52), which rounds to whole numbers and leaves
// n in the low bits; 2^r is a polynomial, and n is added to its exponent. The 0 comes of a mask, as
// GCC would make vectors of no loop that has a branch on it.
KD_FN float exp2_of(float t) {
  const float shifted = t + 0x1.8p23f, r = t - (shifted - 0x1.8p23f);
  // Minimax on [-1/2, 1/2], 1.6e-8 from 2^r at most.
  float p = 0.00015353361959569156f;
  for (float coefficient : {0.0013398873852565885f, 0.00961843691766262f, 0.055503323674201965f,
                            0.24022647738456726f, 0.6931471824645996f, 1.0f})
    p = p * r + coefficient;
  const uint32_t power = bits_as<uint32_t>(p) + (bits_as<uint32_t>(shifted) << 23);
  return bits_as<float>(power & -uint32_t(!(t < -125.0f)));
}
KD_FN double exp2_of(double t) {
  const double shifted = t + 0x1.8p52, r = t - (shifted - 0x1.8p52);
  // The Taylor series, ln(2)^k / k!; the first term left out is below 2^-57.
  double p = 1.3691488853904129e-12;
  for (double coefficient : {2.5678435993488202e-11, 4.4455382718708116e-10, 7.0549116208011235e-09,
                             1.0178086009239699e-07, 1.3215486790144309e-06, 1.5252733804059840e-05,
                             1.5403530393381609e-04, 1.3333558146428443e-03, 9.6181291076284772e-03,
                             5.5504108664821580e-02, 2.4022650695910072e-01, 6.9314718055994531e-01,
                             1.0})
    p = p * r + coefficient;
  const uint64_t power = bits_as<uint64_t>(p) + (bits_as<uint64_t>(shifted) << 52);
  return bits_as<double>(power & -uint64_t(!(t < -1021.0)));
}

// To 16 bits numbers are rounded to the nearest, ties to even.
struct BFloat {
  uint16_t bits;
  KD_FN explicit BFloat(float value) {
    const uint32_t wide = bits_as<uint32_t>(value);
    const uint32_t rounded = (wide + 0x7fff + (wide >> 16 & 1)) >> 16;
    bits = uint16_t((wide & 0x7fffffff) > 0x7f800000 ? wide >> 16 | 0x40 : rounded);
  }
  KD_FN operator float() const { return bits_as<float>(uint32_t(bits) << 16); }
};
struct Half {
  uint16_t bits;
  KD_FN explicit Half(float value) {
    const uint32_t sign = bits_as<uint32_t>(value) >> 16 & 0x8000;
    const uint32_t wide = bits_as<uint32_t>(value) & 0x7fffffff;
    const uint32_t normal = (wide - 0x38000000 + 0xfff + (wide >> 13 & 1)) >> 13;
    // Next to 1/2 a float has the steps of the subnormal halves, so that the sum rounds to them.
    const uint32_t subnormal = bits_as<uint32_t>(bits_as<float>(wide) + 0.5f) - 0x3f000000;
    uint32_t half = wide < 0x38800000 ? subnormal : normal;
    half = wide >= 0x477ff000 ? 0x7c00 : half;  // from 65520 on, infinity
    half = wide > 0x7f800000 ? 0x7e00 : half;
    bits = uint16_t(half | sign);
  }
  KD_FN operator float() const {
    // The exponent is rebased by a multiplication, which gets subnormals right too.
    const uint32_t magnitude = uint32_t(bits & 0x7fff) << 13;
    const uint32_t finite = bits_as<uint32_t>(bits_as<float>(magnitude) * 0x1p112f);
    const uint32_t wide = magnitude >= 0x0f800000 ? magnitude | 0x7f800000 : finite;
    return bits_as<float>(wide | uint32_t(bits & 0x8000) << 16);
  }
};

// Both heads of a window of logits of type T.
template <class T>
struct Heads {
  T* of[2];
  int64_t stride[2];

  KD_FN explicit Heads(T* window) : of{window, window + 1}, stride{2, 2} {}
  KD_FN Heads(const Logits& logits, int64_t b, int64_t begin)
      : stride{logits.stride_l[0], logits.stride_l[1]} {
    for (int head = 0; head < 2; ++head)
      of[head] = static_cast<T*>(const_cast<void*>(logits.head[head])) +
                 b * logits.stride_b[head] + begin * stride[head];
  }
  KD_FN bool is_window() const { return of[1] == of[0] + 1 && stride[0] == 2 && stride[1] == 2; }
};

template <class From, class To>
KD_FN void copy(const Heads<From>& from, const Heads<To>& to, int64_t count) {
  if (from.is_window() && to.is_window()) {
    for (int64_t i = 0; i < 2 * count; ++i) to.of[0][i] = To(from.of[0][i]);
  } else {
    for (int64_t i = 0; i < count; ++i)
      for (int head = 0; head < 2; ++head)
        to.of[head][i * to.stride[head]] = To(from.of[head][i * from.stride[head]]);
  }
}

template <class A>
constexpr Type kPlain = sizeof(A) == sizeof(float) ? Type::f32 : Type::f64;

// The positions of a window that take part: those of [begin, end), less the gaps of the mask.
struct Span {
  int64_t begin, end, count;

  KD_FN bool has_gaps() const { return count < end - begin; }
  // Elements in lanes that are all there, and whether no lane is too many.
  KD_FN int64_t size() const { return (2 * (end - begin) + kLanes - 1) / kLanes * kLanes; }
  KD_FN bool is_whole() const { return size() == 2 * (end - begin); }
};

KD_FN bool takes_part(const Rows& rows, int64_t b, int64_t i) {
  return rows.mask == nullptr || rows.mask[b * rows.mask_stride_b + i * rows.mask_stride_l];
}

KD_FN Span span_of(const Rows& rows, int64_t b) {
  Span span{0, rows.length, rows.length};
  if (rows.mask == nullptr) return span;
  while (span.begin < span.end && !takes_part(rows, b, span.begin)) ++span.begin;
  while (span.begin < span.end && !takes_part(rows, b, span.end - 1)) --span.end;
  span.count = 0;
  for (int64_t i = span.begin; i < span.end; ++i) span.count += takes_part(rows, b, i);
  return span;
}

// The target of a head if it counts (inside the row, taking part), else -1.
KD_FN int64_t target_of(const Rows& rows, int64_t b, int head) {
  const int64_t at = b * rows.target_stride[head];
  const int64_t target = rows.target_bytes[head] == 8
                             ? static_cast<const int64_t*>(rows.target[head])[at]
                             : static_cast<const int32_t*>(rows.target[head])[at];
  return target >= 0 && target < rows.length && takes_part(rows, b, target) ? target : -1;
}

// A window of student and teacher as the loops take it, where it lies or copied to `memory`:
// span.size() logits, -inf at gaps and behind the end, where they add nothing.
template <class A>
KD_FN void read(const Rows& rows, bool with_teacher, int64_t b, const Span& span,
                std::vector<A>* memory, const A** windows) {
  const int64_t count = span.end - span.begin;
  for (int which = 0; which < 1 + with_teacher; ++which) {
    const Logits& logits = which == 0 ? rows.student : rows.teacher;
    const Heads<A> plain(logits, b, span.begin);
    windows[which] = plain.of[0];
    if (logits.type == kPlain<A> && plain.is_window() && span.is_whole() && !span.has_gaps())
      continue;
    if (memory[which].empty()) memory[which].resize(2 * rows.length + kLanes);
    A* window = memory[which].data();
    windows[which] = window;
    const Heads<A> to(window);
    switch (logits.type) {
      case Type::f16: copy(Heads<Half>(logits, b, span.begin), to, count); break;
      case Type::bf16: copy(Heads<BFloat>(logits, b, span.begin), to, count); break;
      case Type::f32: copy(Heads<float>(logits, b, span.begin), to, count); break;
      case Type::f64: copy(Heads<double>(logits, b, span.begin), to, count); break;
    }
    for (int64_t i = 2 * count; i < span.size(); ++i) window[i] = A(-INFINITY);
    for (int64_t i = 0; span.has_gaps() && i < count; ++i)
      if (!takes_part(rows, b, span.begin + i)) window[2 * i] = window[2 * i + 1] = A(-INFINITY);
  }
}

// What a window's loops compute. A term of weight 0 is left out of backward: it may be NaN.
enum Mode {
  kHard,        // the hard term alone
  kKl,          // and the KL at any temperature
  kKlSquared,   // at T = 2, where the powers of the hard term are the squares of those of the KL
  kKlAlone,     // without the hard term
  kSquares,     // the hard term and the mse
  kSquaresAlone,
};

int mode_of(const Rows& rows, bool has_soft, bool has_hard) {
  if (!has_soft) return kHard;
  if (rows.kind == kMse) return has_hard ? kSquares : kSquaresAlone;
  return !has_hard ? kKlAlone : rows.temperature == 2 ? kKlSquared : kKl;
}

constexpr bool has_kl(int mode) { return mode == kKl || mode == kKlSquared || mode == kKlAlone; }
constexpr bool has_mse(int mode) { return mode == kSquares || mode == kSquaresAlone; }

// The larger one; a NaN in `a` gives b.
template <class A>
KD_FN A larger(A a, A b) {
  return a > b ? a : b;
}

// The maximum of the even lanes in all of them, and that of the odd ones; a row of nothing but -inf
// has none to take off.
template <class A>
KD_FN void fold_max(A* lanes) {
  for (int j = 2; j < kLanes; ++j) lanes[j % 2] = larger(lanes[j], lanes[j % 2]);
  for (int j = 0; j < 2; ++j) lanes[j] = select(lanes[j] == A(-INFINITY), A(0), lanes[j]);
  for (int j = 2; j < kLanes; ++j) lanes[j] = lanes[j % 2];
}

template <int mode, class A>
KD_FN void add_up(const A* s, const A* c, int64_t size, const Scales<A>& scales, RowSums<A>* rows) {
  constexpr int64_t kBlock = 64 * kLanes;  // short chains of additions, for their rounding
  A max_s[kLanes], max_t[kLanes], total[4][kLanes] = {};
  for (int j = 0; j < kLanes; ++j) max_s[j] = max_t[j] = A(-INFINITY);
  for (int64_t i = 0; i < size; i += kLanes) {
    KD_VECTOR
    for (int j = 0; j < kLanes; ++j) {
      max_s[j] = larger(s[i + j], max_s[j]);
      if (has_kl(mode)) max_t[j] = larger(c[i + j], max_t[j]);
    }
  }
  fold_max(max_s);
  fold_max(max_t);
  for (int64_t first = 0; first < size; first += kBlock) {
    const int64_t last = first + kBlock < size ? first + kBlock : size;
    A hard[kLanes] = {}, student[kLanes] = {}, teacher[kLanes] = {}, soft[kLanes] = {};
    for (int64_t i = first; i < last; i += kLanes) {
      KD_VECTOR
      for (int j = 0; j < kLanes; ++j) {
        const A distance = s[i + j] - max_s[j];
        if (mode != kKlSquared) hard[j] += exp2_of(distance * scales.plain);
        if (has_kl(mode)) {
          const A v = distance * scales.by_T, u = (c[i + j] - max_t[j]) * scales.by_T;
          const A power_v = exp2_of(v), power_u = exp2_of(u);
          if (mode == kKlSquared) hard[j] += power_v * power_v;
          student[j] += power_v;
          teacher[j] += power_u;
          soft[j] += power_u * kl_gap(power_u, u, v);
        } else if (has_mse(mode)) {
          const A gap = mse_gap(s[i + j], c[i + j]);
          soft[j] += gap * gap;
        }
      }
    }
    for (int j = 0; j < kLanes; ++j) {
      total[0][j] += student[j];
      total[1][j] += hard[j];
      total[2][j] += teacher[j];
      total[3][j] += soft[j];
    }
  }
  for (int head = 0; head < 2; ++head) {
    A sums[4] = {};
    for (int k = 0; k < 4; ++k)
      for (int j = head; j < kLanes; j += 2) sums[k] += total[k][j];
    rows[head] = {max_s[head], sums[0], sums[1], max_t[head], sums[2], sums[3], A(0)};
  }
}

template <class A>
KD_FN void forward_windows(const Rows& rows, const ForwardOut& out, int64_t first, int64_t last) {
  const auto scales = scales_of<A>(rows.temperature, rows.weight, rows.soft_scale, rows.kind);
  // The end of a row's arithmetic is worth double: it is short, and the logarithms matter.
  const auto wide = scales_of<double>(rows.temperature, rows.weight, rows.soft_scale, rows.kind);
  const bool has_teacher = rows.teacher.head[0] != nullptr;
  const int mode = mode_of(rows, has_teacher, true);
  std::vector<A> memory[2];
  for (int64_t b = first; b < last; ++b) {
    const Span span = span_of(rows, b);
    RowSums<A> sums[2] = {};
    const A* of[2] = {};
    if (span.count > 0) {
      read(rows, has_teacher, b, span, memory, of);
      switch (mode) {
        case kHard: add_up<kHard>(of[0], of[1], span.size(), scales, sums); break;
        case kKl: add_up<kKl>(of[0], of[1], span.size(), scales, sums); break;
        case kKlSquared: add_up<kKlSquared>(of[0], of[1], span.size(), scales, sums); break;
        default: add_up<kSquares>(of[0], of[1], span.size(), scales, sums);
      }
    }
    for (int head = 0; head < 2; ++head) {
      const RowSums<A>& x = sums[head];
      const RowSums<double> sum{x.max_s,  x.sum_sT, x.sum_s,           x.max_t,
                                x.sum_tT, x.soft,   double(span.count)};
      const int64_t target = span.count > 0 ? target_of(rows, b, head) : -1;
      const A logit = target < 0 ? A(0) : of[0][2 * (target - span.begin) + head];
      const double exponent = double(logit - x.max_s) * wide.plain;
      const auto parts = finish_row(wide, sum, rows.kind, has_teacher, target >= 0, exponent);
      static_cast<A*>(out.row_loss)[2 * b + head] = A(parts.loss);
      const A stats[kStats] = {x.max_s,  x.sum_sT,      x.sum_s,       x.max_t,
                               x.sum_tT, A(parts.soft), A(parts.hard), A(span.count)};
      memcpy(static_cast<A*>(out.row_stats) + (2 * b + head) * kStats, stats, sizeof stats);
    }
  }
}

template <int mode, class A>
KD_FN void differentiate(const A* s, const A* c, int64_t size, const Scales<A>& scales,
                         const A* stats, const RowSlopes<A>* slopes, A* __restrict grad) {
  A max_s[kLanes], max_t[kLanes], student[kLanes], teacher[kLanes], hard[kLanes];
  for (int j = 0; j < kLanes; ++j) {
    max_s[j] = stats[j % 2 * kStats + kMaxS];
    max_t[j] = stats[j % 2 * kStats + kMaxT];
    student[j] = slopes[j % 2].student;
    teacher[j] = slopes[j % 2].teacher;
    hard[j] = slopes[j % 2].hard;
  }
  for (int64_t i = 0; i < size; i += kLanes) {
    KD_VECTOR
    for (int j = 0; j < kLanes; ++j) {
      const A distance = s[i + j] - max_s[j];
      A slope = 0;
      if (mode == kHard || mode == kKl || mode == kSquares)
        slope = hard[j] * exp2_of(distance * scales.plain);
      if (has_mse(mode)) slope += student[j] * mse_gap(s[i + j], c[i + j]);
      if (has_kl(mode)) {
        const A power_v = exp2_of(distance * scales.by_T);
        slope -= teacher[j] * exp2_of((c[i + j] - max_t[j]) * scales.by_T);
        slope += power_v * (mode == kKlSquared ? student[j] + hard[j] * power_v : student[j]);
      }
      grad[i + j] = slope;
    }
  }
}

template <class A>
KD_FN void write(A* window, const Logits& grad, int64_t b, int64_t length) {
  switch (grad.type) {
    case Type::f16: return copy(Heads<A>(window), Heads<Half>(grad, b, 0), length);
    case Type::bf16: return copy(Heads<A>(window), Heads<BFloat>(grad, b, 0), length);
    default: return copy(Heads<A>(window), Heads<A>(grad, b, 0), length);
  }
}

template <class A>
KD_FN void backward_windows(const Rows& rows, const BackwardArgs& args, int64_t first,
                            int64_t last) {
  const auto scales = scales_of<A>(rows.temperature, rows.weight, rows.soft_scale, rows.kind);
  const auto wide = scales_of<double>(rows.temperature, rows.weight, rows.soft_scale, rows.kind);
  const bool has_soft = rows.teacher.head[0] != nullptr && rows.weight != 0;
  const int mode = mode_of(rows, has_soft, rows.weight != 1);
  const Logits grad{{args.grad[0], args.grad[1]},
                    {args.grad_stride_b[0], args.grad_stride_b[1]},
                    {args.grad_stride_l[0], args.grad_stride_l[1]},
                    rows.student.type};
  std::vector<A> memory[3];
  for (int64_t b = first; b < last; ++b) {
    const Span span = span_of(rows, b);
    const Heads<A> plain(grad, b, 0);
    const bool in_place = grad.type == kPlain<A> && plain.is_window() && span.is_whole();
    if (!in_place && memory[2].empty()) memory[2].resize(2 * rows.length + kLanes);
    A* window = in_place ? plain.of[0] : memory[2].data();
    if (span.count > 0) {
      const A* stats = static_cast<const A*>(args.row_stats) + 2 * b * kStats;
      const A* gradient =
          static_cast<const A*>(args.grad_row_loss) + b * args.grad_row_loss_stride_b;
      RowSlopes<A> slopes[2];
      int64_t target[2];
      for (int head = 0; head < 2; ++head) {
        double row[kStats];
        for (int k = 0; k < kStats; ++k) row[k] = stats[head * kStats + k];
        target[head] = target_of(rows, b, head);
        const double of_row = gradient[head * args.grad_row_loss_stride_h];
        const auto slope = slopes_of(wide, row, of_row, rows.kind, target[head] >= 0);
        slopes[head] = {A(slope.student), A(slope.teacher), A(slope.hard), A(slope.target)};
      }
      const A* of[2] = {};
      read(rows, has_soft, b, span, memory, of);
      A* to = window + 2 * span.begin;
#define KD_CASE(mode) \
  case mode: differentiate<mode>(of[0], of[1], span.size(), scales, stats, slopes, to); break
      switch (mode) {
        KD_CASE(kHard);
        KD_CASE(kKl);
        KD_CASE(kKlSquared);
        KD_CASE(kKlAlone);
        KD_CASE(kSquares);
        KD_CASE(kSquaresAlone);
      }
      for (int head = 0; head < 2; ++head)
        if (target[head] >= 0) window[2 * target[head] + head] -= slopes[head].target;
    }
    for (int64_t i = 0; span.count < rows.length && i < rows.length; ++i)
      if (!takes_part(rows, b, i)) window[2 * i] = window[2 * i + 1] = A(0);
    if (!in_place) write(window, grad, b, rows.length);
  }
}

// The same code for each kind of processor. Not by target_clones: Clang 14 takes its
// "arch=x86-64-v3" and then never picks that clone, and it needs ifunc, which musl has not.
#define KD_ROWS_FOR(isa, target)                                                               \
  target void forward_##isa(const Rows& rows, const ForwardOut& out, int64_t b, int64_t end) { \
    rows.student.type == Type::f64 ? forward_windows<double>(rows, out, b, end)                \
                                   : forward_windows<float>(rows, out, b, end);                \
  }                                                                                            \
  target void backward_##isa(const Rows& rows, const BackwardArgs& args, int64_t b,            \
                             int64_t end) {                                                    \
    rows.student.type == Type::f64 ? backward_windows<double>(rows, args, b, end)              \
                                   : backward_windows<float>(rows, args, b, end);              \
  }
KD_ROWS_FOR(portable, )
#ifdef __x86_64__
KD_ROWS_FOR(avx2, __attribute__((target("avx2,fma"))))
KD_ROWS_FOR(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))))
#endif

// Starting a thread costs as much as some ten thousand elements take.
constexpr int64_t kPositionsPerThread = 64 * 1024;

// A window is computed by one thread from beginning to end, so that the threads change no bit. They
// live for one call: none has to survive a fork, as in a DataLoader's worker. The caller takes its
// share, and waits for those that have begun, but not for a thread that the system has not yet run.
template <class Out>
void share_out(void (*compute)(const Rows&, const Out&, int64_t first, int64_t last),
               const Rows& rows, const Out& out, int64_t threads) {
  struct Progress {
    std::atomic<int64_t> next{0}, done{0};
    std::atomic<bool> lacks_memory{false};
  };
  const int64_t batch = rows.batch;
  threads = std::min({threads, batch, batch * rows.length / kPositionsPerThread + 1});
  if (threads <= 1) return compute(rows, out, 0, batch);
  const int64_t share = batch / (8 * threads) + 1;
  const auto progress = std::make_shared<Progress>();
  const auto work = [=, &rows, &out] {
    for (int64_t first; (first = progress->next.fetch_add(share)) < batch;) {
      const int64_t last = std::min(first + share, batch);
      try {
        compute(rows, out, first, last);
      } catch (const std::bad_alloc&) {  // it must not leave the thread
        progress->lacks_memory = true;
      }
      progress->done += last - first;
    }
  };
  try {
    for (int64_t i = 1; i < threads; ++i) std::thread(work).detach();
  } catch (const std::exception&) {  // no more threads to be had: fewer do
  }
  work();
  while (progress->done < batch) std::this_thread::yield();
  if (progress->lacks_memory) throw std::bad_alloc();
}

}  // namespace

bool has_isa(Isa isa) {
#ifdef __x86_64__
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == Isa::avx2) return has_avx2;
  if (isa == Isa::avx512)
    return has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return isa == Isa::portable;
}

static Isa best_isa() {
  return has_isa(Isa::avx512) ? Isa::avx512 : has_isa(Isa::avx2) ? Isa::avx2 : Isa::portable;
}

#ifdef __x86_64__
#define KD_PICK(step, isa) \
  (isa == Isa::avx512 ? step##_avx512 : isa == Isa::avx2 ? step##_avx2 : step##_portable)
#else
#define KD_PICK(step, isa) step##_portable
#endif

void forward_cpu(const Rows& rows, const ForwardOut& out, int threads, Isa isa) {
  if (isa == Isa::best) isa = best_isa();
  share_out(KD_PICK(forward, isa), rows, out, threads);
}

void backward_cpu(const Rows& rows, const BackwardArgs& args, int threads, Isa isa) {
  if (isa == Isa::best) isa = best_isa();
  share_out(KD_PICK(backward, isa), rows, args, threads);
}

}  // namespace kd
