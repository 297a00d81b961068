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

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "vec.h"

namespace {

constexpr int64_t kGroup = 32;  // channels that share a scale

// In every lane: total + the dot product of four unsigned bytes of `weight` with four signed bytes of `x`.
inline Ints dot4(Ints total, Bits weight, int32_t x) {
#if defined(__AVX512VNNI__)
  return (Ints)_mm512_dpbusd_epi32((__m512i)total, (__m512i)weight, _mm512_set1_epi32(x));
#elif defined(__AVX2__)
  // Even and odd bytes apart, as 16-bit numbers: the byte instruction of AVX2 saturates.
  const Bits even = weight & 0x00ff00ffu, odd = (weight >> 8) & 0x00ff00ffu;
  const auto byte = [x](int i) { return static_cast<uint16_t>(static_cast<int8_t>(x >> (8 * i))); };
  const __m256i x_even = _mm256_set1_epi32(byte(0) | byte(2) << 16), x_odd = _mm256_set1_epi32(byte(1) | byte(3) << 16);
  __m256i halves[2], e[2], o[2];
  std::memcpy(halves, &total, sizeof total);
  std::memcpy(e, &even, sizeof even);
  std::memcpy(o, &odd, sizeof odd);
  for (int i = 0; i < 2; i++)
    halves[i] = _mm256_add_epi32(
        halves[i], _mm256_add_epi32(_mm256_madd_epi16(e[i], x_even), _mm256_madd_epi16(o[i], x_odd)));
  return load_as<Ints>(halves);
#else
  for (int i = 0; i < 4; i++) total += (Ints)((weight >> (8 * i)) & 255u) * static_cast<int8_t>(x >> (8 * i));
  return total;
#endif
}

// ----------------------------------------------------------------------------------------------------- activations

// Rows of x in 8 bits: value = scale * byte, a scale for each group. `offset` is what the weights' zero adds to a sum.
struct Activations {
  std::vector<int8_t> bytes;
  std::vector<float> scale;
  std::vector<int32_t> offset;
};

void quantize_row(const at::BFloat16* x, int64_t K, int32_t zero, int8_t* bytes, float* scale, int32_t* offset) {
  for (int64_t g = 0; g < K / kGroup; g++) {
    const Vec low = load(x + g * kGroup), high = load(x + g * kGroup + kLanes);
    const Vec low_size = low < 0 ? -low : low, high_size = high < 0 ? -high : high;
    const Vec size = low_size > high_size ? low_size : high_size;
    const Vec poison = low * 0 + high * 0;  // NaN where x is NaN or infinite, which a maximum may lose
    float largest = 0, poisoned = 0;
    for (int64_t i = 0; i < kLanes; i++) {
      largest = size[i] > largest ? size[i] : largest;
      poisoned += poison[i];
    }
    const float to_bytes = largest > 0 ? 127.f / largest : 0.f;
    scale[g] = largest / 127.f + poisoned;
    // Adding and subtracting 1.5 * 2^23 rounds to the nearest integer, halves to even.
    constexpr float kRound = 12582912.f;
    const Ints a = __builtin_convertvector(low * to_bytes + kRound - kRound, Ints);
    const Ints b = __builtin_convertvector(high * to_bytes + kRound - kRound, Ints);
    int32_t sum = 0;
    for (int64_t i = 0; i < kLanes; i++) {
      bytes[g * kGroup + i] = static_cast<int8_t>(a[i]);
      bytes[g * kGroup + kLanes + i] = static_cast<int8_t>(b[i]);
      sum += a[i] + b[i];
    }
    offset[g] = -zero * sum;
  }
}

Activations quantize(const at::BFloat16* x, int64_t M, int64_t K, int32_t zero) {
  const int64_t G = K / kGroup;
  Activations a{std::vector<int8_t>(M * K), std::vector<float>(M * G), std::vector<int32_t>(M * G)};
  at::parallel_for(0, M, 16, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; m++)
      quantize_row(x + m * K, K, zero, &a.bytes[m * K], &a.scale[m * G], &a.offset[m * G]);
  });
  return a;
}

// --------------------------------------------------------------------------------------------------------- product

struct Weight {
  const uint8_t* packed;
  const void* scale;
  int64_t blocks;  // of 16 rows
  at::BFloat16* y;  // where its columns of the result begin
};

