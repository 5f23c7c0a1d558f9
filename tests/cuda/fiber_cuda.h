// The CUDA kernel language on the CPU: enough of it to run csrc/kd_rows_cuda.cu without a GPU.
//
// Every thread of a block is a fiber. Fibers change only at barriers and warp operations, and
// which one goes on is drawn from a seed: a warp runs as far as it can before the next one in the
// drawn order, so that a race between a fast warp and a slow one shows as a wrong number in some
// seed. Shared memory holds NaN when a block starts. A fault ends the launch, and its message
// comes out of cudaGetLastError: a barrier or warp operation that not all of its threads reach at
// the same line, a mask without the caller, a width that is no power of two, a shuffle from a lane
// outside the mask, a misaligned vector load, a deadlock, a launch that CUDA would refuse.
// Out-of-bounds accesses are left to the address sanitizer.
//
// __shared__ works in functions that are no templates: GCC ignores the section of the others.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ __attribute__((section("fiber_shared"))) static
#define KD_LAUNCH(kernel, grid, block, stream, ...) \
  fiber::launch(grid, block, stream, [&] { kernel(__VA_ARGS__); })

extern "C" {
extern char __start_fiber_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_fiber_shared[] __attribute__((weak, visibility("hidden")));
}

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };

static dim3 threadIdx, blockIdx, blockDim, gridDim;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration, cudaErrorLaunchFailure,
                   cudaErrorInvalidDevice };

namespace fiber {

constexpr size_t kStackBytes = 128 << 10;
constexpr int kDevices = 2;

// What a thread waits for. All threads of one operation must agree in everything but the values.
struct Wait {
  const char* operation;  // null: it can run
  int line;
  unsigned mask;  // 0: a barrier of the block
  int width;
  int source;  // lane that the value comes from
  uint64_t value;
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Wait wait;
  bool done;
  uint64_t priority;
};

struct State {
  uint64_t seed = 0;
  std::mt19937_64 random;
  std::vector<Thread> threads;
  std::function<void()> body;
  ucontext_t host;
  const void* host_stack = nullptr;
  size_t host_stack_bytes = 0;
  unsigned count = 0, current = 0, done = 0;
  std::string fault;
  cudaError_t error = cudaSuccess;
  int device = 0;
  // Of the last launch, for tests: where it went, its blocks and threads.
  int launch_device = -1;
  cudaStream_t launch_stream = nullptr;
  uint64_t launches = 0, launch_blocks = 0, launch_threads = 0;
  uint64_t loads[17] = {}, stores[17] = {};  // bytes by the width of the access
};
static State state;

inline void switch_to(ucontext_t& from, ucontext_t& to, const void* stack, size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, stack, bytes);
  swapcontext(&from, &to);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
  (void)stack, (void)bytes;
  swapcontext(&from, &to);
#endif
}

inline void to_host() {
  switch_to(state.threads[state.current].context, state.host, state.host_stack,
            state.host_stack_bytes);
}

// Ends the launch: the other fibers are left where they are.
inline void fail(const std::string& what) {
  state.fault = "block (" + std::to_string(blockIdx.x) + "," + std::to_string(blockIdx.y) + "," +
                std::to_string(blockIdx.z) + "), thread " + std::to_string(state.current) + ": " +
                what;
  to_host();
}

inline std::string name(const Wait& wait) {
  return std::string(wait.operation) + " of line " + std::to_string(wait.line);
}

// Another order of the threads of a warp, and another place of the warp among the warps.
inline void draw_priorities(unsigned first, unsigned last) {
  const uint64_t warp = state.seed ? state.random() << 32 : ~uint64_t(first) << 32;
  for (unsigned t = first; t < last; ++t) {
    state.threads[t].priority = warp | (state.seed ? uint32_t(state.random()) : ~t);
  }
}

inline void run_next() {
  unsigned best = state.count;
  for (unsigned t = 0; t < state.count; ++t) {
    const Thread& thread = state.threads[t];
    if (thread.done || thread.wait.operation) continue;
    if (best == state.count || thread.priority > state.threads[best].priority) best = t;
  }
  if (best == state.count) {
    if (state.done == state.count) return to_host();
    return fail("deadlock: nobody can run");
  }
  const unsigned old = state.current;
  state.current = best;
  threadIdx = dim3(best % blockDim.x, best / blockDim.x);
  if (best != old) {
    switch_to(state.threads[old].context, state.threads[best].context,
              state.threads[best].stack.get(), kStackBytes);
  }
}

