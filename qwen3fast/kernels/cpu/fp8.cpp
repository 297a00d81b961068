// Products with weights in fp8: bytes as quantized.cpp packs those of 8 bits, each a float8_e4m3fn number (fp8.h), and
// scales (N/16, K/span, 1 or 16) float32, one per row or for all 16 rows of a block; K/span is rounded up.
//
// Activations are not quantized: numbers are multiplied in bfloat16, which holds all of fp8's. Sums are in float32, in the
// same order for any number of rows.

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>

#include "fp8.h"
#include "products.h"

namespace {

constexpr int64_t kChannels = 4;  // of each row in a vector of bytes

#if defined(__AVX512VBMI__) && defined(__AVX512BF16__)

// One half of the bits of each number as bfloat16, without its sign.
constexpr std::array<uint8_t, 128> half_of_bits(int shift) {
  std::array<uint8_t, 128> table{};
  for (int i = 0; i < 128; i++) {
    float size = (i >> 3 ? 8.f + i % 8 : i % 8) * 0x1p-9f;
    for (int exponent = 1; exponent < i >> 3; exponent++) size *= 2;
    table[i] = static_cast<uint8_t>((i == 127 ? 0x7fc0u : std::bit_cast<uint32_t>(size) >> 16) >> shift);
  }
  return table;
}

alignas(64) constexpr auto kHigh = half_of_bits(8), kLow = half_of_bits(0);

// The sums of 16 rows of a weight with one row of x, in two vectors: of the first two, and of the last two of every four
// rows, with the sums of even and of odd pairs of channels side by side.
struct Sums {
  Vec part[2];

  Vec whole() const {
#define FIRST 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30
#define SECOND 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31
    return shuffle<FIRST>(part[0], part[1]) + shuffle<SECOND>(part[0], part[1]);
  }
};

// Adds the products of four channels: bytes of 16 rows, and each row of x.
template <int kM>
inline void add_products(Sums (&sums)[kM], const uint8_t* bytes, const BFloat16* x, int64_t K) {
  const auto packed = load_as<__m512i>(bytes);
  const auto look_up = [packed](const std::array<uint8_t, 128>& table) {
    return _mm512_permutex2var_epi8(load_as<__m512i>(&table[0]), packed, load_as<__m512i>(&table[64]));
  };
  const __m512i sign = _mm512_set1_epi8(-128), low = look_up(kLow);
  const __m512i high = _mm512_ternarylogic_epi32(look_up(kHigh), packed, sign, 0xf8);  // a | (b & c)
  Bits first, second;
  first.part[0] = (Bits::Part)_mm512_unpacklo_epi8(low, high), second.part[0] = (Bits::Part)_mm512_unpackhi_epi8(low, high);
#pragma GCC unroll 12
  for (int m = 0; m < kM; m++) {
    const Bits four = as<Bits>(Wide<int64_t>(load_as<int64_t>(x + m * K)));
    sums[m].part[0] = dot2(sums[m].part[0], first, four);
    sums[m].part[1] = dot2(sums[m].part[1], second, four);
  }
}

#else

struct Sums {
  Vec part[1];

  Vec whole() const { return part[0]; }
};

template <int kM>
inline void add_products(Sums (&sums)[kM], const uint8_t* bytes, const BFloat16* x, int64_t K) {
  const auto packed = load_as<Bits>(bytes);
#pragma GCC unroll 4
  for (int c = 0; c < kChannels; c++) {
    const Vec weight = from_fp8(packed >> 8 * c & 255u);
#pragma GCC unroll 12
    for (int m = 0; m < kM; m++) sums[m].part[0] += weight * static_cast<float>(x[m * K + c]);
  }
}

#endif

// kM rows of x times a block of 16 rows of the weight. `width` is the distance between two rows of y.
template <int kM>
void tile(const BFloat16* x, const Linear& weight, BFloat16* y, int64_t block, int64_t width) {
  const int64_t K = weight.K, spans = (K + weight.span - 1) / weight.span;
  const bool is_per_row = has_row_scales(weight);
  const auto* bytes = static_cast<const uint8_t*>(weight.weight) + block * K * kLanes;
  const auto* scale = static_cast<const float*>(weight.scale) + block * spans * (is_per_row ? kLanes : 1);
  Sums total[kM] = {};
  for (int64_t s = 0; s < spans; s++) {
    Sums sums[kM] = {};
    const int64_t end = std::min(K, (s + 1) * weight.span);
    for (int64_t k = s * weight.span; k < end; k += kChannels) {
      __builtin_prefetch(bytes + k * kLanes + kAhead, 0, kIntoL2);
      add_products(sums, bytes + k * kLanes, x + k, K);
    }
    for (int m = 0; m < kM; m++)
      for (size_t p = 0; p < std::size(sums[m].part); p++) total[m].part[p] += sums[m].part[p] * (is_per_row ? 1 : scale[s]);
  }
  for (int m = 0; m < kM; m++) {
    const Vec whole = total[m].whole();
    store(y + m * width, is_per_row ? whole * load(scale) : whole);
  }
}

// Up to kM rows.
template <int kM>
void rows(int64_t count, const BFloat16* x, const Linear& weight, BFloat16* y, int64_t block, int64_t width) {
  if (count == kM) return tile<kM>(x, weight, y, block, width);
  if constexpr (kM > 1) rows<kM - 1>(count, x, weight, y, block, width);
}

}  // namespace

void fp8_blocks(const BFloat16* x, int64_t M, const Linear& weight, BFloat16* y, int64_t begin, int64_t end,
                int64_t width) {
  constexpr int64_t kMost = kRegister < 64 ? 4 : 8;
  for (int64_t block = begin; block < end; block++)
    for (int64_t m = 0; m < M; m += kMost)
      rows<kMost>(std::min(kMost, M - m), x + m * weight.K, weight, y + m * width + block * kLanes, block, width);
}
