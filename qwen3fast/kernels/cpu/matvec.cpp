// Products of 1 to 8 rows with a bfloat16 weight: streams the weight once. Sums are in float32; the plain PyTorch form is
// in kernels/linear.py.

#include <algorithm>
#include <cstdint>

#include "ops.h"
#include "parallel.h"
#include "products.h"

namespace {

// Rows n0..n1 of the weight, one after another: each thread reads memory in one stream, which some processors need for
// their full speed. Two sums for each result, so that additions overlap.
template <int M>
void matvec_rows(const BFloat16* x, const BFloat16* weight, BFloat16* y, int64_t n0, int64_t n1, int64_t N, int64_t K) {
  for (int64_t n = n0; n < n1; n++) {
    const BFloat16* w = weight + n * K;
    Vec total[M][2] = {};
    int64_t k = 0;
    for (; k + 4 * kLanes <= K; k += 4 * kLanes) {
      for (int half = 0; half < 2; half++) {
        const int64_t i = k + half * 2 * kLanes;
        __builtin_prefetch(reinterpret_cast<const char*>(w + i) + kAhead, 0, kIntoL2);
        const Bits ws = load_as<Bits>(w + i);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) total[m][half] = dot2(total[m][half], ws, load_as<Bits>(x + m * K + i));
      }
    }
    for (; k < K; k += kLanes)
      for (int m = 0; m < M; m++) total[m][0] += load(w + k) * load(x + m * K + k);
    for (int m = 0; m < M; m++) y[m * N + n] = BFloat16(sum(total[m][0] + total[m][1]));
  }
}

}  // namespace

void matvec_rows(const BFloat16* x, int64_t M, const BFloat16* weight, BFloat16* y, int64_t n0, int64_t n1, int64_t N,
                 int64_t K) {
  switch (M) {
    case 1: return matvec_rows<1>(x, weight, y, n0, n1, N, K);
    case 2: return matvec_rows<2>(x, weight, y, n0, n1, N, K);
    case 3: return matvec_rows<3>(x, weight, y, n0, n1, N, K);
    case 4: return matvec_rows<4>(x, weight, y, n0, n1, N, K);
    case 5: return matvec_rows<5>(x, weight, y, n0, n1, N, K);
    case 6: return matvec_rows<6>(x, weight, y, n0, n1, N, K);
    case 7: return matvec_rows<7>(x, weight, y, n0, n1, N, K);
    case 8: return matvec_rows<8>(x, weight, y, n0, n1, N, K);
  }
}

void qwen3fast_matvec(const BFloat16* x, const BFloat16* weight, BFloat16* y, int64_t M, int64_t N, int64_t K,
                      int64_t threads) {
  parallel_for(N, std::max<int64_t>(64, 16384 / K), threads,
               [&](int64_t n0, int64_t n1) { matvec_rows(x, M, weight, y, n0, n1, N, K); });
}
