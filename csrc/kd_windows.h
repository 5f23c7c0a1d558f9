// Windows of a batch, one after the other: which positions take part, where a kernel can run on
// the tensors themselves and where on copies, and what is written. Included per instruction set.
#pragma once

#include <cstdlib>

#include "kd_gather.h"
#include "kd_isa.h"
#include "kd_runs.h"

namespace kd {
namespace KD_ISA {

// The positions that take part: those of [begin, end), less the gaps.
struct Span {
  int64_t begin, end, count;
  const uint8_t* mask;  // of the window; null if there are no gaps
  int64_t stride;
};

inline Span span_of(const Rows& rows, int64_t b) {
  Span span{0, rows.length, rows.length, nullptr, rows.mask_stride_l};
  if (rows.mask == nullptr) return span;
  const uint8_t* mask = rows.mask + b * rows.mask_stride_b;
  const int64_t stride = rows.mask_stride_l;
  int64_t begin = 0, end = rows.length, count = 0;
  if (stride == 1) {
    // Padding comes in long stretches: eight positions at a time.
    for (uint64_t eight = 0; begin + 8 <= end; begin += 8) {
      memcpy(&eight, mask + begin, 8);
      if (eight != 0) break;
    }
    for (uint64_t eight = 0; begin + 8 <= end; end -= 8) {
      memcpy(&eight, mask + end - 8, 8);
      if (eight != 0) break;
    }
  }
  while (begin < end && !mask[begin * stride]) ++begin;
  while (begin < end && !mask[(end - 1) * stride]) --end;
  if (stride == 1) {
    for (int64_t i = begin; i < end; ++i) count += mask[i] != 0;
  } else {
    for (int64_t i = begin; i < end; ++i) count += mask[i * stride] != 0;
  }
  return {begin, end, count, count == end - begin ? nullptr : mask, stride};
}

// The target of a head if it counts (inside the row, taking part), else -1.
inline int64_t target_of(const Rows& rows, const Span& span, int64_t b, int head) {
  const int64_t at = b * rows.target_stride[head];
  const int64_t target = rows.target_bytes[head] == 8
                             ? static_cast<const int64_t*>(rows.target[head])[at]
                             : static_cast<const int32_t*>(rows.target[head])[at];
  if (target < span.begin || target >= span.end) return -1;
  return span.mask == nullptr || span.mask[target * span.stride] ? target : -1;
}

inline int64_t bytes_of(Type type) {
  return type == Type::f64 ? 8 : type == Type::f32 ? 4 : 2;
}

inline const void* element(const Logits& logits, int head, int64_t b, int64_t i) {
  return static_cast<const char*>(logits.head[head]) +
         (b * logits.stride_b[head] + i * logits.stride_l[head]) * bytes_of(logits.type);
}

// Whether the two heads lie element by element side by side.
inline bool is_interleaved(const Logits& logits) {
  return logits.stride_l[0] == 2 && logits.stride_l[1] == 2 &&
         logits.stride_b[0] == logits.stride_b[1] &&
         static_cast<const char*>(logits.head[0]) + bytes_of(logits.type) == logits.head[1];
}

// Memory of one thread for copies of rows, taken when the first copy is.
template <class A>
class Scratch {
 public:
  // So many parts of so many numbers each.
  Scratch(int parts, int64_t size) : parts_(parts), size_((size_t(size) + 63) / 64 * 64) {}
  Scratch(const Scratch&) = delete;
  ~Scratch() { free(memory_); }

  A* part(int which) {
    if (memory_ == nullptr) memory_ = aligned_alloc(64, parts_ * size_ * sizeof(A));
    if (memory_ == nullptr) throw NoMemory();
    return static_cast<A*>(memory_) + which * size_;
  }

 private:
  size_t parts_, size_;
  void* memory_ = nullptr;
};

// Runs of the windows of one call: one of both heads where the student's are interleaved, else
// one per head.
template <class A>
class Reader {
 public:
  Reader(const Rows& rows, bool needs_teacher)
      : rows_(rows),
        heads_(is_interleaved(rows.student) ? 2 : 1),
        needs_teacher_(needs_teacher && rows.teacher.head[0] != nullptr),
        student_plain_(is_plain(rows.student)),
        teacher_plain_(needs_teacher_ && is_plain(rows.teacher)) {}

