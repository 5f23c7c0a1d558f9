// kdfast._C: what kdfast/kernels/native.py calls. Tensors come in as addresses and strides, so that
// nothing here needs torch. kdfast/kernels/checks.py has checked them.
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "kd_row_math.h"
#include "kd_rows.h"

namespace py = pybind11;

namespace {

// The one fault that torch's tensors can have here: torch.frombuffer takes any offset.
const void* address(int64_t given, int64_t bytes, const char* what) {
  if (given % bytes != 0) {
    throw py::value_error(std::string(what) + "'s address is not a multiple of " +
                          std::to_string(bytes) + " bytes, the size of its elements");
  }
  return reinterpret_cast<const void*>(given);
}

int64_t bytes_of(kd::Type type) {
  return type == kd::Type::f64 ? 8 : type == kd::Type::f32 ? 4 : 2;
}

int64_t number(const py::handle& tuple, int which) {
  return py::reinterpret_borrow<py::tuple>(tuple)[which].cast<int64_t>();
}

// strides: those of one (B, L, 2) tensor; or of the start head's (B, L) tensor with the end head's
// in end_strides.
kd::Logits logits_of(int64_t start, int64_t end, const py::object& strides,
                     const py::object& end_strides, int type, const char* what) {
  kd::Logits logits{};
  logits.type = static_cast<kd::Type>(type);
  const int64_t bytes = bytes_of(logits.type);
  const bool one = end_strides.is_none();
  for (int head = 0; head < 2; ++head) {
    const py::object& of = head == 1 && !one ? end_strides : strides;
    logits.stride_b[head] = number(of, 0);
    logits.stride_l[head] = number(of, 1);
  }
  logits.head[0] = address(start, bytes, what);
  logits.head[1] = address(one ? start + number(strides, 2) * bytes : end, bytes, what);
  return logits;
}

// The arguments that both functions begin with, as _inputs of kdfast/kernels/native.py and the
// settings give them, made into kd::Rows for `body`. A teacher or mask at address 0 is none.
template <class... Rest>
auto with_rows(void (*body)(const kd::Rows&, Rest...)) {
  return [body](const py::tuple& shape, int64_t student, int64_t student_end,
                const py::tuple& student_strides, const py::object& student_end_strides,
                int student_type, int64_t teacher, int64_t teacher_end,
                const py::object& teacher_strides, const py::object& teacher_end_strides,
                int teacher_type, int64_t start_target, const py::tuple& start_stride,
                int start_bytes, int64_t end_target, const py::tuple& end_stride, int end_bytes,
                int64_t mask, const py::object& mask_strides, double temperature, double weight,
                int kind, double soft_scale, Rest... rest) {
    kd::Rows rows{};
    rows.batch = number(shape, 0);
    rows.length = number(shape, 1);
    rows.student = logits_of(student, student_end, student_strides, student_end_strides,
                             student_type, "student");
    if (teacher != 0) {
      rows.teacher = logits_of(teacher, teacher_end, teacher_strides, teacher_end_strides,
                               teacher_type, "teacher");
    }
    rows.target[0] = address(start_target, start_bytes, "start_positions");
    rows.target[1] = address(end_target, end_bytes, "end_positions");
    rows.target_stride[0] = number(start_stride, 0);
    rows.target_stride[1] = number(end_stride, 0);
    rows.target_bytes[0] = start_bytes;
    rows.target_bytes[1] = end_bytes;
    if (mask != 0) {
      rows.mask = reinterpret_cast<const uint8_t*>(mask);
      rows.mask_stride_b = number(mask_strides, 0);
      rows.mask_stride_l = number(mask_strides, 1);
    }
    rows.temperature = temperature;
    rows.weight = weight;
    rows.kind = kind;
    rows.soft_scale = soft_scale;
    body(rows, rest...);
  };
}

#ifdef KDFAST_CUDA
void raise_cuda(const char* fault) {
  if (fault != nullptr) throw std::runtime_error(std::string("CUDA: ") + fault);
}

kd::Rows divided_by(kd::Rows rows, double divisor) {
  rows.divisor = divisor;
  return rows;
}
#endif

// The sum of row_loss over `divisor`, added up in row order: 0 / 0 of no rows is NaN, as in torch.
template <class A>
void reduce(const void* row_loss, int64_t batch, double divisor, int64_t total) {
  double sum = 0;
  for (int64_t i = 0; i < 2 * batch; ++i) sum += static_cast<const A*>(row_loss)[i];
  *reinterpret_cast<A*>(total) = static_cast<A>(sum / divisor);
}

// device: that of CUDA and its stream's address, or -1 for the CPU, which threads and isa are for.
// total: where the CPU writes the sum of row_loss over divisor, and row_loss nowhere; or 0. CUDA
// divides each row_loss and adds up nothing.
void forward(const kd::Rows& rows, int64_t row_loss, int64_t row_stats, int threads, int isa,
             int device, [[maybe_unused]] int64_t stream, double divisor, int64_t total) {
  py::gil_scoped_release release;
  std::vector<double> unseen(total == 0 ? 0 : 2 * rows.batch);
  const kd::ForwardOut out{total == 0 ? reinterpret_cast<void*>(row_loss) : unseen.data(),
                           reinterpret_cast<void*>(row_stats)};
  if (device < 0 || rows.batch == 0) {
    kd::forward_cpu(rows, out, threads, static_cast<kd::Isa>(isa));
    const auto sum = rows.student.type == kd::Type::f64 ? &reduce<double> : &reduce<float>;
    if (total != 0) sum(out.row_loss, rows.batch, divisor, total);
    return;
  }
#ifdef KDFAST_CUDA
  const kd::Rows divided = divided_by(rows, divisor);
  raise_cuda(kd::forward_cuda(divided, out, device, reinterpret_cast<void*>(stream)));
#endif
}

// grad_end: the end head's gradient, or 0 where `grad` is one (B, L, 2).
// divisor: what one grad_row_loss for all rows is divided by, or 1. The CPU reads it, CUDA cannot.
void backward(const kd::Rows& rows, int64_t row_stats, int64_t grad_row_loss,
              const py::tuple& grad_row_loss_strides, int64_t grad, int64_t grad_end, int threads,
              int isa, int device, [[maybe_unused]] int64_t stream, double divisor) {
  if (rows.batch == 0) return;
  kd::BackwardArgs args{};
  args.row_stats = reinterpret_cast<void*>(row_stats);
  args.grad_row_loss = reinterpret_cast<void*>(grad_row_loss);
  args.grad_row_loss_stride_b = number(grad_row_loss_strides, 0);
  args.grad_row_loss_stride_h = number(grad_row_loss_strides, 1);
  float single;
  double twice;
  if (device < 0 && divisor != 1 && rows.student.type == kd::Type::f64) {
    twice = *reinterpret_cast<const double*>(grad_row_loss) / divisor;
    args.grad_row_loss = &twice;
  } else if (device < 0 && divisor != 1) {
    single = static_cast<float>(*reinterpret_cast<const float*>(grad_row_loss) / divisor);
    args.grad_row_loss = &single;
  }
  const bool one = grad_end == 0;
  args.grad[0] = reinterpret_cast<void*>(grad);
  args.grad[1] = reinterpret_cast<void*>(one ? grad + bytes_of(rows.student.type) : grad_end);
  for (int head = 0; head < 2; ++head) {
    args.grad_stride_l[head] = one ? 2 : 1;
    args.grad_stride_b[head] = rows.length * args.grad_stride_l[head];
  }
  py::gil_scoped_release release;
  if (device < 0) return kd::backward_cpu(rows, args, threads, static_cast<kd::Isa>(isa));
#ifdef KDFAST_CUDA
  const kd::Rows divided = divided_by(rows, divisor);
  raise_cuda(kd::backward_cuda(divided, args, device, reinterpret_cast<void*>(stream)));
#endif
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "The rows of kdfast in C++: see csrc/kd_rows.h.";
  module.def("forward", with_rows(&forward));
  module.def("backward", with_rows(&backward));
  module.def("has_isa", [](int isa) { return kd::has_isa(static_cast<kd::Isa>(isa)); });
#ifdef KDFAST_CUDA
  module.def("built_architectures", [] { return std::string(kd::built_architectures()); });
  module.def("why_not_cuda", [](int device) -> py::object {
    const char* why = kd::why_not_cuda(device);
    return why == nullptr ? py::object(py::none()) : py::object(py::str(why));
  });
#endif
}
