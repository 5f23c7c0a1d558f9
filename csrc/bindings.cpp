// kdfast._C: the raw door to the rows. Pointers and strides come in as integers, so that nothing
// here needs torch, and every one of them is checked as far as an integer can be.
#include <pybind11/pybind11.h>

#include <cmath>
#include <string>
#include <vector>

#include "kd_row_math.h"
#include "kd_rows.h"

namespace py = pybind11;

namespace {

constexpr int64_t kLongest = 0x7fffffff;

[[noreturn]] void refuse(const std::string& sentence) { throw py::value_error(sentence); }

int64_t integer(PyObject* given, const char* what) {
  const int64_t value = PyLong_AsLongLong(given);
  if (value == -1 && PyErr_Occurred()) {
    PyErr_Clear();
    refuse(std::string(what) + " is not a whole number of 64 bits");
  }
  return value;
}

const void* address(int64_t given, int64_t bytes, const char* what) {
  if (given == 0) refuse(std::string(what) + " has address 0, expected memory");
  if (given % bytes != 0) {
    refuse(std::string(what) + "'s address is not a multiple of " + std::to_string(bytes) +
           " bytes, the size of its elements");
  }
  return reinterpret_cast<const void*>(given);
}

int64_t bytes_of(kd::Type type) {
  return type == kd::Type::f64 ? 8 : type == kd::Type::f32 ? 4 : 2;
}

// Number `which` of `count` strides, for a dimension of so many elements. Offsets are formed in 64
// bits, in bytes.
int64_t stride_of(const py::handle& strides, int count, int which, int64_t elements,
                  const char* what) {
  if (!PyTuple_Check(strides.ptr()) || PyTuple_GET_SIZE(strides.ptr()) != count) {
    refuse(std::string(what) + " has a wrong number of strides, expected " + std::to_string(count));
  }
  const int64_t stride = integer(PyTuple_GET_ITEM(strides.ptr(), which), what);
  const int64_t most = (int64_t(1) << 58) / (elements > 1 ? elements : 1);
  if (stride > most || stride < -most) {
    refuse(std::string(what) + " has a stride of " + std::to_string(stride) + " over " +
           std::to_string(elements) + " elements, expected an offset within 58 bits");
  }
  return stride;
}

// strides: those of one (B, L, 2) tensor; or of the start head's (B, L) tensor with the end head's
// in end_strides.
kd::Logits logits_of(int64_t start, int64_t end, const py::object& strides,
                     const py::object& end_strides, int type, const kd::Rows& rows,
                     const char* what) {
  if (type < 0 || type > 3) {
    refuse(std::string(what) + " has type " + std::to_string(type) +
           ", expected 0 (fp16), 1 (bf16), 2 (fp32) or 3 (fp64)");
  }
  kd::Logits logits{};
  logits.type = static_cast<kd::Type>(type);
  const int64_t bytes = bytes_of(logits.type);
  const bool one = end_strides.is_none();
  if (rows.batch == 0) return logits;
  logits.head[0] = address(start, bytes, what);
  for (int head = 0; head < 2; ++head) {
    const py::object& of = head == 1 && !one ? end_strides : strides;
    logits.stride_b[head] = stride_of(of, one ? 3 : 2, 0, rows.batch, what);
    logits.stride_l[head] = stride_of(of, one ? 3 : 2, 1, rows.length, what);
  }
  logits.head[1] = one ? static_cast<const char*>(logits.head[0]) +
                             stride_of(strides, 3, 2, 2, what) * bytes
                       : address(end, bytes, what);
  return logits;
}

void set_sizes(kd::Rows& rows, const py::tuple& shape) {
  if (shape.size() < 2) refuse("shape has fewer than two numbers, expected B and L");
  rows.batch = integer(PyTuple_GET_ITEM(shape.ptr(), 0), "batch");
  rows.length = integer(PyTuple_GET_ITEM(shape.ptr(), 1), "length");
  if (rows.batch < 0 || rows.length < 1 || rows.batch > kLongest || rows.length > kLongest) {
    refuse("batch and length are " + std::to_string(rows.batch) + " and " +
           std::to_string(rows.length) + ", expected at least 0 and 1 and neither above " +
           std::to_string(kLongest));
  }
}

void set_settings(kd::Rows& rows, double temperature, double weight, int kind, double soft_scale) {
  if (!(temperature > 0) || !std::isfinite(temperature)) {
    refuse("temperature is " + std::to_string(temperature) + ", expected a finite number above 0");
  }
  if (!(weight >= 0 && weight <= 1)) {
    refuse("weight is " + std::to_string(weight) + ", expected 0 to 1 inclusive");
  }
  if (!(soft_scale > 0) || !std::isfinite(soft_scale)) {
    refuse("soft_scale is " + std::to_string(soft_scale) + ", expected a finite number above 0");
  }
  if (kind != kd::kKlDiv && kind != kd::kMse) {
    refuse("kind is " + std::to_string(kind) + ", expected 0 (kl_div) or 1 (mse)");
  }
  rows.temperature = temperature;
  rows.weight = weight;
  rows.kind = kind;
  rows.soft_scale = soft_scale;
}

void set_target(kd::Rows& rows, int head, int64_t target, const py::tuple& stride, int bytes) {
  if (bytes != 4 && bytes != 8) {
    refuse("a target has " + std::to_string(bytes) + " bytes, expected 4 (int32) or 8 (int64)");
  }
  rows.target_bytes[head] = bytes;
  rows.target_stride[head] = stride_of(stride, 1, 0, rows.batch, "target");
  if (rows.batch > 0) rows.target[head] = address(target, bytes, "target");
}

// A door to the rows: the arguments that both functions begin with, as _inputs of
// kdfast/kernels/native.py and the settings give them, checked and made into kd::Rows for `body`.
// shape begins with B and L; a teacher or mask at address 0 is none.
template <class... Rest>
auto door(void (*body)(const kd::Rows&, Rest...)) {
  return [body](const py::tuple& shape, int64_t student, int64_t student_end,
                const py::tuple& student_strides, const py::object& student_end_strides,
                int student_type, int64_t teacher, int64_t teacher_end,
                const py::object& teacher_strides, const py::object& teacher_end_strides,
                int teacher_type, int64_t start_target, const py::tuple& start_stride,
                int start_bytes, int64_t end_target, const py::tuple& end_stride, int end_bytes,
                int64_t mask, const py::object& mask_strides, double temperature, double weight,
                int kind, double soft_scale, Rest... rest) {
    kd::Rows rows{};
    set_sizes(rows, shape);
    set_settings(rows, temperature, weight, kind, soft_scale);
    rows.student = logits_of(student, student_end, student_strides, student_end_strides,
                             student_type, rows, "student");
    if (teacher != 0) {
      rows.teacher = logits_of(teacher, teacher_end, teacher_strides, teacher_end_strides,
                               teacher_type, rows, "teacher");
    } else if (weight > 0 && rows.batch > 0) {
      refuse("teacher has address 0 with weight " + std::to_string(weight) +
             ", expected logits, or weight 0");
    }
    set_target(rows, 0, start_target, start_stride, start_bytes);
    set_target(rows, 1, end_target, end_stride, end_bytes);
    if (mask != 0) {
      rows.mask = reinterpret_cast<const uint8_t*>(mask);
      rows.mask_stride_b = stride_of(mask_strides, 2, 0, rows.batch, "mask");
      rows.mask_stride_l = stride_of(mask_strides, 2, 1, rows.length, "mask");
    }
    body(rows, rest...);
  };
}

int64_t accumulating_bytes(const kd::Rows& rows) {
  return rows.student.type == kd::Type::f64 ? 8 : 4;
}

kd::Isa isa_of(int isa, int threads) {
  if (isa < 0 || isa > 3 || (isa > 0 && !kd::has_isa(static_cast<kd::Isa>(isa)))) {
    refuse("isa is " + std::to_string(isa) +
           ", expected one that this processor has: 0 (best), 1 (portable), 2 (avx2), 3 (avx512)");
  }
  if (threads < 1) refuse("threads is " + std::to_string(threads) + ", expected at least 1");
  return static_cast<kd::Isa>(isa);
}

[[maybe_unused]] void raise_cuda(const char* fault) {
  if (fault != nullptr) throw std::runtime_error(std::string("CUDA: ") + fault);
}

// The sum of row_loss over `divisor`, added up in row order: 0 / 0 of no rows is NaN, as in torch.
template <class A>
void reduce(const void* row_loss, int64_t batch, double divisor, int64_t total) {
  double sum = 0;
  for (int64_t i = 0; i < 2 * batch; ++i) sum += static_cast<const A*>(row_loss)[i];
  *static_cast<A*>(const_cast<void*>(address(total, sizeof(A), "total"))) =
      static_cast<A>(sum / divisor);
}

// device: that of CUDA and its stream's address, or -1 for the CPU, which threads and isa are for.
// total: where the CPU writes the sum of row_loss over divisor, and row_loss nowhere; or 0.
void forward(const kd::Rows& rows, int64_t row_loss, int64_t row_stats, int threads, int isa,
             int device, int64_t stream, double divisor, int64_t total) {
  const kd::Isa chosen = isa_of(isa, threads);
  const int64_t bytes = accumulating_bytes(rows);
  const auto sum = bytes == 8 ? &reduce<double> : &reduce<float>;
  if (total != 0 && device >= 0) refuse("total is for the CPU's rows");
  if (rows.batch == 0) return total == 0 ? void() : sum(nullptr, 0, divisor, total);
  std::vector<double> unseen(total == 0 ? 0 : 2 * rows.batch);
  const kd::ForwardOut out{
      total == 0 ? const_cast<void*>(address(row_loss, bytes, "row_loss")) : unseen.data(),
      const_cast<void*>(address(row_stats, bytes, "row_stats"))};
  py::gil_scoped_release release;
  if (device < 0) {
    kd::forward_cpu(rows, out, threads, chosen);
    return total == 0 ? void() : sum(out.row_loss, rows.batch, divisor, total);
  }
#ifdef KDFAST_CUDA
  raise_cuda(kd::forward_cuda(rows, out, device, reinterpret_cast<void*>(stream)));
#else
  (void)stream;
  throw std::runtime_error("kdfast._C was built without CUDA");
#endif
}

// grad_end: the end head's gradient, or 0 where `grad` is one (B, L, 2).
// divisor: what one grad_row_loss for all rows of the CPU is divided by, or 1.
void backward(const kd::Rows& rows, int64_t row_stats, int64_t grad_row_loss,
              const py::tuple& grad_row_loss_strides, int64_t grad, int64_t grad_end, int threads,
              int isa, int device, int64_t stream, double divisor) {
  const kd::Isa chosen = isa_of(isa, threads);
  if (grad_row_loss_strides.size() != 2)
    refuse("grad_row_loss has a wrong number of strides, expected 2");
  if (rows.batch == 0) return;
  const int64_t bytes = accumulating_bytes(rows);
  kd::BackwardArgs args{};
  args.row_stats = address(row_stats, bytes, "row_stats");
  args.grad_row_loss = address(grad_row_loss, bytes, "grad_row_loss");
  args.grad_row_loss_stride_b =
      stride_of(grad_row_loss_strides, 2, 0, rows.batch, "grad_row_loss");
  args.grad_row_loss_stride_h = stride_of(grad_row_loss_strides, 2, 1, 2, "grad_row_loss");
  float single;
  double twice;
  if (divisor != 1) {
    if (device >= 0 || args.grad_row_loss_stride_b != 0 || args.grad_row_loss_stride_h != 0)
      refuse("divisor is for one gradient of all the CPU's rows");
    if (bytes == 8) {
      twice = *static_cast<const double*>(args.grad_row_loss) / divisor;
      args.grad_row_loss = &twice;
    } else {
      single = static_cast<float>(*static_cast<const float*>(args.grad_row_loss) / divisor);
      args.grad_row_loss = &single;
    }
  }
  const int64_t element = bytes_of(rows.student.type);
  char* memory = static_cast<char*>(const_cast<void*>(address(grad, element, "grad")));
  const bool one = grad_end == 0;
  args.grad[0] = memory;
  args.grad[1] =
      one ? memory + element : const_cast<void*>(address(grad_end, element, "grad_end"));
  for (int head = 0; head < 2; ++head) {
    args.grad_stride_l[head] = one ? 2 : 1;
    args.grad_stride_b[head] = rows.length * args.grad_stride_l[head];
  }
  py::gil_scoped_release release;
  if (device < 0) return kd::backward_cpu(rows, args, threads, chosen);
#ifdef KDFAST_CUDA
  raise_cuda(kd::backward_cuda(rows, args, device, reinterpret_cast<void*>(stream)));
#else
  (void)stream;
  throw std::runtime_error("kdfast._C was built without CUDA");
#endif
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "The rows of kdfast in C++: see csrc/kd_rows.h.";
  module.def("forward", door(&forward));
  module.def("backward", door(&backward));
  module.def("has_isa", [](int isa) {
    return isa >= 1 && isa <= 3 && kd::has_isa(static_cast<kd::Isa>(isa));
  });
  module.def("best_isa", [] { return static_cast<int>(kd::best_isa()); });
#ifdef KDFAST_CUDA
  module.def("built_architectures", [] { return std::string(kd::built_architectures()); });
  module.def("why_not_cuda", [](int device) -> py::object {
    const char* why = kd::why_not_cuda(device);
    return why == nullptr ? py::object(py::none()) : py::object(py::str(why));
  });
#endif
}
