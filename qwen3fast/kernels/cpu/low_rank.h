// Products of LoRA adapters, added to the output of a linear layer. The plain form is kernels/low_rank.py.

#pragma once

#include <cstdint>

#include "ops.h"
#include "vec.h"

namespace {

// low[r] = sum_k a[r, k] x[k] for `count` rows r.
template <int count>
inline void low_dots(const BFloat16* a, const BFloat16* x, int64_t K, float* low) {
  Vec sums[count] = {};
  for (int64_t k = 0; k < K; k += kLanes) {
    const Vec xs = load(x + k);
    for (int r = 0; r < count; r++) sums[r] += load(a + r * K + k) * xs;
  }
  for (int r = 0; r < count; r++) low[r] = sum(sums[r]);
}

// y[m, n] += (B A x[m])[n] for columns n0..n1, with the matrices of each row's slot; slot 0 adds nothing. K, N, n0 and n1
// are multiples of 16. `width` is the distance between two rows of y. low: room for `rank` numbers.
inline void add_low_rank(const LowRank& w, const Adapters& adapters, const BFloat16* x, int64_t M, int64_t N, int64_t K,
                         int64_t n0, int64_t n1, BFloat16* y, int64_t width, float* low) {
  const int64_t R = adapters.rank;
  for (int64_t m = 0; n0 < n1 && m < M; m++) {
    const int64_t slot = adapters.slot[m];
    if (slot == 0) continue;
    const BFloat16 *a = w.a + slot * R * K, *b = w.b + slot * R * N;
    int64_t r = 0;
    for (; r + 4 <= R; r += 4) low_dots<4>(a + r * K, x + m * K, K, low + r);
    for (; r < R; r++) low_dots<1>(a + r * K, x + m * K, K, low + r);
    for (int64_t n = n0; n < n1; n += kLanes) {
      Vec added = {};
      for (int64_t r = 0; r < R; r++) added += load(b + r * N + n) * low[r];
      store(y + m * width + n, load(y + m * width + n) + added);
    }
  }
}

}  // namespace
