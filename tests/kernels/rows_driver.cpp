// csrc/kd_rows_cpu.cpp as a program, for a compiler or a processor that Python was not built for:
// a batch from standard input, loss, statistics and gradient of it to standard output, as raw
// numbers. Every buffer is as large as its operand and not a byte larger.
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "kd_row_math.h"
#include "kd_rows.h"

namespace {

struct Header {
  int64_t batch, length, student_type, teacher_type, heads_apart, has_mask, kind, isa, threads;
  double temperature, weight, soft_scale;
};

using Memory = std::unique_ptr<char[]>;

Memory take(size_t bytes) {
  Memory memory(new char[bytes]);
  if (std::fread(memory.get(), 1, bytes, stdin) != bytes) std::exit(2);
  return memory;
}

int64_t bytes_of(int64_t type) { return type == 3 ? 8 : type == 2 ? 4 : 2; }

}  // namespace

int main() {
  Header header;
  if (std::fread(&header, sizeof header, 1, stdin) != 1) return 2;
  const int64_t elements = header.batch * header.length, step = header.heads_apart ? 1 : 2;
  kd::Rows rows{};
  rows.batch = header.batch, rows.length = header.length, rows.kind = int(header.kind);
  rows.temperature = header.temperature, rows.weight = header.weight;
  rows.soft_scale = header.soft_scale;
  Memory memory[2];
  kd::Logits* logits[2] = {&rows.student, &rows.teacher};
  for (int i = 0; i < 2; ++i) {
    const int64_t type = i == 0 ? header.student_type : header.teacher_type;
    memory[i] = take(2 * elements * bytes_of(type));
    const int64_t end = (header.heads_apart ? elements : 1) * bytes_of(type);
    *logits[i] = {{memory[i].get(), memory[i].get() + end},
                  {header.length * step, header.length * step},
                  {step, step},
                  kd::Type(type)};
  }
  const Memory targets = take(2 * header.batch * 8), mask = take(header.has_mask ? elements : 0);
  for (int head = 0; head < 2; ++head) {
    rows.target[head] = targets.get() + head * header.batch * 8;
    rows.target_stride[head] = 1, rows.target_bytes[head] = 8;
  }
  if (header.has_mask) rows.mask = reinterpret_cast<const uint8_t*>(mask.get());
  rows.mask_stride_b = header.length, rows.mask_stride_l = 1;

  const int64_t bytes = header.student_type == 3 ? 8 : 4;
  const int64_t grad_bytes = bytes_of(header.student_type);
  const Memory loss(new char[2 * header.batch * bytes]);
  const Memory stats(new char[2 * header.batch * kd::kStats * bytes]);
  const Memory grad(new char[2 * elements * grad_bytes]);
  const double one = 1;
  const float single = 1;
  const kd::Logits& s = rows.student;
  const kd::BackwardArgs args{
      stats.get(),
      bytes == 8 ? static_cast<const void*>(&one) : &single,
      0,
      0,
      {grad.get(), grad.get() + (header.heads_apart ? elements : 1) * grad_bytes},
      {s.stride_b[0], s.stride_b[1]},
      {s.stride_l[0], s.stride_l[1]}};
  kd::forward_cpu(rows, {loss.get(), stats.get()}, int(header.threads), kd::Isa(header.isa));
  kd::backward_cpu(rows, args, int(header.threads), kd::Isa(header.isa));
  std::fwrite(loss.get(), bytes, 2 * header.batch, stdout);
  std::fwrite(stats.get(), bytes, 2 * header.batch * kd::kStats, stdout);
  std::fwrite(grad.get(), grad_bytes, 2 * elements, stdout);
}
