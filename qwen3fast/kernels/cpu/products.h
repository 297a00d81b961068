// Products of a few rows with a weight that is read once: bfloat16 (matvec.cpp, lossless.cpp), 8 and 4 to 6
// bits (quantized.cpp, fp8.cpp). Shared with decode_layers.cpp and experts.cpp.

#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "lossless.h"
#include "ops.h"

constexpr int64_t kAhead = 4096;  // bytes to prefetch; the hardware prefetcher stops at page borders
constexpr int64_t kGroup = 32;  // channels that share a scale
constexpr int64_t kHalfGroup = kGroup / 2;  // the same in 6 bits
constexpr int64_t kManyRows = 8;  // of x, from which lanes are rows in bfloat16; all chunks of prompts have as many

// Whether a weight is in fp8, and whether it has a scale per row then; otherwise one per block.
inline bool is_fp8(const Linear& weight) { return weight.bits == 8 && weight.span; }
inline bool has_row_scales(const Linear& weight) { return weight.record == kLanes * int64_t{sizeof(float)}; }

// Whether a weight's scales are of rows, and multiply sums over all channels.
inline bool has_last_scales(const Linear& weight) { return weight.bits == 8 && (!weight.span || has_row_scales(weight)); }

// Whether a weight in int4 has its scales in bytes.
inline bool has_byte_scales(const Linear& weight) { return weight.bits == 4 && !weight.span && weight.record; }

// Whether levels of a weight in 4 bits are looked up in a table: nl4. Its records cover 256 channels, or a group.
inline bool is_looked_up(const Linear& weight) {
  return weight.bits == 4 && (weight.span == kGroup ? weight.record == 2 * kLanes
                                                    : weight.span == 256 && weight.record == 10 * kLanes);
}

// Whether a packed weight multiplies activations in bfloat16, not in 8 bits.
inline bool takes_bfloat16(const Linear& weight) { return is_fp8(weight) || is_lossless(weight); }

// Rows of x in 8 bits: value = scale * byte, one scale per group. `sum`: of a group's values, which minimums of weights
// multiply. `offset8`, `offset4`, `offset6`: the amounts that the zero points of weights in int8 (and nl4), int4 and int6
// add, of int6 per half a group. For weights that take bfloat16, rows stay as they are, where they lie or in copies.
struct Activations {
  Lines<int8_t> bytes;
  Lines<float> scale, sum;
  Lines<int32_t> offset8, offset4, offset6;
  Lines<BFloat16> copies;           // (M, K)
  const BFloat16* where = nullptr;  // the rows lie, if they are not copied

  Activations(int64_t M, int64_t K) { make_room(M, K); }

  explicit Activations(Lines<BFloat16> room) : copies(std::move(room)) {}

  // Room only grows; contents are lost.
  void make_room(int64_t M, int64_t K) {
    const auto grow = [](auto& numbers, int64_t size) {
      if (static_cast<int64_t>(numbers.size()) < size) numbers.clear(), numbers.resize(size);
    };
    grow(bytes, M * K), grow(offset6, M * K / kHalfGroup);
    grow(scale, M * K / kGroup), grow(sum, M * K / kGroup), grow(offset8, M * K / kGroup), grow(offset4, M * K / kGroup);
  }

  const BFloat16* rows() const { return where ? where : copies.data(); }

  // Quantizes row m to int8: its channel k is x[order[k]], or x[k] without an order.
  void quantize_row(const BFloat16* x, int64_t m, int64_t K, const int32_t* order = nullptr);

  // The same without quantizing it.
  void copy_row(const BFloat16* x, int64_t m, int64_t K, const int32_t* order = nullptr) {
    for (int64_t k = 0; k < K; k++) copies[m * K + k] = x[order ? order[k] : k];
  }
};

// Products of more rows of x are made part by part: a copy of x in another layout is kept from call to call.
constexpr int64_t kKeptRows = 4096;

// Bytes of some rows (a multiple of 16) of a packed weight, and of their scales.
inline int64_t weight_bytes(const Linear& weight, int64_t rows) {
  return rows * (is_lossless(weight) ? lossless_bytes(weight.K) : weight.K * weight.bits / 8);
}

