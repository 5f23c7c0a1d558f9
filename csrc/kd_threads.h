// The threads that share out the windows of a call of kd_rows_cpu.cpp.
#pragma once

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

namespace kd {

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

  static inline Team* team_ = nullptr;
  std::mutex busy_, mutex_;
  std::condition_variable wake_, done_;
  Work work_ = nullptr;
  void* job_ = nullptr;
  int64_t windows_ = 0, share_ = 1;
  std::atomic<int64_t> next_{0};
  int hired_ = 0;
  std::atomic<int> wanted_{0}, working_{0};  // changed under mutex_, seen by who spins
};

}  // namespace kd
