// Work shared by threads.

#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>

// Runs work(begin, end) on parts of 0..count, in as many threads as have at least `grain` things to do.
template <typename Work>
void parallel_for(int64_t count, int64_t grain, int64_t threads, const Work& work) {
  threads = std::min(threads, (count + grain - 1) / grain);
  if (threads <= 1) return work(int64_t{0}, count);
#pragma omp parallel num_threads(threads)
  {
    const int64_t thread = omp_get_thread_num(), given = omp_get_num_threads();  // may be fewer than asked for
    work(count * thread / given, count * (thread + 1) / given);
  }
}

// Where threads wait for each other.
struct Barrier {
  int threads = 1;
  alignas(64) std::atomic<int> arrived{0};
  alignas(64) std::atomic<int> round{0};

  void wait() {
    const int current = round.load(std::memory_order_relaxed);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      arrived.store(0, std::memory_order_relaxed);
      round.store(current + 1, std::memory_order_release);
      return;
    }
    for (int64_t spins = 0; round.load(std::memory_order_acquire) == current; spins++) {
#ifdef __x86_64__
      __builtin_ia32_pause();
#endif
      if (spins > 20000) std::this_thread::yield();  // another program has the processor of a thread waited for
    }
  }
};