inline int64_t scale_bytes(const Linear& weight, int64_t rows) {
  if (is_lossless(weight)) return rows * int64_t{sizeof(RowRecord)};
  if (is_fp8(weight)) return rows / kLanes * ((weight.K + weight.span - 1) / weight.span) * weight.record;
  if (weight.bits == 8) return rows * 4;
  if (has_byte_scales(weight)) return rows * (1 + weight.K / kGroup);
  return weight.span ? rows / kLanes * (weight.K / weight.span) * weight.record : rows * weight.K / kGroup * 2;
}

// Results n0..n1 of M rows of x. y: (M, N).
void matvec_rows(const BFloat16* x, int64_t M, const BFloat16* weight, BFloat16* y, int64_t n0, int64_t n1, int64_t N,
                 int64_t K);

// y[m, n] for weights of the same K, a multiple of 16, whose numbers are bfloat16, side by side in y: M at least 8, each
// N a multiple of 8.
void linear_together(const BFloat16* x, const Linear* weights, int64_t count, BFloat16* y, int64_t M, int64_t threads);

// y = silu(x gate^T) * (x up^T) for two such weights of equal shape.
void gated_together(const BFloat16* x, const Linear& gate, const Linear& up, BFloat16* y, int64_t M, int64_t threads);

// What becomes of the results of tile_products: they replace y; are added to it, each rounded first; or are gate and up of a
// feed-forward layer, two weights of equal shape, and y becomes silu(gate) * up.
enum Purpose { kReplace, kAdd, kGate };

// As qwen3fast_tile_linear: weights of the same K, a multiple of 32, each N of 16. y: (M, all N together), of gate and up
// (M, N).
void tile_products(const BFloat16* x, const Linear* weights, int64_t count, BFloat16* y, int64_t M, Tiles tiles,
                   Purpose purpose, int64_t threads);

// As matvec_rows by tiles, for up to 32 rows of x in pairs: per 16 rows, K/2 lines of put_into_pairs. n1 - n0: a multiple of
// 16; K: of 32. The thread has a TileUse.
void tile_rows(const uint32_t* pairs, int64_t M, const BFloat16* weight, BFloat16* y, int64_t n0, int64_t n1, int64_t N,
               int64_t K);

// Blocks begin..end of a packed weight, for any number M of rows. y: where its columns of the result begin.
// `width` is the distance between two rows of y.
void packed_blocks(const Activations& x, int64_t M, const Linear& weight, BFloat16* y, int64_t begin, int64_t end,
                   int64_t width);

// Dequantizes a block of a weight that is not lossless into pairs of neighboring channels: K/2 lines, `stride` pairs apart, of
// 16 rows side by side. Scales that come last are left out: levels of 8 bits, and numbers of fp8, are exact in bfloat16.
void dequantize(const Linear& weight, int64_t block, uint32_t* pairs, int64_t stride);

// Quantizes a block of a weight in 4 to 6 bits to int8, zero point 128: K/4 lines of four channels of 16 rows. A row has one
// scale per `span` channels: 16 scales for each span, `stride` numbers apart. span: a multiple of 32.
void quantize_again(const Linear& weight, int64_t block, int64_t span, uint8_t* lines, float* scale, int64_t stride);

// The same as packed_blocks for weights in fp8. x: (M, K).
void fp8_blocks(const BFloat16* x, int64_t M, const Linear& weight, BFloat16* y, int64_t begin, int64_t end, int64_t width);

