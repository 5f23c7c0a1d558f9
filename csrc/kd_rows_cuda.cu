// Rows on CUDA, sm_70 and newer: one launch forward, one backward. One block per window, both of
// its rows. A thread takes a chunk of V neighbouring positions of both heads, so that interleaved
// (B, L, 2) logits and separate rows are both read 16 bytes at a time.
//
// Wide loads for any L: the chunks of a window are laid on its 16-byte boundaries, not on its
// first position: chunk k holds the positions [kV - lead, kV - lead + V). Only a first and a last
// chunk that hang over the row go element by element, and so do operands of other strides, or of
// an alignment that no lead suits; what an operand is, every thread of the block decides alike.
//
// A thread keeps sums against the maxima it has met (online softmax), so a row of any length is
// read once. The block then agrees on the maxima, every thread moves its sums there, and they are
// added in a fixed order: the same bits every run.
//
// There is no sum over the rows here, and so no arrival counter: who wants the scalar sums
// row_loss in a second small launch. One launch would need a counter for each device and stream,
// allocated before a graph is captured and private to it, put right after a launch that failed; a
// fence and an atomic in every block; and a last block that reads 2B numbers while the others are
// done. That buys a launch of some microseconds with state that can go wrong, unmeasured; and
// kd_loss_rows, the door that the trainer uses, needs no scalar at all.
//
// Nothing here waits for the device or allocates: both functions can be captured in a graph.
#include "kd_rows.h"

#include "kd_cuda_backward.h"
#include "kd_cuda_forward.h"

#ifndef __CUDACC_RTC__  // which compiles kernels only

#include <string>
#include <type_traits>

#ifndef KD_LAUNCH
#define KD_LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#endif
#ifndef KD_TYPES  // a test's build may leave some out
#define KD_TYPES(X) X(f16) X(bf16) X(f32) X(f64)
#endif
#ifndef KD_MAX_GRID_X
#define KD_MAX_GRID_X 0x7fffffff
#endif
#ifndef KD_CUDA_ARCHITECTURES
#define KD_CUDA_ARCHITECTURES "unknown"
#endif

