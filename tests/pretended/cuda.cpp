// What a build of torch without CUDA lacks before it takes "cuda" for a device: a guard, which
// knows the current device and stream of each thread; hooks, which give pinned memory; and the
// choice of an attention kernel. Nothing here computes.
#include <ATen/Context.h>
#include <ATen/SDPBackend.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <array>
#include <map>
#include <mutex>

namespace {

constexpr int kMostDevices = 8;
int devices = 2;
bool has_bf16 = false;
thread_local int current = 0;
thread_local std::array<int64_t, kMostDevices> streams{};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = c10::DeviceType::CUDA;
  Guard() = default;
  explicit Guard(c10::DeviceType) {}
  c10::DeviceType type() const override { return static_type; }
  c10::Device getDevice() const override { return {static_type, (c10::DeviceIndex)current}; }
  void setDevice(c10::Device device) const override { current = device.index(); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { current = device.index(); }
  c10::Device exchangeDevice(c10::Device device) const override {
    c10::Device before = getDevice();
    current = device.index();
    return before;
  }
  c10::Stream stream(c10::Device device, int64_t id) const {
    return c10::Stream(c10::Stream::UNSAFE, device, id);
  }
  c10::Device named(c10::Device device) const { return device.has_index() ? device : getDevice(); }
  c10::Stream getStream(c10::Device device) const override {
    device = named(device);
    return stream(device, streams[device.index()]);
  }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return stream(named(device), 0);
  }
  c10::Stream exchangeStream(c10::Stream next) const override {
    c10::Stream before = getStream(next.device());
    streams[next.device_index()] = next.id();
    return before;
  }
  c10::DeviceIndex deviceCount() const noexcept override { return devices; }
  // Autograd orders its own streams by events. All that is computed here is computed at once.
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag)
      const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

// The CPU's memory, and a list of what was given out, for Tensor.is_pinned().
struct PinnedMemory final : c10::Allocator {
  static inline std::mutex lock;
  static inline std::map<const char*, size_t> given;
  static bool holds(const void* pointer) {
    std::lock_guard<std::mutex> held(lock);
    auto after = given.upper_bound((const char*)pointer);
    if (after == given.begin()) return false;
    auto block = std::prev(after);
    return (const char*)pointer < block->first + block->second;
  }
  static void release(void* pointer) {
    {
      std::lock_guard<std::mutex> held(lock);
      given.erase((const char*)pointer);
    }
    c10::GetDefaultCPUAllocator()->raw_deallocate(pointer);
  }
  c10::DataPtr allocate(size_t bytes) override {
    void* pointer = c10::GetDefaultCPUAllocator()->raw_allocate(bytes);
    std::lock_guard<std::mutex> held(lock);
    if (pointer) given[(const char*)pointer] = bytes;
    return {pointer, pointer, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return devices; }
  int getNumGPUs() const override { return devices; }
  c10::DeviceIndex current_device() const override { return current; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(c10::DeviceIndex device) const override { current = device; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override {
    c10::DeviceIndex before = current;
    current = device;
    return before;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override {
    return exchangeDevice(device);
  }
  bool isPinnedPtr(const void* pointer) const override { return PinnedMemory::holds(pointer); }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    static PinnedMemory memory;
    return &memory;
  }
  void deviceSynchronize(c10::DeviceIndex) const override {}
};

// torch's memory-efficient kernel wherever it serves, else plain operations. On a card with
// flash attention that one would come first.
int64_t choose_attention(
    const at::Tensor& query, const at::Tensor&, const at::Tensor&,
    const std::optional<at::Tensor>& mask, double, bool, std::optional<double>, bool) {
  const auto type = query.scalar_type();
  const bool serves = type == at::kFloat || type == at::kHalf || (type == at::kBFloat16 && has_bf16);
  const bool may = at::globalContext().userEnabledMemEfficientSDP();
  const bool learns_mask = mask.has_value() && mask->requires_grad();
  return (int64_t)(serves && may && !learns_mask ? at::SDPBackend::efficient_attention
                                                 : at::SDPBackend::math);
}

}  // namespace

namespace at {
using CUDAHooks = ::Hooks;  // the name that torch looks for
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, CUDAHooks)
namespace native {
REGISTER_CUDA_DISPATCH(_fused_sdp_choice_stub, &choose_attention)
}
}  // namespace at

extern "C" {
void pretended_configure(int count, bool bf16) {
  devices = count;
  has_bf16 = bf16;
}
int pretended_device() { return current; }
int pretended_exchange_device(int device) {
  int before = current;
  if (device >= 0) current = device;
  return before;
}
int64_t pretended_stream(int device) { return streams[device]; }
void pretended_set_stream(int device, int64_t id) { streams[device] = id; }
}
