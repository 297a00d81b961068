// Packed weights as numbers, in all formats: blocks of 16 rows for tiles.cpp, and any rows, of a token embedding or all.
// quantized.cpp describes the layouts.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "fp8.h"
#include "ops.h"
#include "parallel.h"
#include "products.h"
#include "records.h"

constexpr int64_t kLine = 64;  // bytes

void dequantize(const Linear& weight, int64_t block, uint32_t* pairs, int64_t stride) {
  const int bits = static_cast<int>(weight.bits);
  const int64_t unit = unit_of(bits), lines = lines_of(bits), G = weight.K / unit;
  const auto* w = static_cast<const uint8_t*>(weight.weight) + block * G * lines * kLine;
  const bool has_table = is_looked_up(weight), is_signed = bits == 6 || has_table;  // with scales that have a sign
  const bool has_minimums = bits < 6 && weight.span && !is_signed, has_blocks = is_fp8(weight) && !has_row_scales(weight);
  const int64_t spans = has_blocks ? (weight.K + weight.span - 1) / weight.span : 0;
  const auto* of_blocks = static_cast<const float*>(weight.scale) + block * spans;
  Records records;
  ByteScales byte_scales;
  SignedScales signed_scales;
  if (has_minimums) records.start(weight, block);
  if (has_byte_scales(weight)) byte_scales.start(weight, block);
  if (is_signed) signed_scales.start(weight, block);
  const int zero = bits == 6 ? 32 : bits == 8 || has_table ? 128 : bits == 4 && !weight.span ? 8 : 0;
  Vec scale = fill(1), minimum = {};
  for (int64_t g = 0; g < G; g++, w += lines * kLine) {
    if (has_blocks) scale = fill(of_blocks[g * kGroup / weight.span]);
    if (has_minimums) {
      records.read(scale, minimum);
    } else if (is_signed) {
      scale = signed_scales.read();
    } else if (bits == 4) {
      scale = has_byte_scales(weight) ? byte_scales.read(g) * byte_scales.units()
                                      : load(static_cast<const BFloat16*>(weight.scale) + (block * G + g) * kLanes);
    }
    const Bits high = load_as<Bits>(w + (lines - 1) * kLine);
    for (int four = 0; four < unit / 4; four++) {
      Bits levels = levels_of(bits, load_as<Bits>(w + (bits == 8 ? four : four / 2) * kLine), high, four);
      if (has_table) levels = look_up(kLookedUp, levels);
      for (int shift = 0; shift < 32; shift += 16) {
        const auto number = [&](int at) {
          const Bits level = levels >> at & 255u;
          return is_fp8(weight) ? from_fp8(level) * scale : convert<Vec>(as<Ints>(level) - zero) * scale - minimum;
        };
        store_as_is(pairs, as_bfloat16(number(shift), number(shift + 8)));
        pairs += stride;
      }
    }
  }
}

