// Products of a few rows with a weight that is read once: bfloat16 (used by matvec.cpp), 8 and 4 bits (quantized.cpp,
// which describes their layout), and all of them in decode_layers.cpp.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "vec.h"

namespace {

// -------------------------------------------------------------------------------------------------------- bfloat16

constexpr int64_t kAhead = 4096;  // bytes to ask memory for in advance; the hardware prefetcher stops at page borders
// Where to: a level 1 cache has few reads under way at a time, and slows fast memory down. (4 bits did not gain.)
constexpr int kIntoL1 = 3, kIntoL2 = 2;

// Rows n0..n1 of the weight, one after another: each thread reads memory in one stream, which some processors need for
// their full speed. Two sums for each result, so that additions overlap.
template <int M>
void matvec_rows(const at::BFloat16* x, const at::BFloat16* weight, at::BFloat16* y, int64_t n0, int64_t n1, int64_t N,
                 int64_t K) {
  for (int64_t n = n0; n < n1; n++) {
    const at::BFloat16* w = weight + n * K;
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
    for (int m = 0; m < M; m++) y[m * N + n] = static_cast<at::BFloat16>(sum(total[m][0] + total[m][1]));
  }
}

// The same for M rows of x, 1 to 8.
inline void matvec_rows(const at::BFloat16* x, int64_t M, const at::BFloat16* weight, at::BFloat16* y, int64_t n0,
                        int64_t n1, int64_t N, int64_t K) {
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

// ---------------------------------------------------------------------------------------------- 8 bits and 4 bits

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

// The nearest integers, halves to even: adding and subtracting 1.5 * 2^23 leaves no room for a fraction.
inline Ints round_to_ints(Vec x) { return __builtin_convertvector(x + 12582912.f - 12582912.f, Ints); }

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
    const Ints a = round_to_ints(low * to_bytes), b = round_to_ints(high * to_bytes);
    int32_t sum = 0;
    for (int64_t i = 0; i < kLanes; i++) {
      bytes[g * kGroup + i] = static_cast<int8_t>(a[i]);
      bytes[g * kGroup + kLanes + i] = static_cast<int8_t>(b[i]);
      sum += a[i] + b[i];
    }
    offset[g] = -zero * sum;
  }
}

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

}  // namespace
