// csrc/kd_rows_cuda.cu on the emulator, for ctypes: calls of Python to the two launchers.
#include "fiber_cuda.h"

#include "kd_rows_cuda.cu"

extern "C" {

const char* fiber_forward(const kd::Rows* rows, const kd::ForwardOut* out, int device,
                          void* stream) {
  return kd::forward_cuda(*rows, *out, device, stream);
}
const char* fiber_backward(const kd::Rows* rows, const kd::BackwardArgs* args, int device,
                           void* stream) {
  return kd::backward_cuda(*rows, *args, device, stream);
}
const char* fiber_why_not(int device) { return kd::why_not_cuda(device); }

void fiber_seed(uint64_t seed) { fiber::state.seed = seed; }
int fiber_device() { return fiber::state.device; }
// What the last launch was: device, stream, blocks, threads of a block, launches so far.
void fiber_launch(uint64_t* five) {
  const auto& state = fiber::state;
  five[0] = uint64_t(state.launch_device), five[1] = uint64_t(state.launch_stream);
  five[2] = state.launch_blocks, five[3] = state.launch_threads, five[4] = state.launches;
}
// Bytes moved since the last call, by the width of the access in bytes (0 to 16).
void fiber_traffic(uint64_t* loads, uint64_t* stores) {
  std::copy_n(fiber::state.loads, 17, loads);
  std::copy_n(fiber::state.stores, 17, stores);
  std::fill_n(fiber::state.loads, 17, 0);
  std::fill_n(fiber::state.stores, 17, 0);
}
}