namespace {

// What levels stand for in a format: (level - kZero) * scale - minimum; and a number of bits that they can be shifted by
// where scales of up to 127 (254 with minimums) for the largest level are multiplied in 16 bits.
template <int kBitsOf, bool kHasTableOf, bool kHasMinimumsOf>
struct Format {
  static constexpr int kBits = kBitsOf;
  static constexpr bool kHasTable = kHasTableOf, kHasMinimums = kHasMinimumsOf;
  static constexpr int kZero = kHasTable ? 128 : kHasMinimums ? 0 : 1 << (kBits - 1);
  static constexpr int kMost = kHasTable ? 127 : kHasMinimums ? (1 << kBits) - 1 : kZero;  // of the sizes of level - kZero
  static constexpr float kLargest = kHasMinimums ? 126 : 127;  // number in int8: both terms are rounded
  static constexpr int kShift = kHasTable ? 1 : kHasMinimums ? 9 - kBits : 8 - kBits;
};

// read(scale, minimum) gives those of the next unit.
template <typename Format, typename Read>
void quantize_spans(const Linear& weight, int64_t block, int64_t span, uint8_t* out, float* scale, int64_t stride,
                    Read read) {
  constexpr int kBits = Format::kBits, kUnit = unit_of(kBits), kLines = lines_of(kBits);
  typedef Wide<int16_t> Shorts;
  const auto* w = static_cast<const uint8_t*>(weight.weight) + block * (weight.K / kUnit) * kLines * kLine;
  static thread_local std::vector<Vec> scales, minimums;
  scales.resize(span / kUnit), minimums.resize(span / kUnit);
  for (int64_t k = 0; k < weight.K; k += span, scale += stride) {
    const int64_t units = std::min(span, weight.K - k) / kUnit;
    Vec most = {}, poison = {};  // NaN where a scale is NaN or infinite, which a maximum may lose
    for (int64_t u = 0; u < units; u++) {
      read(scales[u], minimums[u]);
      poison += (scales[u] + minimums[u]) * 0;
      const Vec largest = scales[u] * Format::kMost;
      most = larger(most, Format::kHasMinimums ? larger(size_of(largest - minimums[u]), size_of(minimums[u])) : size_of(largest));
    }
    store(scale, most / Format::kLargest + poison);
    const Vec inverse = select(most > 0, Format::kLargest / most, fill(0));
    for (int64_t u = 0; u < units; u++, w += kLines * kLine) {
      const auto twice = [](Ints number) { return as<Shorts>((number & 0xffff) | number << 16); };
      const Shorts factor = twice(round_to_ints(scales[u] * inverse * (1 << (15 - Format::kShift))));
      const Shorts minimum = Format::kHasMinimums ? twice(round_to_ints(minimums[u] * inverse)) : Shorts{};
      const Bits high = load_as<Bits>(w + (kLines - 1) * kLine);
#pragma GCC unroll 8
      for (int four = 0; four < kUnit / 4; four++, out += kLine) {
        Bits levels = levels_of(kBits, load_as<Bits>(w + four / 2 * kLine), high, four);
        if (Format::kHasTable) levels = look_up(kLookedUp, levels);
        const auto number = [&](Bits half) {
          const Shorts level = (as<Shorts>(half) << Format::kShift) - (Format::kZero << Format::kShift);
          return as<Bits>(multiply_high(level, factor) - minimum);
        };
        const Bits even = number(levels & 0x00ff00ffu), odd = number(levels >> 8 & 0x00ff00ffu);
        store_as_is(out, ((even & 0x00ff00ffu) | (odd << 8 & 0xff00ff00u)) ^ 0x80808080u);
      }
    }
  }
}

}  // namespace

void quantize_again(const Linear& weight, int64_t block, int64_t span, uint8_t* lines, float* scale, int64_t stride) {
  const auto with = [&]<typename Format>(Format, auto read) {
    quantize_spans<Format>(weight, block, span, lines, scale, stride, read);
  };
  if (weight.bits == 6 || is_looked_up(weight)) {
    SignedScales scales;
    scales.start(weight, block);
    const auto read = [&](Vec& scale, Vec&) { scale = scales.read(); };
    return weight.bits == 6 ? with(Format<6, false, false>{}, read) : with(Format<4, true, false>{}, read);
  }
  if (weight.span) {
    Records records;
    records.start(weight, block);
    const auto read = [&](Vec& scale, Vec& minimum) { records.read(scale, minimum); };
    return weight.bits == 5 ? with(Format<5, false, true>{}, read) : with(Format<4, false, true>{}, read);
  }
  if (has_byte_scales(weight)) {
    ByteScales scales;
    scales.start(weight, block);
    return with(Format<4, false, false>{},
                [&, units = scales.units(), g = int64_t{0}](Vec& scale, Vec&) mutable { scale = scales.read(g++) * units; });
  }
  const BFloat16* scales = static_cast<const BFloat16*>(weight.scale) + block * (weight.K / kGroup) * kLanes;
  with(Format<4, false, false>{}, [scales](Vec& scale, Vec&) mutable { scale = load(scales), scales += kLanes; });
}

bool qwen3fast_quantized_rows(const Linear* weight, const int64_t* row, BFloat16* y, int64_t R, int64_t threads) {
  const int64_t K = weight->K;
  if (!std::all_of(row, row + R, [&](int64_t n) { return n >= 0 && n < weight->N; })) return false;
  parallel_for(R, std::max<int64_t>(kLanes, 65536 / K), threads, [&](int64_t begin, int64_t end) {
    static thread_local Lines<uint32_t> pairs;
    pairs.resize(K / 2 * kLanes);
    for (int64_t r = begin, block = -1; r < end; r++) {
      const int64_t n = row[r];
      BFloat16* const out = y + r * K;
      if (is_lossless(*weight)) {
        unpack_row(*weight, n, out);
        continue;
      }
      if (n / kLanes != block) dequantize(*weight, block = n / kLanes, pairs.data(), kLanes);
      for (int64_t p = 0; p < K / 2; p++) std::memcpy(out + 2 * p, &pairs[p * kLanes + n % kLanes], 4);
      if (!has_last_scales(*weight)) continue;
      const float scale = static_cast<const float*>(weight->scale)[n];
      for (int64_t i = 0; i < K; i += kLanes) store(out + i, load(out + i) * scale);
    }
  });
  return true;
}