// Waits until every thread of the operation has arrived; the value that its source lane brought.
inline uint64_t arrive(const Wait& wait) {
  const unsigned self = state.current, warp = self & ~31u;
  const unsigned first = wait.mask ? warp : 0;
  const unsigned last = wait.mask ? std::min(warp + 32, state.count) : state.count;
  if (wait.mask && !(wait.mask >> (self & 31) & 1)) {
    fail(name(wait) + ": the mask lacks the caller");
  }
  if (wait.mask && warp + 32 > last && wait.mask >> (last - warp)) {
    fail(name(wait) + ": the mask names lanes beyond the block");
  }
  // A warp-mate that expects this thread elsewhere will never see it there.
  for (unsigned t = warp; t < std::min(warp + 32, state.count); ++t) {
    const Wait& other = state.threads[t].wait;
    if (other.operation && other.mask >> (self & 31) & 1 &&
        (other.operation != wait.operation || other.line != wait.line ||
         other.mask != wait.mask || other.width != wait.width)) {
      fail("divergent: this thread is at " + name(wait) + ", thread " + std::to_string(t) +
           " waits for it at " + name(other));
    }
  }
  state.threads[self].wait = wait;
  bool all = true;
  for (unsigned t = first; t < last; ++t) {
    if (wait.mask && !(wait.mask >> (t - warp) & 1)) continue;
    const Thread& thread = state.threads[t];
    const Wait& other = thread.wait;
    if (thread.done) fail(name(wait) + ": thread " + std::to_string(t) + " has returned");
    if (other.operation && !wait.mask && (other.mask || other.line != wait.line)) {
      if (!other.mask) fail("divergent: " + name(wait) + " and " + name(other));
    }
    all = all && other.operation && !other.mask == !wait.mask;
  }
  if (all) {
    std::vector<uint64_t> results;
    for (unsigned t = first; t < last; ++t) {
      Wait& mine = state.threads[t].wait;
      if (!wait.mask) {
        results.push_back(0);
      } else if (wait.mask >> (t - warp) & 1) {
        if (!(wait.mask >> mine.source & 1)) {
          fail(name(wait) + ": lane " + std::to_string(mine.source) + " is not in the mask");
        }
        results.push_back(state.threads[warp + mine.source].wait.value);
      } else {
        results.push_back(mine.value);
      }
    }
    for (unsigned t = first; t < last; ++t) {
      if (wait.mask && !(wait.mask >> (t - warp) & 1)) continue;
      state.threads[t].wait.operation = nullptr;
      state.threads[t].wait.value = results[t - first];
    }
    if (!wait.mask) {
      for (unsigned t = 0; t < state.count; t += 32) {
        draw_priorities(t, std::min(t + 32, state.count));
      }
    }
  }
  run_next();
  return state.threads[self].wait.value;
}

inline void thread_main() {
#if defined(__SANITIZE_ADDRESS__)
  const void* from = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(nullptr, &from, &bytes);
  if (!state.host_stack) state.host_stack = from, state.host_stack_bytes = bytes;
#endif
  state.body();
  Thread& self = state.threads[state.current];
  for (unsigned t = 0; t < state.count; ++t) {
    const Wait& other = state.threads[t].wait;
    const bool same_warp = t / 32 == state.current / 32;
    if (other.operation && (!other.mask || (same_warp && other.mask >> (state.current & 31) & 1))) {
      fail("divergent: this thread returned, thread " + std::to_string(t) + " waits for it at " +
           name(other));
    }
  }
  self.done = true;
  ++state.done;
  run_next();
}

__attribute__((no_sanitize_address)) inline void poison_shared() {
  // NaN in every floating type. Byte by byte, past the redzones between the variables too.
  for (volatile char* p = __start_fiber_shared; p < __stop_fiber_shared; ++p) *p = char(0xff);
}

inline void run_block() {
  poison_shared();
  state.count = blockDim.x * blockDim.y * blockDim.z;
  state.done = 0;
  if (state.threads.size() < state.count) state.threads.resize(state.count);
  for (unsigned t = 0; t < state.count; ++t) {
    Thread& thread = state.threads[t];
    if (!thread.stack) thread.stack.reset(new char[kStackBytes]);
    thread.wait = Wait{};
    thread.done = false;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStackBytes;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, thread_main, 0);
  }
  for (unsigned t = 0; t < state.count; t += 32) draw_priorities(t, std::min(t + 32, state.count));
  unsigned best = 0;
  for (unsigned t = 1; t < state.count; ++t) {
    if (state.threads[t].priority > state.threads[best].priority) best = t;
  }
  state.current = best;
  threadIdx = dim3(best % blockDim.x, best / blockDim.x);
  switch_to(state.host, state.threads[best].context, state.threads[best].stack.get(), kStackBytes);
}

inline void launch(dim3 grid, dim3 block, cudaStream_t stream, std::function<void()> body) {
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (!blocks || !threads || threads > 1024 || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535) {
    state.error = cudaErrorInvalidConfiguration;
    return;
  }
  state.launch_device = state.device, state.launch_stream = stream;
  state.launch_blocks = blocks, state.launch_threads = threads, ++state.launches;
  state.body = std::move(body);
  state.random.seed(state.seed);
  std::vector<uint64_t> order(blocks);
  for (uint64_t b = 0; b < blocks; ++b) order[b] = b;
  if (state.seed) std::shuffle(order.begin(), order.end(), state.random);
  gridDim = grid, blockDim = block;
  state.fault.clear();
  for (const uint64_t b : order) {
    blockIdx = dim3(b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y);
    run_block();
    if (!state.fault.empty()) {
      state.error = cudaErrorLaunchFailure;
      return;
    }
  }
}