  int heads() const { return heads_; }

  // part: the first of two of the scratch that the run may need.
  Run<A> run(Scratch<A>& scratch, int part, const Span& span, int64_t b, int head) const {
    Run<A> run{nullptr, nullptr, (span.end - span.begin) * heads_, heads_};
    run.student = read(rows_.student, student_plain_, scratch, part, span, b, head);
    if (needs_teacher_)
      run.teacher = read(rows_.teacher, teacher_plain_, scratch, part + 1, span, b, head);
    return run;
  }

 private:
  bool is_plain(const Logits& logits) const {
    if (logits.type != (sizeof(A) == 4 ? Type::f32 : Type::f64)) return false;
    if (heads_ == 2) return is_interleaved(logits);
    return logits.stride_l[0] == 1 && logits.stride_l[1] == 1;
  }

  const A* read(const Logits& logits, bool plain, Scratch<A>& scratch, int part, const Span& span,
                int64_t b, int head) const {
    const void* from = element(logits, head, b, span.begin);
    if (plain && span.mask == nullptr) return static_cast<const A*>(from);
    const int64_t size = span.end - span.begin;
    A* copy = scratch.part(part);
    if (heads_ == 1) {
      gather(from, logits.type, logits.stride_l[head], size, copy, 1);
    } else if (is_interleaved(logits)) {
      gather(from, logits.type, 1, 2 * size, copy, 1);
    } else {
      gather(from, logits.type, logits.stride_l[0], size, copy, 2);
      gather(element(logits, 1, b, span.begin), logits.type, logits.stride_l[1], size, copy + 1, 2);
    }
    if (span.mask != nullptr) fill_gaps(copy, span, heads_, A(-INFINITY));
    return copy;
  }

 public:
  static void fill_gaps(A* values, const Span& span, int heads, A value) {
    const uint8_t* mask = span.mask + span.begin * span.stride;
    for (int64_t i = 0; i < span.end - span.begin; ++i) {
      if (mask[i * span.stride]) continue;
      for (int head = 0; head < heads; ++head) values[i * heads + head] = value;
    }
  }

