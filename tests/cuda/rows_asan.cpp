// The CUDA rows on the emulator as a program for the address sanitizer: every buffer is as large
// as its operand and not a byte larger. Prints how many calls were made.
#include "fiber_cuda.h"

#include "kd_rows_cuda.cu"

namespace {

// Memory that begins `lead` bytes after a 16-byte boundary and ends with its last element.
struct Buffer {
  std::unique_ptr<char[]> memory;
  char* data;
  explicit Buffer(size_t bytes, size_t lead = 0)
      : memory(new char[bytes + lead]()), data(memory.get() + lead) {}
};

const int kBytes[] = {2, 2, 4, 8};

int check(const char* problem) {
  if (!problem) return 1;
  std::fprintf(stderr, "%s\n", problem);
  std::exit(1);
}

// form 0: one (batch, length, 2) tensor; 1: two of (batch, length), the same memory read twice.
kd::Logits logits_in(const Buffer& buffer, kd::Type type, int64_t length, int form) {
  kd::Logits logits{};
  const int64_t pitch = form == 0 ? 2 : 1;
  logits.head[0] = buffer.data;
  logits.head[1] = buffer.data + (form == 0 ? kBytes[int(type)] : 0);
  for (int h = 0; h < 2; ++h) logits.stride_b[h] = length * pitch, logits.stride_l[h] = pitch;
  logits.type = type;
  return logits;
}

int run(kd::Type student, kd::Type teacher, int64_t length, int form, bool shifted, bool masked) {
  const int64_t batch = 3, sum_bytes = student == kd::Type::f64 ? 8 : 4;
  const int64_t elements = batch * length * (form == 0 ? 2 : 1);
  const int s_bytes = kBytes[int(student)], c_bytes = kBytes[int(teacher)];
  const Buffer s(elements * s_bytes, shifted ? s_bytes : 0);
  const Buffer c(elements * c_bytes, shifted ? c_bytes : 0);
  const Buffer mask(batch * length, shifted), targets(batch * 8);
  std::fill_n(mask.data, batch * length, 1);
  for (int b = 0; b < batch; ++b) {
    reinterpret_cast<int64_t*>(targets.data)[b] = b == 0 ? length - 1 : b == 1 ? length : 0;
  }
  kd::Rows rows{};
  rows.batch = batch, rows.length = length;
  rows.student = logits_in(s, student, length, form);
  rows.teacher = logits_in(c, teacher, length, form);
  if (masked) {
    rows.mask = reinterpret_cast<uint8_t*>(mask.data);
    rows.mask_stride_b = length, rows.mask_stride_l = 1;
  }
  for (int h = 0; h < 2; ++h) {
    rows.target[h] = targets.data, rows.target_stride[h] = 1, rows.target_bytes[h] = 8;
  }
  rows.temperature = 2, rows.weight = 0.5, rows.soft_scale = 1, rows.kind = kd::kKlDiv;
  rows.divisor = batch;

  const Buffer loss(batch * 2 * sum_bytes), stats(batch * 2 * kd::kStats * sum_bytes);
  check(kd::forward_cuda(rows, {loss.data, stats.data}, 0, nullptr));
  const Buffer start(elements * s_bytes), end(form == 0 ? 0 : elements * s_bytes);
  kd::BackwardArgs args{};
  args.row_stats = stats.data, args.grad_row_loss = loss.data;
  args.grad_row_loss_stride_b = 2, args.grad_row_loss_stride_h = 1;
  args.grad[0] = start.data;
  args.grad[1] = form == 0 ? start.data + s_bytes : end.data;
  for (int h = 0; h < 2; ++h) {
    args.grad_stride_b[h] = rows.student.stride_b[h], args.grad_stride_l[h] = form == 0 ? 2 : 1;
  }
  return check(kd::backward_cuda(rows, args, 0, nullptr));
}

}  // namespace

int main() {
  int calls = 0;
#define KD_TYPE(name) kd::Type::name,
  for (const kd::Type student : {KD_TYPES(KD_TYPE)}) {
    for (const kd::Type teacher : {KD_TYPES(KD_TYPE)}) {
      for (const int64_t length : {1, 2, 7, 31, 37, 64, 383}) {
        for (int way = 0; way < 8; ++way) {
          calls += run(student, teacher, length, way & 1, way & 2, way & 4);
        }
      }
    }
  }
  std::printf("%d calls\n", calls);
}
