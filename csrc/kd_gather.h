// Logits of any type and stride, copied to and from plain rows of the accumulating type.
// Needed only where a kernel cannot run on the tensor itself. Included per instruction set.
#pragma once

#include "kd_lanes.h"
#include "kd_rows.h"

namespace kd {
namespace KD_ISA {

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

KD_FN float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
KD_FN uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

KD_FN float widen(float value) { return value; }
KD_FN double widen(double value) { return value; }
KD_FN float widen(BFloat value) { return float_of(uint32_t(value.bits) << 16); }
KD_FN float widen(Half value) {
  // The exponent is rebased by a multiplication, which gets subnormals right too.
  const uint32_t magnitude = uint32_t(value.bits & 0x7fff) << 13;
  const uint32_t finite = bits_of(float_of(magnitude) * 0x1p112f);
  const uint32_t wide = magnitude >= 0x0f800000 ? magnitude | 0x7f800000 : finite;
  return float_of(wide | uint32_t(value.bits & 0x8000) << 16);
}

// To the nearest, ties to even.
KD_FN void narrow(float value, float& to) { to = value; }
KD_FN void narrow(double value, double& to) { to = value; }
KD_FN void narrow(float value, BFloat& to) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  to.bits = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded);
}
KD_FN void narrow(float value, Half& to) {
  const uint32_t sign = bits_of(value) >> 16 & 0x8000;
  const uint32_t bits = bits_of(value) & 0x7fffffff;
  const uint32_t normal = (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13;
  // Next to 1/2 a float has the steps of the subnormal halves, so that the sum rounds to them.
  const uint32_t subnormal = bits_of(float_of(bits) + 0.5f) - 0x3f000000;
  uint32_t half = bits < 0x38800000 ? subnormal : normal;
  half = bits >= 0x477ff000 ? 0x7c00 : half;  // from 65520 on, infinity
  half = bits > 0x7f800000 ? 0x7e00 : half;
  to.bits = uint16_t(half | sign);
}

// Strides of 1 are told apart so that the compiler may use whole vectors there.
template <class A, class From>
void widen_row(const From* from, int64_t stride, int64_t count, A* to, int64_t to_stride) {
  if (stride == 1 && to_stride == 1) {
    for (int64_t i = 0; i < count; ++i) to[i] = A(widen(from[i]));
  } else {
    for (int64_t i = 0; i < count; ++i) to[i * to_stride] = A(widen(from[i * stride]));
  }
}
template <class A, class To>
void narrow_row(const A* from, int64_t from_stride, int64_t count, To* to, int64_t stride) {
  if (stride == 1 && from_stride == 1) {
    for (int64_t i = 0; i < count; ++i) narrow(from[i], to[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) narrow(from[i * from_stride], to[i * stride]);
  }
}

#if KD_LANE_BYTES >= 32
inline void widen_halves(const Half* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + i))));
  for (; i < count; ++i) to[i] = widen(from[i]);
}
inline void narrow_halves(const float* from, int64_t count, Half* to) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    _mm_storeu_si128((__m128i*)(to + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
  for (; i < count; ++i) narrow(from[i], to[i]);
}
#endif

template <class A>
void gather(const void* from, Type type, int64_t stride, int64_t count, A* to, int64_t to_stride) {
  switch (type) {
    case Type::f16:
#if KD_LANE_BYTES >= 32
      if (stride == 1 && to_stride == 1 && sizeof(A) == sizeof(float))
        return widen_halves((const Half*)from, count, (float*)to);
#endif
      return widen_row(static_cast<const Half*>(from), stride, count, to, to_stride);
    case Type::bf16:
      return widen_row(static_cast<const BFloat*>(from), stride, count, to, to_stride);
    case Type::f32:
      return widen_row(static_cast<const float*>(from), stride, count, to, to_stride);
    case Type::f64:
      return widen_row(static_cast<const double*>(from), stride, count, to, to_stride);
  }
}

inline void scatter(const double* from, int64_t from_stride, int64_t count, void* to, Type,
                    int64_t stride) {
  narrow_row(from, from_stride, count, static_cast<double*>(to), stride);
}
inline void scatter(const float* from, int64_t from_stride, int64_t count, void* to, Type type,
                    int64_t stride) {
  switch (type) {
    case Type::f16:
#if KD_LANE_BYTES >= 32
      if (stride == 1 && from_stride == 1) return narrow_halves(from, count, (Half*)to);
#endif
      return narrow_row(from, from_stride, count, static_cast<Half*>(to), stride);
    case Type::bf16:
      return narrow_row(from, from_stride, count, static_cast<BFloat*>(to), stride);
    default:
      return narrow_row(from, from_stride, count, static_cast<float*>(to), stride);
  }
}

}  // namespace KD_ISA
}  // namespace kd
