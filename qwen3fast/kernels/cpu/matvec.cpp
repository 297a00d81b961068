// matvec(x, weight) -> y      y[m, n] = sum_k x[m, k] weight[n, k], bfloat16, for few rows m: streams the weight once
//
// Sums are in float32. The plain PyTorch form is in kernels/linear.py.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>

#include "vec.h"

namespace {

// Rows n0..n1 of the weight, kRows at a time (each has its own accumulators, so that additions overlap).
template <int M, int kRows>
void matvec_rows(const at::BFloat16* x, const at::BFloat16* weight, at::BFloat16* y, int64_t n0, int64_t n1, int64_t N,
                 int64_t K) {
  for (int64_t n = n0; n < n1; n += kRows) {
    const int rows = static_cast<int>(std::min<int64_t>(kRows, n1 - n));
    const at::BFloat16* w[kRows];
    for (int r = 0; r < kRows; r++) w[r] = weight + (n + std::min(r, rows - 1)) * K;
    Vec total[kRows][M] = {};
    int64_t k = 0;
    for (; k + 2 * kLanes <= K; k += 2 * kLanes) {
      Bits xs[M];
      for (int m = 0; m < M; m++) xs[m] = load_as<Bits>(x + m * K + k);
      for (int r = 0; r < kRows; r++) {
        // The hardware prefetcher stops at page borders; asking for the rows after these keeps memory busy.
        __builtin_prefetch(w[r] + k + kRows * K);
        const Bits ws = load_as<Bits>(w[r] + k);
        for (int m = 0; m < M; m++) total[r][m] = dot2(total[r][m], ws, xs[m]);
      }
    }
    for (; k < K; k += kLanes)
      for (int r = 0; r < kRows; r++)
        for (int m = 0; m < M; m++) total[r][m] += load(w[r] + k) * load(x + m * K + k);
    for (int r = 0; r < rows; r++)
      for (int m = 0; m < M; m++) y[m * N + n + r] = static_cast<at::BFloat16>(sum(total[r][m]));
  }
}

// x: (..., K), M rows in all; weight: (N, K) contiguous; both bfloat16. Returns (..., N).
at::Tensor matvec(const at::Tensor& x, const at::Tensor& weight) {
  const int64_t N = weight.size(0), K = weight.size(1), M = x.numel() / K;
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 && weight.scalar_type() == at::kBFloat16, "matvec: bfloat16 only");
  TORCH_CHECK(weight.is_contiguous() && x.size(-1) == K, "matvec: weight (N, K) contiguous, x (..., K)");
  TORCH_CHECK(K % kLanes == 0 && M >= 1 && M <= 8, "matvec: K a multiple of 16, 1 to 8 rows");
  auto shape = x.sizes().vec();
  shape.back() = N;
  at::Tensor y = at::empty(shape, x.options());
  const at::Tensor x_contiguous = x.contiguous();
  const auto* xp = x_contiguous.const_data_ptr<at::BFloat16>();
  const auto* w = weight.const_data_ptr<at::BFloat16>();
  auto* out = y.mutable_data_ptr<at::BFloat16>();
  at::parallel_for(0, N, std::max<int64_t>(64, 16384 / K), [&](int64_t n0, int64_t n1) {
    switch (M) {
      case 1: return matvec_rows<1, 8>(xp, w, out, n0, n1, N, K);
      case 2: return matvec_rows<2, 6>(xp, w, out, n0, n1, N, K);
      case 3: return matvec_rows<3, 4>(xp, w, out, n0, n1, N, K);
      case 4: return matvec_rows<4, 4>(xp, w, out, n0, n1, N, K);
      case 5: return matvec_rows<5, 3>(xp, w, out, n0, n1, N, K);
      case 6: return matvec_rows<6, 3>(xp, w, out, n0, n1, N, K);
      case 7: return matvec_rows<7, 2>(xp, w, out, n0, n1, N, K);
      case 8: return matvec_rows<8, 2>(xp, w, out, n0, n1, N, K);
    }
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(qwen3fast, library) { library.def("matvec(Tensor x, Tensor weight) -> Tensor"); }

TORCH_LIBRARY_IMPL(qwen3fast, CPU, library) { library.impl("matvec", &matvec); }