namespace {

// Scales of int4 in bytes: of 16 rows, a line of units, then a line per group. A unit is the exponent of a power of two, as
// float32 has it; a scale, relative to the unit, has a sign, 4 bits of exponent, of which 15 stands for 2^0, and 3 bits of
// fraction. No product rounds otherwise than with the same scale in bfloat16: units come last.
class ByteScales {
 public:
  void start(const Linear& weight, int64_t block) {
    lines_ = static_cast<const int8_t*>(weight.scale) + block * (1 + weight.K / kGroup) * kLanes;
  }
  FORCE_INLINE Vec units() const {
    return as<Vec>(as<Bits>(load_ints(reinterpret_cast<const uint8_t*>(lines_))) << 23);
  }
  // Asks for scales, once per cache line, as far ahead as for levels, of which a group has 16 times as many bytes.
  FORCE_INLINE void ask(int64_t g) const {
    if (g % (64 / kLanes) == 0) __builtin_prefetch(lines_ + (1 + g) * kLanes + kAhead / 16, 0, kIntoL1);
  }
  FORCE_INLINE Vec read(int64_t g) const {
    const Bits bits = as<Bits>(load_ints(lines_ + (1 + g) * kLanes)) << 20;
    return as<Vec>((bits & 0x87f00000u) | 0x38000000u);  // exponents from 127 - 15 to 127
  }

 private:
  const int8_t* lines_;
};

// Channels of a weight that share a scale, and whose levels lie together in lines of 64 bytes; and their lines.
constexpr int64_t unit_of(int64_t bits) { return bits == 6 ? kHalfGroup : kGroup; }
constexpr int64_t lines_of(int64_t bits) { return bits * unit_of(bits) / 32; }

// Four levels of 16 rows, a byte each: number `four` of a unit. line: the one with their low bits, or all 8; high: the line
// with the fifth and sixth bits, if there are any.
FORCE_INLINE Bits levels_of(int bits, Bits line, Bits high, int four) {
  if (bits == 8) return line;
  const Bits low = (line >> (four % 2 * 4)) & 0x0f0f0f0fu;
  if (bits == 4) return low;
  const int shift = 4 - four * (bits - 4);
  return low | ((shift > 0 ? high << shift : high >> -shift) & (bits == 5 ? 0x10101010u : 0x30303030u));
}

// What levels of nl4 stand for, plus 128 as levels of int8; see NL4_TABLE in structures.py.
alignas(16) constexpr uint8_t kLookedUp[] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};

// Quantizes `count` numbers, a multiple of 32, with one scale, which it returns: NaN if a number is not finite. totals: sums
// of the levels, of every other 16 from the first, and from the second 16 on.
inline float quantize_group(const BFloat16* x, int64_t count, int8_t* levels, int32_t* totals) {
  const float most = largest_size(x, count), to_levels = most > 0 ? 127.f / most : 0.f;
  Ints sums[2] = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    const Ints level = round_to_ints(load(x + i) * to_levels);
    store(levels + i, level);
    sums[i / kLanes % 2] += level;
  }
  for (int i = 0; i < 2; i++) totals[i] = ::sum(sums[i]);
  return most / 127.f;
}

// Puts up to 16 rows of x into pairs of neighboring channels: K/2 lines, `width` numbers of 32 bits apart, with a pair per
// row; pairs of missing rows are zero. K: a multiple of 16.
inline void put_into_pairs(const BFloat16* x, int64_t rows, int64_t K, int64_t width, uint32_t* pairs) {
  for (int64_t k = 0; k < K; k += 2 * kLanes) {
    const int64_t count = std::min(2 * kLanes, K - k);  // channels
    Bits square[kLanes] = {};
    if (rows == kLanes && count == 2 * kLanes)
      for (int64_t i = 0; i < kLanes; i++) square[i] = load_as<Bits>(x + i * K + k);  // inline: sizes are constant
    else
      for (int64_t i = 0; i < rows; i++) std::memcpy(&square[i], x + i * K + k, count * sizeof(BFloat16));
    transpose(square);
    for (int64_t i = 0; i < count / 2; i++) store_as_is(pairs + (k / 2 + i) * width, square[i]);
  }
}

// out = silu(gate) * up, between the two products of a feed-forward layer; out may be gate.
inline void gate_values(const BFloat16* gate, const BFloat16* up, int64_t count, BFloat16* out) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec x = load(gate + i), exponential = exp_of_negative(0.f - size_of(x));  // exp(-|x|)
    const Vec gated = round_to_bfloat16(x * select(x < 0, exponential, fill(1.f)) / (1.f + exponential));
    store(out + i, gated * load(up + i));
  }
}

}  // namespace