// kM rows of x times kBlocks blocks of 16 weight rows. `width` is the distance between two rows of y.
template <int kBits, int kM, int kBlocks>
void tile(const Activations& x, int64_t m0, const Weight& weight, int64_t block, int64_t width, int64_t K) {
  constexpr int64_t kGroupBytes = kGroup * kLanes * kBits / 8;
  constexpr int64_t kAhead = 4096;  // bytes; the hardware prefetcher stops at page borders
  const int64_t G = K / kGroup;
  const int8_t* bytes = x.bytes.data() + m0 * K;
  const float* x_scale = x.scale.data() + m0 * G;
  const int32_t* offset = x.offset.data() + m0 * G;
  const uint8_t* w = weight.packed + block * G * kGroupBytes;
  Vec total[kBlocks][kM] = {};
  for (int64_t g = 0; g < G; g++) {
    Ints sum[kBlocks][kM];
    for (int m = 0; m < kM; m++)
      for (int b = 0; b < kBlocks; b++) sum[b][m] = offset[m * G + g] - Ints{};
#pragma GCC unroll 8
    for (int j = 0; j < kGroupBytes / 64; j++) {
      Bits packed[kBlocks];
      for (int b = 0; b < kBlocks; b++) {
        const uint8_t* p = w + (b * G + g) * kGroupBytes + j * 64;
        if (kBlocks == 1) __builtin_prefetch(p + kAhead);
        packed[b] = load_as<Bits>(p);
      }
      for (int part = 0; part < 8 / kBits; part++) {
        const int64_t k = g * kGroup + (j * 8 / kBits + part) * 4;
#pragma GCC unroll 8
        for (int m = 0; m < kM; m++) {
          const int32_t four = load_as<int32_t>(bytes + m * K + k);
#pragma GCC unroll 2
          for (int b = 0; b < kBlocks; b++) {
            const Bits unpacked = kBits == 8 ? packed[b] : (packed[b] >> (4 * part)) & 0x0f0f0f0fu;
            sum[b][m] = dot4(sum[b][m], unpacked, four);
          }
        }
      }
    }
    for (int b = 0; b < kBlocks; b++) {
      Vec weight_scale = {};
      if (kBits == 4)
        weight_scale = load(static_cast<const at::BFloat16*>(weight.scale) + ((block + b) * G + g) * kLanes);
      for (int m = 0; m < kM; m++) {
        const Vec product = __builtin_convertvector(sum[b][m], Vec) * x_scale[m * G + g];
        total[b][m] += kBits == 4 ? product * weight_scale : product;
      }
    }
  }
  for (int b = 0; b < kBlocks; b++) {
    const int64_t n = (block + b) * kLanes;
    for (int m = 0; m < kM; m++) {
      Vec out = total[b][m];
      if (kBits == 8) out *= load(static_cast<const float*>(weight.scale) + n);
      for (int64_t i = 0; i < kLanes; i++) weight.y[(m0 + m) * width + n + i] = static_cast<at::BFloat16>(out[i]);
    }
  }
}

// Any number M of rows of x, as many at a time as there are registers for.
template <int kBits, int kBlocks>
void rows(const Activations& x, int64_t M, const Weight& weight, int64_t block, int64_t width, int64_t K) {
  constexpr int kM = kBlocks == 2 ? 6 : 8;
  int64_t m = 0;
  for (; m + kM <= M; m += kM) tile<kBits, kM, kBlocks>(x, m, weight, block, width, K);
  switch (M - m) {
    case 1: return tile<kBits, 1, kBlocks>(x, m, weight, block, width, K);
    case 2: return tile<kBits, 2, kBlocks>(x, m, weight, block, width, K);
    case 3: return tile<kBits, 3, kBlocks>(x, m, weight, block, width, K);
    case 4: return tile<kBits, 4, kBlocks>(x, m, weight, block, width, K);
    case 5: return tile<kBits, 5, kBlocks>(x, m, weight, block, width, K);
    case 6: return tile<kBits, 6, kBlocks>(x, m, weight, block, width, K);
    case 7: return tile<kBits, 7, kBlocks>(x, m, weight, block, width, K);
  }
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

// x: (..., K) bfloat16; packed and scale of each weight as above, all in the same number of bits. Returns (..., N)
// bfloat16, N the rows of all weights.
at::Tensor quantized_linear(const at::Tensor& x, at::TensorList packed, at::TensorList scale) {
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
  at::Tensor y = at::empty(shape, x.options());
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

}  // namespace

TORCH_LIBRARY_FRAGMENT(qwen3fast, library) {
  library.def("quantized_linear(Tensor x, Tensor[] packed, Tensor[] scale) -> Tensor");
}

TORCH_LIBRARY_IMPL(qwen3fast, CPU, library) { library.impl("quantized_linear", &quantized_linear); }
