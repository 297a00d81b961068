// The routed experts of some tokens as an operation of its own; see experts.h.

#include "experts.h"

#include <algorithm>
#include <cstdint>

namespace {

constexpr int64_t kGrain = 1 << 15;  // multiplications that a thread is woken for

}  // namespace

bool qwen3fast_quantized_experts(const BFloat16* x, const int64_t* expert, const Linear* gate_up, const Linear* down,
                                 BFloat16* y, int64_t N, int64_t C, int64_t threads) {
  RoutedExperts routed;
  if (!routed.plan(expert, N, C, *gate_up, *down)) return false;
  threads = std::clamp<int64_t>(N * C * down->K * gate_up->K / kGrain, 1, threads);
  in_threads(threads, [&](int thread, Barrier& barrier) {
    const auto row_of = [&](int64_t n) { return x + n * gate_up->K; };
    routed.run(row_of, *gate_up, *down, y, barrier, thread, barrier.threads);
  });
  return true;
}
