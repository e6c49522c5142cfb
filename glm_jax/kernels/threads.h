// Work that the threads of an XLA call take a piece at a time.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace glm_jax {

// Derive from it: `Prepare()` runs once, while helpers wake up; `Run(first, last)` computes items.
struct Work {
  virtual ~Work() = default;
  virtual void Prepare() {}
  virtual void Run(int64_t first, int64_t last) = 0;

  int64_t count = 0, piece = 1;

  void TakePieces() {
    while (!is_prepared_.load(std::memory_order_acquire)) std::this_thread::yield();
    for (int64_t first; (first = next_.fetch_add(piece)) < count;) {
      const int64_t last = std::min(first + piece, count);
      Run(first, last);
      finished_.fetch_add(last - first, std::memory_order_release);
    }
  }

  void PrepareAndFinish() {
    Prepare();
    is_prepared_.store(true, std::memory_order_release);
    TakePieces();
    // A helper that has not started by now finds nothing left: only pieces count.
    while (finished_.load(std::memory_order_acquire) < count) std::this_thread::yield();
  }

 private:
  std::atomic<bool> is_prepared_{false};
  std::atomic<int64_t> next_{0}, finished_{0};
};

// Runs `work` on the calling thread and, if it `is_large`, on the pool's others.
inline void RunOnThreads(xla::ffi::ThreadPool pool, std::shared_ptr<Work> work, bool is_large) {
  const int64_t helpers = is_large ? pool.num_threads() - 1 : 0;
  // Small pieces even out threads that start late.
  work->piece = std::max<int64_t>(1, work->count / (8 * (helpers + 1)));
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([work] { work->TakePieces(); });
  work->PrepareAndFinish();
}

// `run(i)` for all i below `count`, on all threads. What `run` holds lives until helpers that start
// late have seen that nothing is left.
template <class F>
void ForEach(xla::ffi::ThreadPool pool, int64_t count, F run) {
  struct Items : Work {
    F run;
    explicit Items(F run) : run(run) {}
    void Run(int64_t first, int64_t last) override {
      for (int64_t i = first; i < last; ++i) run(i);
    }
  };
  auto items = std::make_shared<Items>(run);
  items->count = count;
  RunOnThreads(pool, items, true);
}

}  // namespace glm_jax
