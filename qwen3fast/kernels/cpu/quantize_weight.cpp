// Weights to 8 and 4 bits, in the layout that quantized.cpp describes: the same bytes and scales, bit for bit, as the
// plain PyTorch form in quantization/formats.py, which passes over memory many times. For equal sums, the compiler must
// not contract products and sums in this file (building.py has the flag).

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "ops.h"
#include "parallel.h"
#include "products.h"

namespace {

// Shares of the group's largest weight that the range of 4 bits may end at.
constexpr double kRanges[] = {1.0, 1.06, 0.94, 0.88, 0.82, 0.76};
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// The largest power of two that is not above x, or 0; x: not negative.
float power_of_two(float x) { return std::bit_cast<float>(std::bit_cast<uint32_t>(x) & 0x7f800000u); }

// One row; lane: its place in the block.
void quantize_row_to_8(const BFloat16* row, int64_t K, int64_t lane, uint8_t* packed, float* scale) {
  const float unit = largest_size(row, K) / 127.f;
  *scale = unit;
  const Vec divisor = fill(std::max(unit, 1e-30f));
  for (int64_t k = 0; k < K; k += kLanes) {
    Ints byte = round_to_ints(load(row + k) / divisor);
    byte = select(byte > 127, Ints(127), select(byte < -127, Ints(-127), byte)) + 128;
    uint8_t bytes[kLanes];
    for (int64_t i = 0; i < kLanes; i++) bytes[i] = static_cast<uint8_t>(byte[i]);
    for (int64_t i = 0; i < kLanes; i += 4) std::memcpy(packed + ((k + i) / 4 * kLanes + lane) * 4, bytes + i, 4);
  }
}

FORCE_INLINE Ints level_of(Vec x, Vec divisor) {
  const Ints level = round_to_ints(x / divisor);
  return select(level > 7, Ints(7), select(level < -8, Ints(-8), level));
}

FORCE_INLINE Vec squared_error(Ints level, Vec scale, Vec x) {
  const Vec error = convert<Vec>(level) * scale - x;
  return error * error;
}

// The nearest number with a fraction of 3 bits, as scales in bytes have; not smaller than `least`, a power of two.
float short_scale(float scale, float least) {
  scale = std::bit_cast<float>((std::bit_cast<uint32_t>(scale) + 0x80000u) & 0xfff00000u);
  return std::copysign(std::max(std::abs(scale), least), scale);
}

// One group of 32 channels of a row: of all ranges, the first with the least squared error. Returns its scale.
BFloat16 quantize_group_to_4(const BFloat16* group, float least, int64_t lane, uint8_t* packed) {
  const Vec low = load(group), high = load(group + kLanes);
  const float most = largest(larger(size_of(low), size_of(high)));
  float end = 0;  // the first of the largest weights, with its sign
  for (int64_t i = 2 * kLanes - 1; i >= 0; i--)
    if (const float x = group[i]; x == most || x == -most) end = x;
  Ints best_low = {}, best_high = {};
  float best_error = std::numeric_limits<float>::infinity();
  BFloat16 best_scale(0.f);
  for (const double range : kRanges) {
    const float step = short_scale(end * static_cast<float>(-range / 8), least);
    const Vec divisor = fill(step == 0 ? 1.f : step);
    const Ints a = level_of(low, divisor), b = level_of(high, divisor);
    const float error = sum(squared_error(a, fill(step), low) + squared_error(b, fill(step), high));
    if (error < best_error) {
      best_error = error;
      best_scale = BFloat16(step);
      best_low = a;
      best_high = b;
    }
  }
  uint8_t levels[2 * kLanes];
  for (int64_t i = 0; i < kLanes; i++) {
    levels[i] = static_cast<uint8_t>(best_low[i] + 8);
    levels[kLanes + i] = static_cast<uint8_t>(best_high[i] + 8);
  }
  for (int64_t j = 0; j < kGroup / 8; j++)
    for (int64_t i = 0; i < 4; i++)
      packed[(j * kLanes + lane) * 4 + i] = static_cast<uint8_t>(levels[8 * j + i] | levels[8 * j + 4 + i] << 4);
  // NaN and infinity in the group make all of it NaN: they must not turn into ordinary numbers.
  return sum(low * 0 + high * 0) == 0 ? best_scale : BFloat16(kNaN);
}

}  // namespace

void qwen3fast_quantize_weight(const BFloat16* weight, int64_t N, int64_t K, int64_t bits, uint8_t* packed, void* scale,
                            int64_t threads) {
  const int64_t block_bytes = kLanes * K * bits / 8, groups = K / kGroup;
  parallel_for(N / kLanes, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin * kLanes; n < end * kLanes; n++) {
      const int64_t block = n / kLanes, lane = n % kLanes;
      const BFloat16* row = weight + n * K;
      uint8_t* bytes = packed + block * block_bytes;
      if (bits == 8) {
        quantize_row_to_8(row, K, lane, bytes, static_cast<float*>(scale) + n);
        continue;
      }
      const float most = largest_size(row, K);
      const float least = std::isnan(most) ? 0.f : power_of_two(most / 65536.f);  // bytes span 15 powers of two
      for (int64_t g = 0; g < groups; g++)
        static_cast<BFloat16*>(scale)[(block * groups + g) * kLanes + lane] =
            quantize_group_to_4(row + g * kGroup, least, lane, bytes + g * kGroup * kLanes / 2);
    }
  });
}

bool qwen3fast_pack_scales(const BFloat16* scale, int64_t blocks, int64_t groups, int8_t* bytes, int64_t threads) {
  std::atomic<bool> is_exact = true;
  parallel_for(blocks, std::max<int64_t>(1, 4096 / groups), threads, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block++) {
      const BFloat16* line = scale + block * groups * kLanes;
      int8_t* out = bytes + block * (1 + groups) * kLanes;
      Ints unit = {}, wrong = {};
      for (int64_t g = 0; g < groups; g++) {
        const Ints exponent = as<Ints>(load_halves(line + g * kLanes) >> 7 & 0xffu);
        unit = select(exponent > unit, exponent, unit);
      }
      // A row of zeros has the unit 0; the smallest exponent of a scale must not be a denormal number's.
      wrong = (unit == 255) | ((unit > 0) & (unit < 16));
      store(out, unit);
      for (int64_t g = 0; g < groups; g++) {
        const Bits bits = load_halves(line + g * kLanes);
        const Ints exponent = as<Ints>(bits >> 7 & 0xffu) - unit + 15;
        wrong |= (exponent < 0) | (as<Ints>(bits & 15u) > 0) | ((unit == 0) & (as<Ints>(bits & 0x7fffu) > 0));
        store(out + (1 + g) * kLanes, as<Ints>(bits >> 8 & 0x80u) | exponent << 3 | as<Ints>(bits >> 4 & 7u));
      }
      if (sum(wrong) != 0) is_exact = false;
    }
  });
  return is_exact;
}
