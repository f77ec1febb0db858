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

// Products that take as long as it takes to wake another thread, about.
constexpr int64_t kWorthSharing = 500000;

// Runs body(0) ... body(tasks - 1) on the threads of the pool and on this one. A task that no other thread has begun
// is done here, so a pool whose threads all wait like this one cannot stand still.
template <typename Body>
void in_parallel(xla::ffi::ThreadPool& pool, int64_t tasks, const Body& body) {
  struct State {
    const Body& body;
    const int64_t tasks;
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> done{0};
    State(const Body& body, int64_t tasks) : body(body), tasks(tasks) {}
    void work() {
      for (int64_t task; (task = next.fetch_add(1)) < tasks;) {
        body(task);
        done.fetch_add(1, std::memory_order_release);
      }
    }
  };
  auto state = std::make_shared<State>(body, tasks);
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), tasks) - 1;
  for (int64_t helper = 0; helper < helpers; ++helper) pool.Schedule([state] { state->work(); });
  state->work();
  for (int spins = 0; state->done.load(std::memory_order_acquire) < tasks; ++spins) {
    if (spins > 1000) std::this_thread::yield();
  }
}

}  // namespace ftwt
