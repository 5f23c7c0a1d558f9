// Vectors of the CPU rows: as many floats or doubles as one register of an instruction set holds.
//
// Included once per instruction set, by a source that has chosen its target and defines KD_ISA,
// the namespace, and KD_LANE_BYTES, the register's width. Nothing of std is used, whose inline
// functions the linker could share with code for processors that lack the instructions. Choosing
// is by KD_LANE_BYTES: up to GCC 12 a target pragma defines no macros such as __AVX2__ in C++.
#pragma once

#include <cstdint>
#include <cstring>
#if KD_LANE_BYTES >= 32
#include <immintrin.h>
#endif

#include "kd_row_math.h"

namespace kd {
namespace KD_ISA {

template <class A>
struct Raw;
template <>
struct Raw<float> {
  typedef float Values __attribute__((vector_size(KD_LANE_BYTES)));
  typedef int32_t Ints __attribute__((vector_size(KD_LANE_BYTES)));
};
template <>
struct Raw<double> {
  typedef double Values __attribute__((vector_size(KD_LANE_BYTES)));
  typedef int64_t Ints __attribute__((vector_size(KD_LANE_BYTES)));
};

template <class A>
struct Lanes {
  using Values = typename Raw<A>::Values;
  using Ints = typename Raw<A>::Ints;
  static constexpr int kCount = KD_LANE_BYTES / sizeof(A);

  Values v;

