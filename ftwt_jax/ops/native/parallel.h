// Work shared out among the threads of XLA's pool.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ftwt {

// About how many products take as long as waking another thread.
constexpr int64_t kWorthSharing = 500'000;

// Memory that a thread keeps from one call to the next, aligned to lines of the cache.
class Scratch {
  static constexpr int64_t kAlign = 64;

 public:
  float* of(int64_t count) {
    if (static_cast<int64_t>(memory_.size()) < count + kAlign) memory_.resize(count + kAlign);
    const auto address = reinterpret_cast<uintptr_t>(memory_.data());
    return reinterpret_cast<float*>((address + kAlign - 1) / kAlign * kAlign);
  }

 private:
  std::vector<float> memory_;
};

// Threads that help this one for a while. Waking one takes as long as a small layer, so they are requested early and
// wait for work without sleeping again. The calling thread does whatever work none of them has begun, so a pool whose
// threads are all busy elsewhere, or all wait like this one, cannot deadlock.
class Team {
 public:
  // `helpers`: at most this many; 0: none, and the calling thread does everything.
  Team(xla::ffi::ThreadPool& pool, int64_t helpers) : size_(1 + std::max<int64_t>(0, helpers)) {
    if (size_ == 1) return;
    work_ = std::make_shared<Work>();
    for (int64_t helper = 1; helper < size_; ++helper) {
      pool.Schedule([work = work_] {
        Wait wait;
        while (!work->closed.load(std::memory_order_acquire)) {
          if (!work->one()) wait.more();
        }
      });
    }
  }
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;
  ~Team() {
    if (work_) work_->closed.store(true, std::memory_order_release);
  }

  int64_t size() const { return size_; }

  // Runs body(0) ... body(tasks - 1), in any order, and returns when all are done.
  template <typename Body>
  void run(int64_t tasks, const Body& body) const {
    if (!work_ || tasks < 2 || tasks > static_cast<int64_t>(kMask)) {
      for (int64_t task = 0; task < tasks; ++task) body(task);
      return;
    }
    work_->call = [](const void* body, int64_t task) { (*static_cast<const Body*>(body))(task); };
    work_->body = &body;
    work_->done.store(0, std::memory_order_relaxed);
    const uint64_t round = (work_->next.load(std::memory_order_relaxed) >> 2 * kBits) + 1;
    work_->next.store(round << 2 * kBits | static_cast<uint64_t>(tasks) << kBits, std::memory_order_release);
    while (work_->one()) {
    }
    Wait wait;
    while (work_->done.load(std::memory_order_acquire) < tasks) wait.more();
  }

 private:
  static constexpr uint64_t kBits = 24, kMask = (uint64_t{1} << kBits) - 1;

  struct Wait {
    int turns = 0;
    void more() {
      if (++turns > 1000) std::this_thread::yield();
    }
  };

  struct Work {
    // Which round of work this is, how many tasks it has, and the next of them. A thread takes a task by adding one to
    // a number that holds all three, so none takes a task of a round that is over; and a round is not over until every
    // task that was taken is done, so what a task needs remains valid.
    std::atomic<uint64_t> next{0};
    std::atomic<int64_t> done{0};
    std::atomic<bool> closed{false};
    void (*call)(const void*, int64_t) = nullptr;
    const void* body = nullptr;

    // Does one task; false if there was none.
    bool one() {
      uint64_t seen = next.load(std::memory_order_acquire);
      for (;;) {
        const uint64_t task = seen & kMask, tasks = seen >> kBits & kMask;
        if (task >= tasks) return false;
        if (next.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel, std::memory_order_acquire)) {
          call(body, task);
          done.fetch_add(1, std::memory_order_release);
          return true;
        }
      }
    }
  };

  int64_t size_;
  std::shared_ptr<Work> work_;
};

}  // namespace ftwt
