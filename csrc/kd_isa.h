// The windows of a batch for one instruction set each, as kd_rows_cpu.cpp calls them.
#pragma once

#include "kd_rows.h"

namespace kd {

// Thrown where there is no memory for the copy of a row.
struct NoMemory {};

struct IsaRows {
  void (*forward)(const Rows&, const ForwardOut&, int64_t first, int64_t last);
  void (*backward)(const Rows&, const BackwardArgs&, int64_t first, int64_t last);
};

extern const IsaRows kPortableRows, kAvx2Rows, kAvx512Rows;

}  // namespace kd

// Defines one of them, in the one source that chose the target and defined KD_ISA.
#define KD_DEFINE_ROWS(name)                                                                   \
  namespace kd {                                                                               \
  static void forward(const Rows& rows, const ForwardOut& out, int64_t first, int64_t last) {  \
    if (rows.student.type == Type::f64) {                                                      \
      KD_ISA::forward_windows<double>(rows, out, first, last);                                 \
    } else {                                                                                   \
      KD_ISA::forward_windows<float>(rows, out, first, last);                                  \
    }                                                                                          \
  }                                                                                            \
  static void backward(const Rows& rows, const BackwardArgs& args, int64_t first,              \
                       int64_t last) {                                                         \
    if (rows.student.type == Type::f64) {                                                      \
      KD_ISA::backward_windows<double>(rows, args, first, last);                               \
    } else {                                                                                   \
      KD_ISA::backward_windows<float>(rows, args, first, last);                                \
    }                                                                                          \
  }                                                                                            \
  const IsaRows name = {forward, backward};                                                    \
  }
