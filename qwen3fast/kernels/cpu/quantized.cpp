// Products with weights in 8 or 4 bits, and a token embedding in the same layout.
//
// Several weights with the same input (query, key and value; gate and up) go in one call: x is quantized once, threads are
// woken once, and y holds their results side by side.
//
// A weight is stored for streaming: 16 rows side by side, four neighboring channels of a row in one 32-bit lane.
// Bytes are unsigned (zero point 128 or 8), as x86's dot product of unsigned and signed bytes needs them.
//
//   8 bits   packed (N/16, K/4, 16, 4) uint8: one channel per byte.        scale (N,) float32
//   4 bits   packed (N/16, K/8, 16, 4) uint8: channels 8j+i (low half      scale (N/16, K/32, 16) bfloat16
//            of byte i) and 8j+4+i (high half).
//
// Activations are quantized to 8 bits in groups of 32 channels, with one scale per group. Products are summed
// in integers within a group and in float32 over groups, in the same order for any number of rows: a row's result does
// not depend on the rows beside it. The plain PyTorch form, which does not quantize activations, is in
// quantization/layers.py.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "ops.h"
#include "parallel.h"
#include "products.h"

namespace {

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

// kM rows of x times kBlocks blocks of 16 weight rows. `width` is the distance between two rows of y.
template <int kBits, int kM, int kBlocks>
void tile(const Activations& x, int64_t m0, const Weight& weight, int64_t block, int64_t width, int64_t K) {
  constexpr int64_t kGroupBytes = kGroup * kLanes * kBits / 8;
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
        if (kBlocks == 1) __builtin_prefetch(p + kAhead, 0, kBits == 8 ? kIntoL2 : kIntoL1);
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
        weight_scale = load(static_cast<const BFloat16*>(weight.scale) + ((block + b) * G + g) * kLanes);
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
      store(weight.y + (m0 + m) * width + n, out);
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

// Up to 32 rows: one block at a time, asked for ahead; it stays in the cache while all rows pass. With more rows, reading
// the weight matters less: two blocks at a time share the loads of x.
template <int kBits>
void blocks_of(const Activations& x, int64_t M, const Weight& weight, int64_t begin, int64_t end, int64_t width,
               int64_t K) {
  if (M > 32)
    for (; begin + 2 <= end; begin += 2) rows<kBits, 2>(x, M, weight, begin, width, K);
  for (; begin < end; begin++) rows<kBits, 1>(x, M, weight, begin, width, K);
}

}  // namespace

void Activations::quantize_row(const BFloat16* x, int64_t m, int64_t K, int64_t bits) {
  const int32_t zero = bits == 8 ? 128 : 8;  // the byte that stands for a weight of zero
  const int64_t G = K / kGroup;
  for (int64_t g = 0; g < G; g++) {
    const Vec low = load(x + g * kGroup), high = load(x + g * kGroup + kLanes);
    const Vec low_size = low < 0 ? -low : low, high_size = high < 0 ? -high : high;
    const Vec size = low_size > high_size ? low_size : high_size;
    const Vec poison = low * 0 + high * 0;  // NaN where x is NaN or infinite, which a maximum may lose
    const float most = largest(size), to_bytes = most > 0 ? 127.f / most : 0.f;
    scale[m * G + g] = most / 127.f + sum(poison);
    const Ints a = round_to_ints(low * to_bytes), b = round_to_ints(high * to_bytes);
    store(&bytes[m * K + g * kGroup], a);
    store(&bytes[m * K + g * kGroup + kLanes], b);
    offset[m * G + g] = -zero * sum(a + b);
  }
}

void packed_blocks(const Activations& x, int64_t M, const Weight& weight, int64_t bits, int64_t begin, int64_t end,
                   int64_t width, int64_t K) {
  (bits == 8 ? blocks_of<8> : blocks_of<4>)(x, M, weight, begin, end, width, K);
}

void qwen3fast_quantized_linear(const BFloat16* x, const Linear* weights, int64_t count, BFloat16* y, int64_t M,
                                int64_t threads) {
  const int64_t K = weights[0].K, bits = weights[0].bits;
  int64_t width = 0;
  for (int64_t i = 0; i < count; i++) width += weights[i].N;
  Activations quantized(M, K);
  parallel_for(M, 16, threads, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; m++) quantized.quantize_row(x + m * K, m, K, bits);
  });
  parallel_for(width / kLanes, std::max<int64_t>(1, 32768 / (K * kLanes)), threads, [&](int64_t begin, int64_t end) {
    int64_t first = 0;  // block of this weight
    for (int64_t i = 0; i < count; i++) {
      const int64_t blocks = weights[i].N / kLanes;
      const Weight weight{static_cast<const uint8_t*>(weights[i].weight), weights[i].scale, blocks, y + first * kLanes};
      packed_blocks(quantized, M, weight, bits, std::max<int64_t>(begin - first, 0), std::min(end - first, blocks), width, K);
      first += blocks;
    }
  });
}

bool qwen3fast_quantized_rows(const Linear* weight, const int64_t* row, BFloat16* y, int64_t R) {
  const int64_t K = weight->K, channels = 32 / weight->bits;  // in a 32-bit lane
  for (int64_t r = 0; r < R; r++) {
    const int64_t n = row[r], block = n / kLanes, lane = n % kLanes;
    if (n < 0 || n >= weight->N) return false;
    const auto* bytes = static_cast<const uint8_t*>(weight->weight) + (block * (K / channels) * kLanes + lane) * 4;
    for (int64_t k = 0; k < K; k++) {
      const uint8_t byte = bytes[k / channels * kLanes * 4 + k % 4];
      float value;
      if (weight->bits == 8) {
        value = (byte - 128) * static_cast<const float*>(weight->scale)[n];
      } else {
        const int64_t group = (block * (K / kGroup) + k / kGroup) * kLanes + lane;
        value = ((k % 8 < 4 ? byte & 15 : byte >> 4) - 8) * float(static_cast<const BFloat16*>(weight->scale)[group]);
      }
      y[r * K + k] = BFloat16(value);
    }
  }
  return true;
}
