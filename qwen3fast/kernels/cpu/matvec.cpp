// matvec(x, weight) -> y      y[m, n] = sum_k x[m, k] weight[n, k], bfloat16, for few rows m: streams the weight once
//
// Sums are in float32. The plain PyTorch form is in kernels/linear.py.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>

#include "ops.h"
#include "products.h"

// x: (..., K), M rows in all; weight: (N, K) contiguous; both bfloat16. Returns (..., N).
at::Tensor qwen3fast::matvec(const at::Tensor& x, const at::Tensor& weight) {
  const int64_t N = weight.size(0), K = weight.size(1), M = x.numel() / K;
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 && weight.scalar_type() == at::kBFloat16, "matvec: bfloat16 only");
  TORCH_CHECK(weight.is_contiguous() && x.size(-1) == K, "matvec: weight (N, K) contiguous, x (..., K)");
  TORCH_CHECK(K % kLanes == 0 && M >= 1 && M <= 8, "matvec: K a multiple of 16, 1 to 8 rows");
  auto shape = x.sizes().vec();
  shape.back() = N;
  at::Tensor y = x.new_empty(shape);
  const at::Tensor x_contiguous = x.contiguous();
  const auto* xp = x_contiguous.const_data_ptr<at::BFloat16>();
  const auto* w = weight.const_data_ptr<at::BFloat16>();
  auto* out = y.mutable_data_ptr<at::BFloat16>();
  at::parallel_for(0, N, std::max<int64_t>(64, 16384 / K), [&](int64_t n0, int64_t n1) {
    matvec_rows(xp, M, w, out, n0, n1, N, K);
  });
  return y;
}