namespace kd {
namespace {

// Makes `device` the current one for as long as it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error = cudaGetDevice(&before_);
    if (error == cudaSuccess && device != before_) {
      error = cudaSetDevice(device);
      moved_ = error == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (moved_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  cudaError_t error;

 private:
  int before_ = 0;
  bool moved_ = false;
};

template <class Pointer>
Form form_of(Pointer const (&head)[2], const int64_t (&stride_l)[2], int word_bytes) {
  const char* start = static_cast<const char*>(head[0]);
  if (stride_l[0] == 2 && stride_l[1] == 2 && start + word_bytes == head[1]) {
    return Form::interleaved;
  }
  return stride_l[0] == 1 && stride_l[1] == 1 ? Form::rows : Form::strided;
}

template <Type T>
using TypeTag = std::integral_constant<Type, T>;

template <class Body>
const char* with_type(Type type, Body body) {
#define KD_CASE(name) \
  case Type::name:    \
    return body(TypeTag<Type::name>());
  switch (type) {
    KD_TYPES(KD_CASE)
    default:
      return "these CUDA rows were built without this type";
  }
#undef KD_CASE
}

// Calls body(tag of the student's type, tag of the teacher's type) on the current device.
template <class Body>
const char* with_types(const Rows& rows, int device, Body body) {
  if (rows.batch == 0) return nullptr;
  if (rows.length > INT32_MAX - 16 * kMaxThreads) {
    return "L is beyond 2^31 - 8192 positions, the most that a CUDA row can have";
  }
  const DeviceGuard guard(device);
  if (guard.error != cudaSuccess) {
    cudaGetLastError();  // it was read: the next launch shall not report it again
    return cudaGetErrorString(guard.error);
  }
  const char* problem = with_type(rows.student.type, [&](auto student) {
    // Without a teacher its type does not matter: the student's saves a kernel.
    const Type teacher = rows.teacher.head[0] ? rows.teacher.type : rows.student.type;
    return with_type(teacher, [&](auto teacher) { return body(student, teacher); });
  });
  const cudaError_t error = cudaGetLastError();
  return problem || error == cudaSuccess ? problem : cudaGetErrorString(error);
}

template <class A>
Call<A> call_of(const Rows& rows, int student_bytes, int teacher_bytes) {
  return {rows, form_of(rows.student.head, rows.student.stride_l, student_bytes),
          form_of(rows.teacher.head, rows.teacher.stride_l, teacher_bytes),
          scales_of<A>(rows.temperature, rows.weight, rows.soft_scale, rows.kind, rows.divisor)};
}

// Chunks that a window can have: one more where its rows may begin between two boundaries.
int64_t chunks_of(int64_t length, int chunk) {
  return (length + (length % chunk ? chunk - 1 : 0) + chunk - 1) / chunk;
}

int threads_for(int64_t chunks) {
  const int64_t warps = (chunks + kWarp - 1) / kWarp;
  return int(warps < kMaxWarps ? warps : kMaxWarps) * kWarp;
}

dim3 grid_for(int64_t batch, int64_t parts) {
  const int64_t columns = batch < KD_MAX_GRID_X ? batch : KD_MAX_GRID_X;
  return dim3(unsigned(columns), unsigned((batch + columns - 1) / columns), unsigned(parts));
}

}  // namespace

const char* forward_cuda(const Rows& rows, const ForwardOut& out, int device, void* stream) {
  return with_types(rows, device, [&](auto student, auto teacher) -> const char* {
    constexpr Type S = student, C = teacher;
    using A = SumOf<S>;
    const auto call = call_of<A>(rows, sizeof(WordOf<S>), sizeof(WordOf<C>));
    const auto kernel = forward_rows<S, C>;
    const int threads = threads_for(chunks_of(rows.length, kChunk<S, C>));
    KD_LAUNCH(kernel, grid_for(rows.batch, 1), dim3(threads), static_cast<cudaStream_t>(stream),
              call, static_cast<A*>(out.row_loss), static_cast<A*>(out.row_stats));
    return nullptr;
  });
}

const char* backward_cuda(const Rows& rows, const BackwardArgs& args, int device, void* stream) {
  return with_types(rows, device, [&](auto student, auto teacher) -> const char* {
    constexpr Type S = student, C = teacher;
    const auto call = call_of<SumOf<S>>(rows, sizeof(WordOf<S>), sizeof(WordOf<C>));
    const Form form = form_of(args.grad, args.grad_stride_l, sizeof(WordOf<S>));
    const auto kernel = backward_rows<S, C>;
    // No thread needs another: a long row of a small batch is cut over several blocks, while there
    // are fewer than fill a large card twice.
    const int64_t chunks = chunks_of(rows.length, kChunk<S, C>);
    const int threads = threads_for(chunks);
    const int64_t useful = (chunks + threads - 1) / threads, wanted = 512 / rows.batch;
    const int64_t parts = wanted < 1 ? 1 : (useful < wanted ? useful : wanted);
    KD_LAUNCH(kernel, grid_for(rows.batch, parts), dim3(threads),
              static_cast<cudaStream_t>(stream), call, args, form);
    return nullptr;
  });
}

const char* built_architectures() { return KD_CUDA_ARCHITECTURES; }

const char* why_not_cuda(int device) {
  static thread_local std::string sentence;
  const DeviceGuard guard(device);
  cudaError_t error = guard.error;
  if (error == cudaSuccess) {
    // The driver's own answer to whether it has, or can make, code for this card.
    cudaFuncAttributes attributes;
    error = cudaFuncGetAttributes(&attributes, forward_rows<Type::f32, Type::f32>);
  }
  cudaGetLastError();
  if (error == cudaSuccess) return nullptr;
  sentence = "kdfast._C holds CUDA code for sm " + std::string(built_architectures()) +
             ", and CUDA says of device " + std::to_string(device) + ": " +
             cudaGetErrorString(error);
  return sentence.c_str();
}

}  // namespace kd

#endif  // __CUDACC_RTC__