  Lanes() = default;
  KD_FN Lanes(Values values) : v(values) {}
  KD_FN explicit Lanes(A value) : v(value - Values{}) {}
};

using Floats = Lanes<float>;
using Doubles = Lanes<double>;

template <class A>
KD_FN Lanes<A> operator+(Lanes<A> a, Lanes<A> b) {
  return a.v + b.v;
}
template <class A>
KD_FN Lanes<A> operator-(Lanes<A> a, Lanes<A> b) {
  return a.v - b.v;
}
template <class A>
KD_FN Lanes<A> operator*(Lanes<A> a, Lanes<A> b) {
  return a.v * b.v;
}
template <class A>
KD_FN auto operator==(Lanes<A> a, Lanes<A> b) {
  return a.v == b.v;
}
template <class A>
KD_FN Lanes<A> select(typename Lanes<A>::Ints condition, Lanes<A> yes, Lanes<A> no) {
  return condition ? yes.v : no.v;
}

template <class A>
KD_FN Lanes<A> load(const A* from) {
  Lanes<A> lanes;
  memcpy(&lanes, from, sizeof lanes);
  return lanes;
}
template <class A>
KD_FN void store(A* to, Lanes<A> lanes) {
  memcpy(to, &lanes, sizeof lanes);
}

// The first `count` lanes, fewer than all.
template <class A>
KD_FN Lanes<A> load_part(const A* from, int count, A rest) {
  A values[Lanes<A>::kCount];
  for (int i = 0; i < Lanes<A>::kCount; ++i) values[i] = i < count ? from[i] : rest;
  return load(values);
}
template <class A>
KD_FN void store_part(A* to, Lanes<A> lanes, int count) {
  A values[Lanes<A>::kCount];
  store(values, lanes);
  for (int i = 0; i < count; ++i) to[i] = values[i];
}

// a b + c, rounded once where kFused.
#if KD_LANE_BYTES == 64
constexpr bool kFused = true;
KD_FN Floats fma(Floats a, Floats b, Floats c) {
  return (Floats::Values)_mm512_fmadd_ps((__m512)a.v, (__m512)b.v, (__m512)c.v);
}
KD_FN Doubles fma(Doubles a, Doubles b, Doubles c) {
  return (Doubles::Values)_mm512_fmadd_pd((__m512d)a.v, (__m512d)b.v, (__m512d)c.v);
}
#elif KD_LANE_BYTES == 32
constexpr bool kFused = true;
KD_FN Floats fma(Floats a, Floats b, Floats c) {
  return (Floats::Values)_mm256_fmadd_ps((__m256)a.v, (__m256)b.v, (__m256)c.v);
}
KD_FN Doubles fma(Doubles a, Doubles b, Doubles c) {
  return (Doubles::Values)_mm256_fmadd_pd((__m256d)a.v, (__m256d)b.v, (__m256d)c.v);
}
#else
constexpr bool kFused = false;
template <class A>
KD_FN Lanes<A> fma(Lanes<A> a, Lanes<A> b, Lanes<A> c) {
  return a.v * b.v + c.v;
}
#endif

// The larger one; a NaN in `a` gives b.
template <class A>
KD_FN Lanes<A> max(Lanes<A> a, Lanes<A> b) {
  return a.v > b.v ? a.v : b.v;
}
#if KD_LANE_BYTES == 64
KD_FN Floats max(Floats a, Floats b) {
  return (Floats::Values)_mm512_max_ps((__m512)a.v, (__m512)b.v);
}
#elif KD_LANE_BYTES == 32
KD_FN Floats max(Floats a, Floats b) {
  return (Floats::Values)_mm256_max_ps((__m256)a.v, (__m256)b.v);
}
#endif

// The even and the odd lanes, folded: interleaved logits keep start and end apart in this way.
template <class A>
struct Pair {
  A of[2];
};

template <class A>
KD_FN Lanes<A> alternate(Pair<A> pair) {
  A values[Lanes<A>::kCount];
  for (int i = 0; i < Lanes<A>::kCount; ++i) values[i] = pair.of[i % 2];
  return load(values);
}
KD_FN Floats alternate(Pair<float> pair) {
  int64_t both;
  memcpy(&both, &pair, sizeof both);
  return (Floats::Values)(both - Raw<double>::Ints{});
}

template <class A, class Fold>
KD_FN Pair<A> fold(Lanes<A> lanes, Fold two) {
  A values[Lanes<A>::kCount];
  store(values, lanes);
  for (int half = Lanes<A>::kCount / 2; half >= 2; half /= 2)
    for (int i = 0; i < half; ++i) values[i] = two(values[i], values[i + half]);
  return {values[0], values[1]};
}
template <class A>
KD_FN Pair<A> fold_sum(Lanes<A> lanes) {
  return fold(lanes, [](A a, A b) { return a + b; });
}
template <class A>
KD_FN Pair<A> fold_max(Lanes<A> lanes) {
  return fold(lanes, [](A a, A b) { return a > b ? a : b; });
}
#if KD_LANE_BYTES >= 32
KD_FN Pair<float> first_two(__m128 four) {
  Pair<float> pair;
  _mm_storel_pi((__m64*)&pair, four);
  return pair;
}
#if KD_LANE_BYTES == 64
#define KD_HALVES(op, lanes)                                    \
  _mm256_##op##_ps(_mm512_castps512_ps256((__m512)(lanes).v), \
                   _mm512_extractf32x8_ps((__m512)(lanes).v, 1))
#else
#define KD_HALVES(op, lanes) (__m256)(lanes).v
#endif
#define KD_FOLD(op, lanes)                                                                \
  const __m256 eight = KD_HALVES(op, lanes);                                              \
  const __m128 four =                                                                     \
      _mm_##op##_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1)); \
  return first_two(_mm_##op##_ps(four, _mm_movehl_ps(four, four)))
KD_FN Pair<float> fold_sum(Floats lanes) { KD_FOLD(add, lanes); }
KD_FN Pair<float> fold_max(Floats lanes) { KD_FOLD(max, lanes); }
#undef KD_FOLD
#undef KD_HALVES
#endif

// Where 2^t is not 0, as exp2 gives it: a NaN is not 0.
template <class A>
constexpr A kLeast = sizeof(A) == sizeof(float) ? A(-125) : A(-1021);
template <class A>
KD_FN auto is_positive(Lanes<A> t) {
  return ~(t.v < kLeast<A>);
}
#if KD_LANE_BYTES == 64
KD_FN __mmask16 is_positive(Floats t) {
  return _mm512_cmp_ps_mask((__m512)t.v, _mm512_set1_ps(kLeast<float>), _CMP_NLT_UQ);
}
KD_FN Floats select(__mmask16 condition, Floats yes, Floats no) {
  return (Floats::Values)_mm512_mask_blend_ps(condition, (__m512)no.v, (__m512)yes.v);
}
#endif

// 2^t for t up to about 100; 0, exactly, below kLeast; a NaN stays one.
// t = n + r with n whole, found by adding 1.5 2^23 (2^52), which rounds to whole numbers and leaves
// n in the low bits; 2^r is a polynomial, and n is added to its exponent.
KD_FN Doubles exp2(Doubles t) {
  const Doubles magic(0x1.8p52);
  const Doubles shifted = t + magic;
  const Doubles r = t - (shifted - magic);
  // The Taylor series, ln(2)^k / k!; the first term left out is below 2^-57.
  Doubles p(1.3691488853904129e-12);
  constexpr double kTaylor[] = {2.5678435993488202e-11, 4.4455382718708116e-10,
                                7.0549116208011235e-09, 1.0178086009239699e-07,
                                1.3215486790144309e-06, 1.5252733804059840e-05,
                                1.5403530393381609e-04, 1.3333558146428443e-03,
                                9.6181291076284772e-03, 5.5504108664821580e-02,
                                2.4022650695910072e-01, 6.9314718055994531e-01, 1.0};
  for (double coefficient : kTaylor) p = fma(p, r, Doubles(coefficient));
  const Doubles power((Doubles::Values)((Doubles::Ints)p.v + ((Doubles::Ints)shifted.v << 52)));
  return select(is_positive(t), power, Doubles(0.0));
}

#if KD_LANE_BYTES == 64
// n counts 32nds here: two registers hold 2^(j/32), so that r is at most 1/64 and two terms do,
// 5.4e-8 from 2^r at most. Fewer instructions than the six terms below, and more evenly spread
// over the multipliers and adders.
struct Table {
  alignas(64) int32_t bits[32];
};
constexpr double root32(int j) {  // 2^(j/32)
  double root = 1.0, power = 1.0218971486541166782;  // 2^(1/32)
  for (; j > 0; j /= 2, power *= power)
    if (j % 2) root *= power;
  return root;
}
constexpr Table make_table() {
  Table table{};
  for (int j = 0; j < 32; ++j) {
    // The bits of a float in [1, 2). n << 18 adds j << 18 beside the exponent: taken off here.
    const double mantissa = (root32(j) - 1.0) * 8388608.0;
    table.bits[j] = 0x3f800000 + int32_t(mantissa + 0.5) - (j << 18);
  }
  return table;
}
constexpr Table kRoots = make_table();

KD_FN Floats exp2(Floats t) {
  const __m512 x = (__m512)t.v;
  const __m512 magic = _mm512_set1_ps(0x1.8p18f);
  const __m512 shifted = _mm512_add_ps(x, magic);
  const __m512 r = _mm512_sub_ps(x, _mm512_sub_ps(shifted, magic));
  const __m512i n = _mm512_castps_si512(shifted);
  const __m512i root = _mm512_permutex2var_epi32(_mm512_load_si512(kRoots.bits), n,
                                                 _mm512_load_si512(kRoots.bits + 16));
  const __m512 scale = _mm512_castsi512_ps(_mm512_add_epi32(root, _mm512_slli_epi32(n, 18)));
  const __m512 slope =
      _mm512_fmadd_ps(_mm512_set1_ps(0.2402265965938568f), r, _mm512_set1_ps(0.6931573152542114f));
  const __m512 rest = _mm512_mul_ps(slope, r);
  return (Floats::Values)_mm512_maskz_fmadd_ps(is_positive(t), scale, rest, scale);
}

KD_FN Floats load_part(const float* from, int count, float rest) {
  return (Floats::Values)_mm512_mask_loadu_ps(_mm512_set1_ps(rest), (1u << count) - 1, from);
}
KD_FN void store_part(float* to, Floats lanes, int count) {
  _mm512_mask_storeu_ps(to, (1u << count) - 1, (__m512)lanes.v);
}
#else
KD_FN Floats exp2(Floats t) {
  const Floats magic(0x1.8p23f);
  const Floats shifted = t + magic;
  const Floats r = t - (shifted - magic);
  // Minimax on [-1/2, 1/2], 1.6e-8 from 2^r at most.
  Floats p(0.00015353361959569156f);
  constexpr float kMinimax[] = {0.0013398873852565885f, 0.00961843691766262f,
                                0.055503323674201965f, 0.24022647738456726f,
                                0.6931471824645996f, 1.0f};
  for (float coefficient : kMinimax) p = fma(p, r, Floats(coefficient));
  const Floats power((Floats::Values)((Floats::Ints)p.v + ((Floats::Ints)shifted.v << 23)));
  return select(is_positive(t), power, Floats(0.0f));
}
#endif

// log2 x to an ulp or two, of numbers as sums of powers are: far from the ends of the range.
// x = 2^n m with m about 1, log2 m = 2/ln2 (y + y^3/3 + ...) for y = (m - 1)/(m + 1), |y| < 0.172.
KD_FN Doubles log2_normal(Doubles x) {
  // What is added makes the exponent change at sqrt(2) rather than at 2.
  const Doubles::Ints bits = (Doubles::Ints)x.v;
  const Doubles::Ints n = (bits + (0x3ff0000000000000 - 0x3fe6a09e667f3bcd)) >> 52;
  const Doubles m((Doubles::Values)(bits - ((n - 1023) << 52)));
  const Doubles y = (m.v - 1.0) / (m.v + 1.0);
  const Doubles square = y * y;
  Doubles p(1.0 / 21);
  for (int k = 19; k >= 1; k -= 2) p = fma(p, square, Doubles(1.0 / k));
  const Doubles exponent(__builtin_convertvector(n - 1023, Doubles::Values));
  return fma(p * y, Doubles(2 * kLog2E), exponent);
}

// log2 of `count` numbers, in place.
inline void log2_all(double* numbers, int count) {
  constexpr int kLanes = Doubles::kCount;
  for (int first = 0; first < count; first += kLanes) {
    const int size = count - first < kLanes ? count - first : kLanes;
    const Doubles logs = log2_normal(load_part(numbers + first, size, 1.0));
    for (int i = first; i < first + size; ++i) {
      const bool is_normal = numbers[i] > 1e-300 && numbers[i] < 1e300;
      numbers[i] = is_normal ? logs.v[i - first] : log2_of(numbers[i]);
    }
  }
}

}  // namespace KD_ISA
}  // namespace kd