 private:
  const Rows& rows_;
  int heads_;
  bool needs_teacher_, student_plain_, teacher_plain_;
};

inline int forward_mode(const Rows& rows) {
  if (rows.teacher.head[0] == nullptr) return kHard;
  if (rows.kind == kMse) return kSquares;
  // Weight 0 has a backward of the hard term alone, whose exponents are not those of y^3.
  if (rows.temperature == 1.5 && rows.weight > 0.0) return kCube;
  return rows.temperature == 1.0 ? kEqual : rows.temperature == 2.0 ? kSquare : kAny;
}

inline int backward_mode(const Rows& rows) {
  const int mode = forward_mode(rows);
  if (rows.weight == 0.0) return kHard;
  if (rows.weight == 1.0) return mode == kSquares ? kGaps : kEqual;
  return mode;
}

// Runs are summed in small groups, first the maxima of all, then the sums of all, then the ends of
// all: what one step waits for, the first exponential for the maximum above all, another run does.
// A group should stay in the first-level cache.
constexpr int kGroup = 8;
constexpr int64_t kGroupElements = 3072;

template <class A>
struct Task {
  Run<A> run;
  Pair<A> max_s, max_t;
  Lines<A> lines;
  RowSums<A> sums[2];
  int64_t target[2];
  int64_t count;
  int64_t row;  // of row_loss and row_stats, 2 b + head
};

template <class A>
void finish_tasks(const Task<A>* tasks, int count, int mode, const Rows& rows,
                  const ForwardOut& out) {
  // The end of a row's arithmetic is worth double: it is short, and the logarithms matter.
  const auto scales =
      scales_of<double>(rows.temperature, rows.weight, rows.soft_scale, rows.kind);
  const bool has_teacher = rows.teacher.head[0] != nullptr;
  RowSums<double> sums[2 * kGroup];
  double log_ratio[2 * kGroup], log_sum[2 * kGroup];
  int n = 0;
  for (const Task<A>* task = tasks; task < tasks + count; ++task) {
    for (int i = 0; i < task->run.heads; ++i, ++n) {
      const RowSums<A>& row = task->sums[i];
      sums[n] = {task->max_s.of[i], row.sum_sT, row.sum_s,           task->max_t.of[i],
                 row.sum_tT,        row.soft,   double(task->count)};
      log_ratio[n] = ratio_of(sums[n]);
      log_sum[n] = sums[n].sum_s;
    }
  }
  if (has_teacher && rows.kind == kKlDiv) log2_all(log_ratio, n);
  log2_all(log_sum, n);
  n = 0;
  for (const Task<A>* task = tasks; task < tasks + count; ++task) {
    for (int i = 0; i < task->run.heads; ++i, ++n) {
      const int64_t target = task->target[i];
      double exponent = 0.0;
      if (target >= 0) {
        const A logit = task->run.student[target * task->run.heads + i];
        exponent = hard_exponent(task->lines, mode, logit, i);
      }
      const RowParts<double> parts = finish_row(scales, sums[n], rows.kind, has_teacher,
                                                target >= 0, exponent, log_ratio[n], log_sum[n]);
      static_cast<A*>(out.row_loss)[task->row + i] = A(parts.loss);
      A* stats = static_cast<A*>(out.row_stats) + (task->row + i) * kStats;
      stats[kMaxS] = task->max_s.of[i];
      stats[kSumST] = task->sums[i].sum_sT;
      stats[kSumS] = task->sums[i].sum_s;
      stats[kMaxT] = task->max_t.of[i];
      stats[kSumTT] = task->sums[i].sum_tT;
      stats[kSoftPart] = A(parts.soft);
      stats[kHardPart] = A(parts.hard);
      stats[kCount] = A(task->count);
    }
  }
}

template <class A>
void forward_windows(const Rows& rows, const ForwardOut& out, int64_t first, int64_t last) {
  const Scales<A> scales = scales_of<A>(rows.temperature, rows.weight, rows.soft_scale, rows.kind);
  const bool needs_max_t = rows.teacher.head[0] != nullptr && rows.kind == kKlDiv;
  const int mode = forward_mode(rows);
  const Reader<A> reader(rows, true);
  const int heads = reader.heads();
  const int64_t fit = kGroupElements / (heads * rows.length);
  const int most = fit < 1 ? 1 : fit > kGroup ? kGroup : int(fit);
  Scratch<A> scratch(2 * most, heads * rows.length);
  Task<A> tasks[kGroup];
  int waiting = 0;
  for (int64_t row = 2 * first; row < 2 * last; row += heads) {
    const int64_t b = row / 2, head = row % 2;
    const Span span = span_of(rows, b);
    if (span.count == 0) {
      for (int i = 0; i < heads; ++i) static_cast<A*>(out.row_loss)[row + i] = A(0);
      A* stats = static_cast<A*>(out.row_stats) + row * kStats;
      for (int i = 0; i < heads * kStats; ++i) stats[i] = A(0);
    } else {
      Task<A>& task = tasks[waiting];
      task.run = reader.run(scratch, 2 * waiting, span, b, int(head));
      task.max_s = maximum(task.run.student, task.run.size, heads);
      task.max_t =
          needs_max_t ? maximum(task.run.teacher, task.run.size, heads) : Pair<A>{A(0), A(0)};
      for (int i = 0; i < heads; ++i) {
        const int64_t target = target_of(rows, span, b, int(head) + i);
        task.target[i] = target < 0 ? -1 : target - span.begin;
      }
      task.count = span.count;
      task.row = row;
      ++waiting;
    }
    if (waiting == most || (waiting > 0 && row + heads == 2 * last)) {
      for (Task<A>* task = tasks; task < tasks + waiting; ++task) {
        task->lines = lines_of(scales, mode, task->max_s, task->max_t, heads);
        add_up_of<A>(mode, task->lines.far)(task->run, task->lines, task->sums);
      }
      finish_tasks(tasks, waiting, mode, rows, out);
      waiting = 0;
    }
  }
}

// The gradient of one call: written in place where it is plain, else through a copy.
template <class A>
class Writer {
 public:
  Writer(const Rows& rows, const BackwardArgs& args, int heads)
      : grad_{{args.grad[0], args.grad[1]},
              {args.grad_stride_b[0], args.grad_stride_b[1]},
              {args.grad_stride_l[0], args.grad_stride_l[1]},
              rows.student.type},
        heads_(heads) {
    plain_ = grad_.type == (sizeof(A) == 4 ? Type::f32 : Type::f64) &&
             (heads == 2 ? is_interleaved(grad_)
                         : grad_.stride_l[0] == 1 && grad_.stride_l[1] == 1);
  }

