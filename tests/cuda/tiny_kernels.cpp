// One block sum, right, and with each of the classic bugs: what the emulator has to catch.
// As a program (-DPROGRAM): argv[1] is the bug, for the address sanitizer.
#include "fiber_cuda.h"

enum Bug {
  kNone,
  kMissingBarrier,
  kWriteAfterRead,
  kWrongWidth,
  kDivergentShuffle,
  kDivergentBarrier,
  kEarlyReturn,
  kLaneOutsideMask,
  kCallerOutsideMask,
  kUnwrittenShared,
  kMisaligned,
  kTooManyThreads,
  kLoadTooFar,
  kVotes,  // no bug
};

constexpr unsigned kAll = 0xffffffffu;

static float* scratch() {
  __shared__ float numbers[33];
  return numbers;
}

// out[block] = sum of n numbers of the block's + their largest: two uses of one scratch.
template <int bug>
__global__ void sum_and_max(const float* x, float* out, int n) {
  const float* mine = x + size_t(blockIdx.x) * n;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  if (bug == kEarlyReturn && int(threadIdx.x) >= n) return;
  float sum = 0, largest = -INFINITY;
  for (int i = threadIdx.x; i < n + (bug == kLoadTooFar); i += blockDim.x) {
    const float value = __ldg(mine + i);
    sum += value;
    largest = std::max(largest, value);
  }
  if (bug == kMisaligned) sum += float(__ldg(reinterpret_cast<const uint4*>(mine + 1)).x);
  const unsigned mask = bug == kLaneOutsideMask || bug == kCallerOutsideMask ? 0xffffu : kAll;
  if (bug != kLaneOutsideMask || lane < 16) {
    for (int lanes = 16; lanes; lanes /= 2) {
      if (bug == kDivergentShuffle && lane >= lanes) continue;
      sum += __shfl_down_sync(mask, sum, lanes, bug == kWrongWidth ? 16 : 32);
    }
  }
  for (int lanes = 16; lanes; lanes /= 2) {
    largest = std::max(largest, __shfl_xor_sync(kAll, largest, lanes));
  }
  float* numbers = scratch();
  if (lane == 0) numbers[warp] = sum;
  if (bug != kMissingBarrier && (bug != kDivergentBarrier || warp == 0)) __syncthreads();
  float total = 0;
  for (int w = 0; w < warps + (bug == kUnwrittenShared); ++w) total += numbers[w];
  if (bug != kWriteAfterRead) __syncthreads();
  if (lane == 0) numbers[warp] = largest;
  __syncthreads();
  for (int w = 0; w < warps; ++w) largest = std::max(largest, numbers[w]);
  if (bug == kVotes) {
    const unsigned even = __ballot_sync(kAll, lane % 2 == 0);
    total += even == 0x55555555u && __any_sync(kAll, lane == 7) && !__all_sync(kAll, lane == 7);
    total += __shfl_sync(kAll, float(lane), 5) + __shfl_up_sync(kAll, float(lane), 1) - lane + 1;
    if (lane == 0) total -= 1;  // its shuffle up stays where it is
  }
  // Every thread has both: all of them must have the same.
  if (threadIdx.x == blockDim.x - 1) out[blockIdx.x] = total + largest;
}

template <int bug = 0>
void launch_one(int wanted, int blocks, int threads, const float* x, float* out, int n) {
  if constexpr (bug <= kVotes) {
    if (wanted != bug) return launch_one<bug + 1>(wanted, blocks, threads, x, out, n);
    KD_LAUNCH(sum_and_max<bug>, dim3(blocks), dim3(bug == kTooManyThreads ? 1056 : threads),
              nullptr, x, out, n);
  }
}

extern "C" const char* tiny(int bug, uint64_t seed, int blocks, int threads, const float* x,
                            float* out, int n) {
  fiber::state.seed = seed;
  launch_one(bug, blocks, threads, x, out, n);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

#ifdef PROGRAM
int main(int, char** argv) {
  const int n = 100;
  std::vector<float> x(n, 1.0f), out(1);
  const char* problem = tiny(std::stoi(argv[1]), 1, 1, 64, x.data(), out.data(), n);
  std::printf("%s %g\n", problem ? problem : "sum", double(out[0]));
}
#endif
