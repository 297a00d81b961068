// Tokens from logits, without the rest of a step: see sampler.h.

#include "sampler.h"

void qwen3fast_sample(const float* logits, const Sampling* sampling, int64_t* token, int64_t M, int64_t V,
                      int64_t threads) {
  Sampler sampler(V, threads, !sampling);
  in_threads(threads, [&](int thread, Barrier& barrier) {
    for (int64_t m = 0; m < M; m++) {
      const int64_t chosen = sampler.choose(logits + m * V, sampling, m, barrier, thread, barrier.threads);
      if (thread == 0) token[m] = chosen;
    }
  });
}
