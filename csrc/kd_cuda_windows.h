// Memory of the CUDA rows: the operands of a window, and chunks of them in and out of registers.
#pragma once

#include "kd_rows.h"

#ifdef __CUDACC_RTC__
#define INFINITY __uint_as_float(0x7f800000u)
#else
#include <cuda_runtime.h>
#endif
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kd_row_math.h"

namespace kd {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 512;
constexpr int kMaxWarps = kMaxThreads / kWarp;
constexpr unsigned kAllLanes = 0xffffffffu;

// ---- Elements: words in memory, numbers in registers ----

template <Type>
struct Element;
template <>
struct Element<Type::f16> {
  using Word = unsigned short;
  using Sum = float;
  static __device__ float decode(Word word) { return __half2float(__ushort_as_half(word)); }
  static __device__ Word encode(float x) { return __half_as_ushort(__float2half_rn(x)); }
};
template <>
struct Element<Type::bf16> {
  using Word = unsigned short;
  using Sum = float;
  static __device__ float decode(Word word) { return __uint_as_float(unsigned(word) << 16); }
  static __device__ Word encode(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
};
template <>
struct Element<Type::f32> {
  using Word = unsigned;
  using Sum = float;
  static __device__ float decode(Word word) { return __uint_as_float(word); }
  static __device__ Word encode(float x) { return __float_as_uint(x); }
};
template <>
struct Element<Type::f64> {
  using Word = unsigned long long;
  using Sum = double;
  static __device__ double decode(Word word) { return __longlong_as_double(word); }
  static __device__ Word encode(double x) { return __double_as_longlong(x); }
};

template <Type T>
using WordOf = typename Element<T>::Word;
template <Type T>
using SumOf = typename Element<T>::Sum;

// Positions of a chunk: 16 bytes of the narrower operand's row; two where registers are doubles.
template <Type S, Type C>
constexpr int kChunk = S == Type::f64                                        ? 2
                       : (sizeof(WordOf<S>) == 2 || sizeof(WordOf<C>) == 2) ? 8
                                                                             : 4;

// The type that moves so many bytes at once.
template <int>
struct UnitOf;
template <>
struct UnitOf<16> { using Type = uint4; };
template <>
struct UnitOf<8> { using Type = uint2; };
template <>
struct UnitOf<4> { using Type = unsigned; };
template <>
struct UnitOf<2> { using Type = unsigned short; };

// N neighbouring words, moved 16 bytes at a time where they are that many.
template <class Word, int N>
struct Packet {
  static constexpr int kBytes = N * sizeof(Word);
  using Unit = typename UnitOf<(kBytes < 16 ? kBytes : 16)>::Type;
  union {
    Unit units[kBytes / sizeof(Unit)];
    Word words[N];
  };
  __device__ void load(const Word* from) {
#pragma unroll
    for (int i = 0; i < int(kBytes / sizeof(Unit)); ++i) {
      units[i] = __ldg(reinterpret_cast<const Unit*>(from) + i);
    }
  }
  __device__ void store(Word* to) const {
#pragma unroll
    for (int i = 0; i < int(kBytes / sizeof(Unit)); ++i) {
      __stwb(reinterpret_cast<Unit*>(to) + i, units[i]);
    }
  }
};

// ---- Operands: where the two heads of a window lie ----

enum class Form : int { strided, rows, interleaved };  // step between positions: any, 1, 2

template <class Word>
struct Window {
  Word* head[2];
  int64_t step[2];
  Form form;

  static constexpr int kBytes = sizeof(Word);
  static constexpr int kShift = kBytes == 2 ? 1 : kBytes == 4 ? 2 : 3;

  // Bytes from one position to the next; only for the forms that can be wide.
  __device__ int pitch() const { return form == Form::interleaved ? 2 * kBytes : kBytes; }

  // How many positions before the window its chunks have to begin, to lie on boundaries. Pitch and
  // chunk are powers of two.
  __device__ int lead(int chunk) const {
    const uintptr_t address = reinterpret_cast<uintptr_t>(head[0]);
    return int(address & unsigned(pitch() * chunk - 1)) >> (form == Form::interleaved) >> kShift;
  }

