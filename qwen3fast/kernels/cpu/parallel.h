// Work shared out over threads.

#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>

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
