// quantized_linear(x, packed[], scale[]) -> y      y[m, n] = sum_k x[m, k] weight[n, k], weight in 8 or 4 bits
//
// Several weights with the same input (query, key and value; gate and up) go in one call: x is rounded once, threads are
// woken once, and y holds their results side by side.
//
// A weight is stored for streaming: 16 rows side by side, four neighbouring channels of a row in one 32-bit lane.
// Bytes are unsigned (128 or 8 stands for zero), as x86's dot product of unsigned and signed bytes wants them.
//
//   8 bits   packed (N/16, K/4, 16, 4) uint8: one channel a byte.          scale (N,) float32
//   4 bits   packed (N/16, K/8, 16, 4) uint8: channels 8j+i (low half      scale (N/16, K/32, 16) bfloat16
//            of byte i) and 8j+4+i (high half).
//
// Activations are rounded to 8 bits in groups of 32 channels, each group with a scale of its own. Products are summed
// in integers within a group and in float32 over groups, in the same order for any number of rows: a row's result does
// not depend on the rows beside it. The plain PyTorch form, which does
// not round the activations, is in quantization/linear.py.
//
// quantized_rows(packed, scale, row) -> y      y[r, k] = weight[row[r], k]: a token embedding in the same layout.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "ops.h"
#include "products.h"

namespace {

Activations quantize(const at::BFloat16* x, int64_t M, int64_t K, int32_t zero) {
  const int64_t G = K / kGroup;
  Activations a{std::vector<int8_t>(M * K), std::vector<float>(M * G), std::vector<int32_t>(M * G)};
  at::parallel_for(0, M, 16, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; m++)
      quantize_row(x + m * K, K, zero, &a.bytes[m * K], &a.scale[m * G], &a.offset[m * G]);
  });
  return a;
}

template <int kBits>
void product(const at::BFloat16* x, int64_t M, const std::vector<Weight>& weights, int64_t width, int64_t K) {
  const Activations a = quantize(x, M, K, kBits == 8 ? 128 : 8);
  // Few rows: one stream through memory. Many rows: two blocks at a time share the loads of x.
  const int64_t step = M > 8 ? 2 : 1, blocks = width / kLanes;
  at::parallel_for(0, blocks, std::max<int64_t>(1, 32768 / (K * kLanes)), [&](int64_t begin, int64_t end) {
    int64_t first = 0;  // block of this weight
    for (const Weight& weight : weights) {
      const int64_t last = std::min(end - first, weight.blocks);
      int64_t block = std::max<int64_t>(begin - first, 0);
      for (; block + step <= last; block += step)
        step == 2 ? rows<kBits, 2>(a, M, weight, block, width, K) : rows<kBits, 1>(a, M, weight, block, width, K);
      for (; block < last; block++) rows<kBits, 1>(a, M, weight, block, width, K);
      first += weight.blocks;
    }
  });
}

}  // namespace

// packed and scale of one weight, as above; row: (R,) int64. Returns (R, K) bfloat16.
at::Tensor qwen3fast::quantized_rows(const at::Tensor& packed, const at::Tensor& scale, const at::Tensor& row) {
  const bool is_8_bits = scale.dim() == 1;
  const at::Tensor numbers = row.contiguous();
  TORCH_CHECK(packed.dim() == 4 && packed.is_contiguous() && packed.scalar_type() == at::kByte && scale.is_contiguous() &&
                  scale.scalar_type() == (is_8_bits ? at::kFloat : at::kBFloat16) && row.scalar_type() == at::kLong,
              "quantized_rows: packed and scale of one weight, row int64");
  const int64_t R = row.numel(), N = packed.size(0) * kLanes, K = packed.size(1) * (is_8_bits ? 4 : 8);
  at::Tensor y = scale.new_empty({R, K}, at::kBFloat16);
  auto* out = y.mutable_data_ptr<at::BFloat16>();
  for (int64_t r = 0; r < R; r++) {
    const int64_t n = numbers.const_data_ptr<int64_t>()[r];
    TORCH_CHECK(n >= 0 && n < N, "quantized_rows: row ", n, " of ", N);
    const int64_t block = n / kLanes, lane = n % kLanes;
    const uint8_t* bytes = packed.const_data_ptr<uint8_t>() + (block * packed.size(1) * kLanes + lane) * 4;
    for (int64_t k = 0; k < K; k++) {
      float value;
      if (is_8_bits) {
        value = (bytes[k / 4 * kLanes * 4 + k % 4] - 128) * scale.const_data_ptr<float>()[n];
      } else {
        const uint8_t both = bytes[k / 8 * kLanes * 4 + k % 4];
        const int64_t group = (block * (K / kGroup) + k / kGroup) * kLanes + lane;
        value = ((k % 8 < 4 ? both & 15 : both >> 4) - 8) * float(scale.const_data_ptr<at::BFloat16>()[group]);
      }
      out[r * K + k] = static_cast<at::BFloat16>(value);
    }
  }
  return y;
}

// x: (..., K) bfloat16; packed and scale of each weight as above, all in the same number of bits. Returns (..., N)
// bfloat16, N the rows of all weights.
at::Tensor qwen3fast::quantized_linear(const at::Tensor& x, at::TensorList packed, at::TensorList scale) {
  TORCH_CHECK(!packed.empty() && packed.size() == scale.size(), "quantized_linear: a scale for each weight");
  const bool is_8_bits = scale[0].dim() == 1;
  const int64_t K = x.size(-1);
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 && K % kGroup == 0,
              "quantized_linear: x (..., K) bfloat16, K a multiple of 32");
  int64_t N = 0;
  for (size_t i = 0; i < packed.size(); i++) {
    const at::Tensor &p = packed[i], &s = scale[i];
    TORCH_CHECK(p.dim() == 4 && p.size(1) == K / (is_8_bits ? 4 : 8) && p.size(2) == kLanes && p.size(3) == 4 &&
                    p.is_contiguous() && p.scalar_type() == at::kByte,
                "quantized_linear: packed (N/16, K/4 or K/8, 16, 4) uint8, contiguous, x (..., K)");
    const int64_t rows = p.size(0) * kLanes;
    TORCH_CHECK(s.is_contiguous() && s.scalar_type() == (is_8_bits ? at::kFloat : at::kBFloat16) &&
                    s.numel() == (is_8_bits ? rows : rows * K / kGroup),
                "quantized_linear: scale (N,) float32 for 8 bits, (N/16, K/32, 16) bfloat16 for 4");
    N += rows;
  }
  auto shape = x.sizes().vec();
  shape.back() = N;
  at::Tensor y = x.new_empty(shape);
  std::vector<Weight> weights;
  auto* out = y.mutable_data_ptr<at::BFloat16>();
  for (size_t i = 0; i < packed.size(); i++) {
    const int64_t blocks = packed[i].size(0);
    weights.push_back({packed[i].const_data_ptr<uint8_t>(), scale[i].const_data_ptr(), blocks, out});
    out += blocks * kLanes;
  }
  const at::Tensor x_contiguous = x.contiguous();
  (is_8_bits ? product<8> : product<4>)(x_contiguous.const_data_ptr<at::BFloat16>(), x.numel() / K, weights, N, K);
  return y;
}