  // Gives up wide access where the chunks do not lie on boundaries of this operand.
  __device__ void settle(int lead, int chunk) {
    const unsigned unit = pitch() * chunk < 16 ? pitch() * chunk : 16;
    const unsigned first = unsigned(reinterpret_cast<uintptr_t>(head[0])) - lead * pitch();
    const unsigned second = unsigned(reinterpret_cast<uintptr_t>(head[1])) - lead * pitch();
    const bool aligned = !(first & (unit - 1)) &&
                         (form == Form::interleaved || !(second & (unit - 1)));
    if (!aligned) form = Form::strided;
  }
};

template <class Word, class Base>
__device__ Window<Word> window_of(Base* const (&head)[2], const int64_t (&stride_b)[2],
                                  const int64_t (&stride_l)[2], Form form, int64_t b) {
  Window<Word> window;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    window.head[h] = static_cast<Word*>(head[h]) + b * stride_b[h];
    window.step[h] = stride_l[h];
  }
  window.form = form;
  return window;
}

// Positions first .. first + V of both heads, as A. What lies outside the row is not touched: 0.
template <Type T, int V, class A>
__device__ void load_chunk(A (&x)[2][V], const Window<const WordOf<T>>& window, int first,
                           int length) {
  const bool inside = first >= 0 && first + V <= length;
  if (inside && window.form == Form::interleaved) {
    Packet<WordOf<T>, 2 * V> both;
    both.load(window.head[0] + 2 * int64_t(first));
#pragma unroll
    for (int i = 0; i < 2 * V; ++i) x[i % 2][i / 2] = A(Element<T>::decode(both.words[i]));
  } else if (inside && window.form == Form::rows) {
    Packet<WordOf<T>, V> one[2];
    one[0].load(window.head[0] + first);
    one[1].load(window.head[1] + first);
#pragma unroll
    for (int i = 0; i < 2 * V; ++i) {
      x[i % 2][i / 2] = A(Element<T>::decode(one[i % 2].words[i / 2]));
    }
  } else {
#pragma unroll
    for (int i = 0; i < 2 * V; ++i) {
      const int h = i % 2, position = first + i / 2;
      const bool in_row = position >= 0 && position < length;
      x[h][i / 2] =
          in_row ? A(Element<T>::decode(__ldg(window.head[h] + position * window.step[h]))) : A(0);
    }
  }
}

template <Type T, int V, class A>
__device__ void store_chunk(const A (&x)[2][V], const Window<WordOf<T>>& window, int first,
                            int length) {
  const bool inside = first >= 0 && first + V <= length;
  if (inside && window.form == Form::interleaved) {
    Packet<WordOf<T>, 2 * V> both;
#pragma unroll
    for (int i = 0; i < 2 * V; ++i) both.words[i] = Element<T>::encode(x[i % 2][i / 2]);
    both.store(window.head[0] + 2 * int64_t(first));
  } else if (inside && window.form == Form::rows) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      Packet<WordOf<T>, V> one;
#pragma unroll
      for (int v = 0; v < V; ++v) one.words[v] = Element<T>::encode(x[h][v]);
      one.store(window.head[h] + first);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 2 * V; ++i) {
      const int h = i % 2, position = first + i / 2;
      if (position >= 0 && position < length) {
        __stwb(window.head[h] + position * window.step[h], Element<T>::encode(x[h][i / 2]));
      }
    }
  }
}

// Bit v: position first + v lies in the row and takes part. mask: that of the window, or null.
template <int V>
__device__ unsigned load_mask(const uint8_t* mask, int64_t step, bool packed, int first,
                              int length) {
  const bool inside = first >= 0 && first + V <= length;
  unsigned take = 0;
  if (inside && packed) {
    Packet<unsigned char, V> bytes;
    bytes.load(mask + first);
#pragma unroll
    for (int v = 0; v < V; ++v) take |= unsigned(bytes.words[v] != 0) << v;
  } else {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int position = first + v;
      const bool in_row = position >= 0 && position < length;
      take |= unsigned(in_row && (!mask || __ldg(mask + position * step))) << v;
    }
  }
  return take;
}

// ---- The arguments of both kernels, and what a block makes of them ----

template <class A>
struct Call {
  Rows rows;
  Form student_form, teacher_form;
  Scales<A> scales;
};

__device__ inline int64_t window_index() {
  return blockIdx.x + int64_t(blockIdx.y) * gridDim.x;
}

struct Target {
  int64_t position;
  bool counted;
};

__device__ inline Target target_of(const Rows& rows, int head, int64_t b) {
  Target target;
  const int64_t at = b * rows.target_stride[head];
  target.position = rows.target_bytes[head] == 8
                        ? __ldg(static_cast<const long long*>(rows.target[head]) + at)
                        : __ldg(static_cast<const int*>(rows.target[head]) + at);
  target.counted = target.position >= 0 && target.position < rows.length;
  if (target.counted && rows.mask) {
    target.counted = __ldg(rows.mask + b * rows.mask_stride_b +
                           target.position * rows.mask_stride_l) != 0;
  }
  return target;
}

__device__ inline float exp2_of(float x) { return exp2f(x); }
__device__ inline double exp2_of(double x) { return exp2(x); }

}  // namespace kd
