// Tokens from logits, without the rest of a step: see sampler.h.

#include "sampler.h"

void qwen3fast_sample(const float* logits, const Sampling* sampling, int64_t* token, int64_t M, int64_t V,
                      int64_t threads) {
  Sampler sampler(V, threads, !sampling);
  Barrier barrier;
#pragma omp parallel num_threads(threads)
  {
#pragma omp single
    barrier.threads = omp_get_num_threads();  // OpenMP may give fewer than asked for
    const int thread = omp_get_thread_num(), count = omp_get_num_threads();
    for (int64_t m = 0; m < M; m++) {
      const int64_t chosen = sampler.choose(logits + m * V, sampling, m, barrier, thread, count);
      if (thread == 0) token[m] = chosen;
    }
  }
}