template <class T>
uint64_t bits_of(T value) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

// PTX's shfl: `wanted` is the source lane before the ends of its segment are looked at.
template <class T>
T shuffle(const char* operation, unsigned mask, T value, int wanted, int width, int line, bool up) {
  const int lane = state.current & 31;
  if (width < 1 || width > 32 || (width & (width - 1))) {
    fail(std::string(operation) + " of line " + std::to_string(line) + ": width " +
         std::to_string(width));
  }
  const int low = lane & ~(width - 1), high = low + width - 1;
  const int source = (up ? wanted < low : wanted > high) ? lane : wanted;
  const uint64_t bits = arrive({operation, line, mask, width, source, bits_of(value)});
  T result;
  std::memcpy(&result, &bits, sizeof(T));
  return result;
}

inline unsigned ballot(const char* operation, unsigned mask, bool vote, int line) {
  unsigned votes = 0;
  const int lane = state.current & 31;
  // 32 shuffles of one operation: slow, and right for every mask.
  for (int source = 0; source < 32; ++source) {
    const int from = mask >> source & 1 ? source : lane;
    const uint64_t bit = arrive({operation, line, mask, 32 + source, from, uint64_t(vote)});
    if (mask >> source & 1) votes |= unsigned(bit) << source;
  }
  return votes;
}

template <class T>
const T* checked(const T* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T)) {
    fail("misaligned access of " + std::to_string(sizeof(T)) + " bytes");
  }
  return address;
}

}  // namespace fiber

inline void __syncthreads(int line = __builtin_LINE()) {
  fiber::arrive({"__syncthreads", line, 0, 0, 0, 0});
}
inline void __syncwarp(unsigned mask = ~0u, int line = __builtin_LINE()) {
  fiber::arrive({"__syncwarp", line, mask, 0, int(fiber::state.current & 31), 0});
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, int line = __builtin_LINE()) {
  const int low = int(fiber::state.current & 31) & ~(width - 1);
  return fiber::shuffle("__shfl_sync", mask, value, low + (lane & (width - 1)), width, line, false);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, int line = __builtin_LINE()) {
  const int lane = fiber::state.current & 31;
  return fiber::shuffle("__shfl_xor_sync", mask, value, lane ^ lanes, width, line, false);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32,
                   int line = __builtin_LINE()) {
  const int lane = fiber::state.current & 31;
  return fiber::shuffle("__shfl_down_sync", mask, value, lane + int(by), width, line, false);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, int line = __builtin_LINE()) {
  const int lane = fiber::state.current & 31;
  return fiber::shuffle("__shfl_up_sync", mask, value, lane - int(by), width, line, true);
}
inline unsigned __ballot_sync(unsigned mask, bool vote, int line = __builtin_LINE()) {
  return fiber::ballot("__ballot_sync", mask, vote, line);
}
inline bool __any_sync(unsigned mask, bool vote, int line = __builtin_LINE()) {
  return fiber::ballot("__any_sync", mask, vote, line) != 0;
}
inline bool __all_sync(unsigned mask, bool vote, int line = __builtin_LINE()) {
  return fiber::ballot("__all_sync", mask, vote, line) == mask;
}

template <class T>
T __ldg(const T* address) {
  fiber::state.loads[sizeof(T)] += sizeof(T);
  return *fiber::checked(address);
}
template <class T>
void __stwb(T* address, T value) {
  fiber::state.stores[sizeof(T)] += sizeof(T);
  *const_cast<T*>(fiber::checked(address)) = value;
}

template <class To, class From>
To fiber_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "a cast of bits keeps their number");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline float __uint_as_float(unsigned bits) { return fiber_cast<float>(bits); }
inline unsigned __float_as_uint(float value) { return fiber_cast<unsigned>(value); }
inline double __longlong_as_double(long long bits) { return fiber_cast<double>(bits); }
inline long long __double_as_longlong(double value) { return fiber_cast<long long>(value); }

struct __half { _Float16 value; };
inline __half __ushort_as_half(unsigned short bits) { return fiber_cast<__half>(bits); }
inline unsigned short __half_as_ushort(__half half) { return fiber_cast<unsigned short>(half); }
inline float __half2float(__half half) { return float(half.value); }
inline __half __float2half_rn(float value) { return {_Float16(value)}; }

struct __nv_bfloat16 { unsigned short bits; };
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  const unsigned bits = __float_as_uint(value);
  if (std::isnan(value)) return {0x7fff};
  return {static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

struct cudaFuncAttributes {};
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = fiber::state.device;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= fiber::kDevices) return fiber::state.error = cudaErrorInvalidDevice;
  fiber::state.device = device;
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() {
  return std::exchange(fiber::state.error, cudaSuccess);
}
inline const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorLaunchFailure) return fiber::state.fault.c_str();
  if (error == cudaErrorInvalidConfiguration) return "invalid configuration argument";
  return error == cudaErrorInvalidDevice ? "invalid device ordinal" : "no error";
}