  A* place(Scratch<A>& scratch, const Span& span, int64_t b, int head) const {
    if (!plain_) return scratch.part(2);
    return static_cast<A*>(const_cast<void*>(element(grad_, head, b, span.begin)));
  }

  void finish(A* slopes, const Span& span, int64_t b, int head) const {
    if (span.mask != nullptr) Reader<A>::fill_gaps(slopes, span, heads_, A(0));
    if (plain_) return;
    const int64_t size = span.end - span.begin;
    void* to = const_cast<void*>(element(grad_, head, b, span.begin));
    if (heads_ == 2 && is_interleaved(grad_)) {
      return scatter(slopes, 1, 2 * size, to, grad_.type, 1);
    }
    scatter(slopes, heads_, size, to, grad_.type, grad_.stride_l[head]);
    if (heads_ == 2) {
      to = const_cast<void*>(element(grad_, 1, b, span.begin));
      scatter(slopes + 1, 2, size, to, grad_.type, grad_.stride_l[1]);
    }
  }

  void clear(int64_t b, int64_t begin, int64_t end) const {
    const int64_t bytes = bytes_of(grad_.type);
    for (int head = 0; head < 2; ++head) {
      char* to = static_cast<char*>(const_cast<void*>(element(grad_, head, b, 0)));
      for (int64_t i = begin; i < end; ++i) memset(to + i * grad_.stride_l[head] * bytes, 0, bytes);
    }
  }

 private:
  Logits grad_;
  int heads_;
  bool plain_;
};

template <class A>
void backward_windows(const Rows& rows, const BackwardArgs& args, int64_t first, int64_t last) {
  const Scales<A> scales = scales_of<A>(rows.temperature, rows.weight, rows.soft_scale, rows.kind);
  const auto wide = scales_of<double>(rows.temperature, rows.weight, rows.soft_scale, rows.kind);
  const int mode = backward_mode(rows);
  const Reader<A> reader(rows, mode != kHard);
  const int heads = reader.heads();
  const Writer<A> writer(rows, args, heads);
  Scratch<A> scratch(3, heads * rows.length);
  for (int64_t b = first; b < last; ++b) {
    const Span span = span_of(rows, b);
    if (span.begin > 0) writer.clear(b, 0, span.begin);
    if (span.end < rows.length) writer.clear(b, span.end, rows.length);
    if (span.count == 0) continue;
    const A* row_stats = static_cast<const A*>(args.row_stats) + b * 2 * kStats;
    const A* gradient =
        static_cast<const A*>(args.grad_row_loss) + b * args.grad_row_loss_stride_b;
    for (int head = 0; head < 2; head += heads) {
      Pair<A> max_s{}, max_t{};
      RowSlopes<A> slopes[2];
      int64_t target[2] = {-1, -1};
      for (int i = 0; i < heads; ++i) {
        double stats[kStats];
        for (int k = 0; k < kStats; ++k) stats[k] = row_stats[(head + i) * kStats + k];
        max_s.of[i] = row_stats[(head + i) * kStats + kMaxS];
        max_t.of[i] = row_stats[(head + i) * kStats + kMaxT];
        target[i] = target_of(rows, span, b, head + i);
        const double of_row = gradient[(head + i) * args.grad_row_loss_stride_h];
        const RowSlopes<double> s = slopes_of(wide, stats, of_row, rows.kind, target[i] >= 0);
        slopes[i] = {A(s.student), A(s.teacher), A(s.hard), A(s.target)};
      }
      if (heads == 1) max_s.of[1] = max_s.of[0], max_t.of[1] = max_t.of[0];
      const Lines<A> lines = lines_of(scales, mode, max_s, max_t, heads);
      const Run<A> run = reader.run(scratch, 0, span, b, head);
      A* place = writer.place(scratch, span, b, head);
      differentiate_of<A>(mode, lines.far)(run, lines, slopes, place);
      for (int i = 0; i < heads; ++i)
        if (target[i] >= 0) place[(target[i] - span.begin) * heads + i] -= slopes[i].target;
      writer.finish(place, span, b, head);
    }
  }
}

}  // namespace KD_ISA
}  // namespace kd
