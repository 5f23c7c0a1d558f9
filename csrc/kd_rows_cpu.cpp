// CPU rows: which instruction set, and which thread takes which windows.
#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <thread>

#include "kd_isa.h"

namespace kd {

namespace {

const IsaRows& rows_for(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::avx512) return kAvx512Rows;
  if (isa == Isa::avx2) return kAvx2Rows;
#endif
  return kPortableRows;
}

// Looks again and again for a while, because going to sleep and being woken takes a thread longer
// than backward usually follows forward by.
template <class Condition>
void spin_until(Condition condition) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(100);
  while (!condition() && std::chrono::steady_clock::now() < end) {
#if defined(__x86_64__)
    for (int i = 0; i < 8; ++i) __builtin_ia32_pause();
#endif
  }
}

// Threads that wait for windows to share out. Not OpenMP: a second OpenMP beside torch's would
// double the threads, and none survives a fork, after which a DataLoader's worker would hang.
// One job at a time; a caller that finds the team busy works alone. Never destroyed, because its
// threads sleep in it until the process ends.
class Team {
 public:
  using Work = void (*)(void* job, int64_t first, int64_t last);

  static Team& get() {
    static std::once_flag once;
    std::call_once(once, [] {
      team_ = new Team;
      // A child has none of its parent's threads. The parent's team stays behind, unused.
      pthread_atfork(nullptr, nullptr, [] { team_ = new Team; });
    });
    return *team_;
  }

  void run(Work work, void* job, int64_t windows, int threads) {
    std::unique_lock<std::mutex> alone(busy_, std::try_to_lock);
    if (!alone.owns_lock()) return work(job, 0, windows);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      // Small enough shares for the threads to end together, whenever each of them woke up.
      share_ = windows / (8 * int64_t(threads)) + 1;
      work_ = work;
      job_ = job;
      windows_ = windows;
      next_.store(0);
      wanted_ = threads - 1;
      while (hired_ < wanted_ && hire()) ++hired_;
    }
    wake_.notify_all();
    take_shares();
    std::unique_lock<std::mutex> lock(mutex_);
    wanted_ = 0;  // who has not woken up by now need not
    lock.unlock();
    spin_until([this] { return working_ == 0; });
    lock.lock();
    done_.wait(lock, [this] { return working_ == 0; });
  }

 private:
  bool hire() {
    try {
      std::thread([this] { serve(); }).detach();
      return true;
    } catch (const std::exception&) {  // no more threads to be had: fewer do
      return false;
    }
  }

  void serve() {
    for (;;) {
      spin_until([this] { return wanted_ > 0; });
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [this] { return wanted_ > 0; });
      --wanted_;
      ++working_;
      lock.unlock();
      take_shares();
      lock.lock();
      if (--working_ == 0) done_.notify_one();
    }
  }

  void take_shares() {
    for (;;) {
      const int64_t first = next_.fetch_add(share_);
      if (first >= windows_) return;
      const int64_t last = first + share_ < windows_ ? first + share_ : windows_;
      work_(job_, first, last);
    }
  }

  static Team* team_;
  std::mutex busy_, mutex_;
  std::condition_variable wake_, done_;
  Work work_ = nullptr;
  void* job_ = nullptr;
  int64_t windows_ = 0, share_ = 1;
  std::atomic<int64_t> next_{0};
  int hired_ = 0;
  std::atomic<int> wanted_{0}, working_{0};  // changed under mutex_, seen by who spins
};

Team* Team::team_ = nullptr;

// Waking a thread costs as much as some ten thousand elements take.
constexpr int64_t kElementsPerThread = 64 * 1024;

// What the threads share out: the windows of `rows`, forward or backward.
template <class Out>
struct Job {
  void (*compute)(const Rows&, const Out&, int64_t first, int64_t last);
  const Rows& rows;
  const Out& out;
  std::atomic<bool> lacks_memory{false};

  static void work(void* given, int64_t first, int64_t last) {
    Job& job = *static_cast<Job*>(given);
    try {
      job.compute(job.rows, job.out, first, last);
    } catch (const NoMemory&) {  // it must not leave the thread
      job.lacks_memory = true;
    }
  }
};

// A window is computed by one thread from beginning to end, so that the threads change no bit.
template <class Out>
void share_out(Job<Out>&& job, int threads) {
  const Rows& rows = job.rows;
  const int64_t most = rows.batch * rows.length / (kElementsPerThread / 2) + 1;
  if (threads > most) threads = int(most);
  if (threads > rows.batch) threads = int(rows.batch);
  if (threads <= 1) {
    Job<Out>::work(&job, 0, rows.batch);
  } else {
    Team::get().run(Job<Out>::work, &job, rows.batch, threads);
  }
  if (job.lacks_memory) throw std::bad_alloc();
}

}  // namespace

bool has_isa(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::avx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           has_isa(Isa::avx2);
  }
  if (isa == Isa::avx2) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
  }
#endif
  return isa == Isa::portable;
}

Isa best_isa() {
  static const Isa best = has_isa(Isa::avx512) ? Isa::avx512
                          : has_isa(Isa::avx2) ? Isa::avx2
                                               : Isa::portable;
  return best;
}

void forward_cpu(const Rows& rows, const ForwardOut& out, int threads, Isa isa) {
  const IsaRows& chosen = rows_for(isa == Isa::best ? best_isa() : isa);
  share_out(Job<ForwardOut>{chosen.forward, rows, out}, threads);
}

void backward_cpu(const Rows& rows, const BackwardArgs& args, int threads, Isa isa) {
  const IsaRows& chosen = rows_for(isa == Isa::best ? best_isa() : isa);
  share_out(Job<BackwardArgs>{chosen.backward, rows, args}, threads);
}

}  // namespace kd
