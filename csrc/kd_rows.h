// The two functions of the row loss, forward and backward, and the one struct they take.
// Nothing is checked here: bindings.cpp checks. Nothing is allocated: Python allocates.
#pragma once

#include <cstdint>

namespace kd {

enum class Type : int { f16 = 0, bf16 = 1, f32 = 2, f64 = 3 };

// Start (0) and end (1) logits of B windows: element (b, i) of a head is at
// head[h] + b * stride_b[h] + i * stride_l[h], strides counted in elements, of any sign, 0 too.
// One (B, L, 2) tensor is the same with head[1] = head[0] + its last stride.
struct Logits {
  const void* head[2];
  int64_t stride_b[2];
  int64_t stride_l[2];
  Type type;
};

// The accumulating type A is double where the student's type is f64, else float.
struct Rows {
  int64_t batch, length;
  Logits student;
  Logits teacher;       // head[0] null: no teacher, the soft part is 0 and never computed
  const uint8_t* mask;  // (batch, length), 0 or 1; null: every position takes part
  int64_t mask_stride_b, mask_stride_l;
  const void* target[2];  // (batch,) each
  int64_t target_stride[2];
  int target_bytes[2];  // 8: int64, 4: int32
  double temperature;
  double weight;      // distillation_loss_weight
  double soft_scale;  // 1 or 1/2: the convention's factor of the soft part
  int kind;           // Kind of kd_row_math.h
  double divisor;     // of row_loss and of the gradient; CUDA alone reads it
};

// forward: row_loss (batch, 2) and row_stats (batch, 2, kStats), both A, contiguous.
struct ForwardOut {
  void* row_loss;
  void* row_stats;
};

// backward: row_stats of forward; the gradient of row_loss, A, any strides (0 too); grad has the
// student's type and is written in full, masked positions as exactly 0.
struct BackwardArgs {
  const void* row_stats;
  const void* grad_row_loss;
  int64_t grad_row_loss_stride_b, grad_row_loss_stride_h;
  void* grad[2];
  int64_t grad_stride_b[2], grad_stride_l[2];
};

// Instruction sets of the CPU rows; `best` picks the widest that this processor has.
enum class Isa : int { best = 0, portable = 1, avx2 = 2, avx512 = 3 };
bool has_isa(Isa isa);

// threads: at most so many, this one included; the result does not depend on it, to the bit.
// Raise std::bad_alloc where rows that have to be copied find no memory.
void forward_cpu(const Rows& rows, const ForwardOut& out, int threads, Isa isa);
void backward_cpu(const Rows& rows, const BackwardArgs& args, int threads, Isa isa);

#ifdef KDFAST_CUDA
// Launch on `stream` (a cudaStream_t) of `device`, asynchronously. Null, or what CUDA says went
// wrong (a string that lives for ever).
const char* forward_cuda(const Rows& rows, const ForwardOut& out, int device, void* stream);
const char* backward_cuda(const Rows& rows, const BackwardArgs& args, int device, void* stream);
// The architectures built in, "70,75,80+PTX" for example; and null if `device` can run them,
// else the sentence why not.
const char* built_architectures();
const char* why_not_cuda(int device);
#endif

}  // namespace kd
