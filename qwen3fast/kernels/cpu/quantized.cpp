// Products with weights in 8 or 4 to 6 bits. Token embeddings have the same layout; dequantize.cpp reads their rows.
//
// Several weights with the same input (query, key and value; gate and up) go in one call: x is quantized once, threads are
// woken once, and y holds their results side by side.
//
// A weight is stored for streaming: 16 rows side by side, four neighboring channels of a row in one 32-bit lane.
// Bytes are unsigned (zero point 128 or 8), as x86's dot product of unsigned and signed bytes needs them.
//
//   8 bits   packed (N/16, K/4, 16, 4) uint8: one channel per byte.        scale (N,) float32
//   4 bits   packed (N/16, K/8, 16, 4) uint8: channels 8j+i (low half      scale (N/16, K/32, 16) bfloat16, or
//            of byte i) and 8j+4+i (high half).                            (N/16, 1 + K/32, 16) int8, see ByteScales
//
// 4 bits with a minimum or a zero point (uint4): levels 0 to 15 in the same places; scale (N/16, K/span, record) uint8
// holds a record per `span` channels of 16 rows, each field of 16 numbers, one per row:
//   48 bytes          d float16, zero uint8:       weight = d * level - d * zero
//   64 + span bytes   d, dmin float16, then per    weight = (d * s) * level - dmin * m
//                     32 channels s, m uint8:
//   256, span 256     d, dmin, then per 32 channels s in 6 bits, the high bits of m above them; then the low bits of m,
//                     of groups 0 to 3 and, in high halves, 4 to 7
//
// 5 bits (uint5) have the last record. Behind the four lines of 64 bytes with the low bits of 32 channels, a fifth line has
// their fifth bits: bit j of byte i of a lane belongs to channel 4j+i.
//
// 6 bits (int6), zero point 32: 16 channels share a scale. Their levels are two lines of low bits and one of high bits, of
// which bits 2j and 2j+1 of byte i belong to channel 4j+i. A record of 256 channels holds d float16, then per 16 channels
// s int8, 16 numbers each: weight = (d * s) * (level - 32).
//
// nl4: 4 bits as levels of a table (kLookedUp). Its records are as int6's, with s per 32 channels, in 160 bytes; or of 32
// channels, d alone, in 32 bytes: weight = (d * s) * (number - 128).
//
// Activations are quantized to 8 bits in groups of 32 channels, with one scale per group. Products are summed in integers
// within a group (of int6, half a group) and in float32 over groups, in the same order for any number of rows: a row's
// result does not depend on the rows beside it. The plain PyTorch form, which does not quantize activations, is in
// quantization/layers.py. Weights in fp8 are multiplied in fp8.cpp, lossless ones in lossless.cpp.

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "ops.h"
#include "parallel.h"
#include "products.h"
#include "records.h"

namespace {

// How a weight's levels become numbers: see above.
enum Kind { kInt8, kInt4, kByteScales, kUint4, kUint5, kInt6, kNl4 };  // kByteScales: int4 with scales in bytes

constexpr int bits_of(Kind kind) { return kind == kInt8 ? 8 : kind == kUint5 ? 5 : kind == kInt6 ? 6 : 4; }
constexpr int byte_bits_of(Kind kind) { return kind == kNl4 ? 8 : bits_of(kind); }  // of the bytes that are multiplied
constexpr bool has_signed_scales(Kind kind) { return kind == kInt6 || kind == kNl4; }
constexpr bool has_minimums(Kind kind) { return kind == kUint4 || kind == kUint5; }

template <Kind kKind>
using ScaleReader =
    std::conditional_t<kKind == kByteScales, ByteScales, std::conditional_t<has_signed_scales(kKind), SignedScales, Records>>;

// Whether scales are read from their records once for all tiles of the same blocks. A single block's tiles each read them.
constexpr bool has_read_scales(Kind kind, int blocks) { return kind >= kUint4 && blocks > 1; }

// Scales and minimums of blocks, block after block.
struct Scales {
  std::vector<Vec> scale, minimum;

  template <Kind kKind>
  void read(const Linear& weight, int64_t block, int64_t blocks) {
    const int64_t G = weight.K / unit_of(bits_of(kKind));
    scale.resize(blocks * G);
    minimum.resize(has_minimums(kKind) ? blocks * G : 0);
    for (int64_t b = 0; b < blocks; b++) {
      ScaleReader<kKind> records;
      records.start(weight, block + b);
      for (int64_t g = b * G; g < (b + 1) * G; g++)
        if constexpr (has_signed_scales(kKind))
          scale[g] = records.read();
        else
          records.read(scale[g], minimum[g]);
    }
  }
};

// Whether M rows of x pass over two blocks of the weight at a time, which share the loads of x. A single block stays in level
// 1 while few rows pass. Reading minimums of both first pays from 33 rows on.
constexpr bool takes_two_blocks(Kind kind, int64_t M) {
  return kRegister == 64 && M > (has_minimums(kind) ? 32 : kind == kInt8 ? 7 : 8);
}

// kM rows of x times kBlocks blocks of 16 weight rows. `width` is the distance between two rows of y. scales: of several
// blocks whose scales are in records; a single block reads its own. ahead: asked for beside several blocks, per unit.
template <Kind kKind, int kM, int kBlocks>
void tile(const Activations& x, int64_t m0, const Linear& weight, BFloat16* y, int64_t block, int64_t width,
          const Scales& scales, Ahead ahead) {
  constexpr int kBits = bits_of(kKind);
  constexpr int64_t kUnit = unit_of(kBits), kUnitBytes = lines_of(kBits) * 64, kInGroup = kGroup / kUnit;
  constexpr int kLines = kBits == 8 ? kUnit / 4 : kUnit / 8;  // of low bits
  constexpr bool kHasHighLine = kBits == 5 || kBits == 6;
  const int64_t K = weight.K, G = K / kUnit, groups = K / kGroup;
  const int8_t* bytes = x.bytes.data() + m0 * K;
  const float* x_scale = x.scale.data() + m0 * groups;
  const float* x_sum = x.sum.data() + m0 * groups;
  constexpr int kByteBits = byte_bits_of(kKind);
  const int32_t* offset = (kByteBits == 8 ? x.offset8 : kByteBits == 6 ? x.offset6 : x.offset4).data() + m0 * G;
  const uint8_t* w = static_cast<const uint8_t*>(weight.weight) + block * G * kUnitBytes;
  constexpr bool kIsRead = has_read_scales(kKind, kBlocks);
  ScaleReader<kKind> records[kBlocks];
  for (int b = 0; kKind > kInt4 && !kIsRead && b < kBlocks; b++) records[b].start(weight, block + b);
  constexpr int kPaired = kHasPairSums ? kM / 2 * 2 : 0;  // rows of x
  static_assert(!kPaired || kBlocks == 1, "sums of pairs are of one block");
  Vec total[kBlocks][kM] = {};
  for (int64_t g = 0; g < G; g++) {
    if (kBlocks > 1) ahead.ask<kIntoL1>();
    PairSums<kByteBits> pairs[kPaired / 2 + 1];
    Bits before = {};  // the four channels before
    ByteSums<kByteBits> sum[kBlocks][kM];
    const auto offset_of = [&](int m) { return has_minimums(kKind) ? 0 : offset[m * G + g]; };
    Bits high[kBlocks] = {};
    for (int b = 0; kHasHighLine && b < kBlocks; b++) {
      const uint8_t* p = w + (b * G + g) * kUnitBytes + kLines * 64;
      if (kBlocks == 1) __builtin_prefetch(p + kAhead, 0, kIntoL1);
      high[b] = load_as<Bits>(p);
    }
#pragma GCC unroll 16
    for (int m = 0; m < kM; m++)
#pragma GCC unroll 16
      for (int b = 0; b < kBlocks; b++) sum[b][m].start(offset_of(m));
#pragma GCC unroll 8
    for (int j = 0; j < kLines; j++) {
      Bits packed[kBlocks];
      for (int b = 0; b < kBlocks; b++) {
        const uint8_t* p = w + (b * G + g) * kUnitBytes + j * 64;
        if (kBlocks == 1) __builtin_prefetch(p + kAhead, 0, kBits == 8 ? kIntoL2 : kIntoL1);
        packed[b] = load_as<Bits>(p);
      }
      for (int part = 0; part < (kBits == 8 ? 1 : 2); part++) {
        const int four = kBits == 8 ? j : 2 * j + part;
        const int64_t k = g * kUnit + four * 4;
        Bits levels[kBlocks];
        for (int b = 0; b < kBlocks; b++) {
          levels[b] = levels_of(kBits, packed[b], high[b], four);
          if (kKind == kNl4) levels[b] = look_up(kLookedUp, levels[b]);
        }
#pragma GCC unroll 4
        for (int m = 0; m < (four % 2 ? kPaired : 0); m += 2)
          pairs[m / 2].add(before, levels[0], bytes + m * K + k - 4, bytes + (m + 1) * K + k - 4);
        if (kPaired) before = levels[0];
#pragma GCC unroll 8
        for (int m = kPaired; m < kM; m++) {
          const int32_t x_four = load_as<int32_t>(bytes + m * K + k);
#pragma GCC unroll 4
          for (int b = 0; b < kBlocks; b++) sum[b][m].add(levels[b], x_four);
        }
      }
    }
#pragma GCC unroll 16
    for (int b = 0; b < kBlocks; b++) {
      Vec weight_scale = {}, minimum = {};
      if constexpr (kKind == kInt4)
        weight_scale = load(static_cast<const BFloat16*>(weight.scale) + ((block + b) * G + g) * kLanes);
      if constexpr (kKind == kByteScales) {
        if (kBlocks == 1) records[b].ask(g);
        weight_scale = records[b].read(g);
      }
      if constexpr (has_signed_scales(kKind)) weight_scale = kIsRead ? scales.scale[b * G + g] : records[b].read();
      if constexpr (has_minimums(kKind)) {
        if (kIsRead)
          weight_scale = scales.scale[b * G + g], minimum = scales.minimum[b * G + g];
        else
          records[b].read(weight_scale, minimum);
      }
#pragma GCC unroll 16
      for (int m = 0; m < kM; m++) {
        const int64_t group = m * groups + g / kInGroup;
        const Ints sums = m < kPaired ? pairs[m / 2].total(m % 2, offset_of(m)) : sum[b][m].total(offset_of(m));
        const Vec product = convert<Vec>(sums) * x_scale[group];
        total[b][m] += kKind == kInt8 ? product : product * weight_scale;
        if (has_minimums(kKind)) total[b][m] -= minimum * x_sum[group];
      }
    }
  }
#pragma GCC unroll 16
  for (int b = 0; b < kBlocks; b++) {
    const int64_t n = (block + b) * kLanes;
#pragma GCC unroll 16
    for (int m = 0; m < kM; m++) {
      Vec out = total[b][m];
      if (kKind == kInt8) out *= load(static_cast<const float*>(weight.scale) + n);
      if constexpr (kKind == kByteScales) out *= records[b].units();
      store(y + (m0 + m) * width + n, out);
    }
  }
}

// Up to kM rows.
template <Kind kKind, int kBlocks, int kM>
void few_rows(int64_t count, const Activations& x, int64_t m, const Linear& weight, BFloat16* y, int64_t block, int64_t width,
              const Scales& scales, Ahead ahead) {
  if (count == kM) return tile<kKind, kM, kBlocks>(x, m, weight, y, block, width, scales, ahead);
  if constexpr (kM > 1) few_rows<kKind, kBlocks, kM - 1>(count, x, m, weight, y, block, width, scales, ahead);
}

// Any number M of rows of x, as many at a time as there are registers for. Passes over several blocks have about equal
// numbers of rows, and each asks for a part of the next blocks before `end`.
template <Kind kKind, int kBlocks>
void rows(const Activations& x, int64_t M, const Linear& weight, BFloat16* y, int64_t block, int64_t end, int64_t width) {
  constexpr int kM = kRegister < 64 ? 4 : kBlocks == 1 ? 8 : 6;
  constexpr int64_t kLines = lines_of(bits_of(kKind));  // of a unit
  const int64_t G = weight.K / unit_of(bits_of(kKind)), next = block + kBlocks;
  const int64_t lines = std::clamp<int64_t>(end - next, 0, kBlocks) * kLines, passes = (M + kM - 1) / kM;
  const Ahead ahead{static_cast<const char*>(weight.weight) + next * G * kLines * 64, (lines + passes - 1) / passes};
  thread_local Scales scales;
  if constexpr (has_read_scales(kKind, kBlocks)) scales.read<kKind>(weight, block, kBlocks);
  const auto first = [&](int64_t pass) { return kBlocks > 1 ? M * pass / passes : std::min(M, pass * kM); };
  for (int64_t pass = 0; pass < passes; pass++) {
    const int64_t m = first(pass), asked = pass * ahead.count;
    few_rows<kKind, kBlocks, kM>(first(pass + 1) - m, x, m, weight, y, block, width, scales,
                                 {ahead.next + asked * G * 64, asked < lines ? ahead.count : 0});
  }
}

template <Kind kKind>
void blocks_of(const Activations& x, int64_t M, const Linear& weight, BFloat16* y, int64_t begin, int64_t end,
               int64_t width) {
  constexpr int kBlocks = kRegister == 64 ? 2 : 1;
  if (takes_two_blocks(kKind, M))
    for (; begin + kBlocks <= end; begin += kBlocks) rows<kKind, kBlocks>(x, M, weight, y, begin, end, width);
  for (; begin < end; begin++) rows<kKind, 1>(x, M, weight, y, begin, end, width);
}

}  // namespace

void Activations::quantize_row(const BFloat16* x, int64_t m, int64_t K, const int32_t* order) {
  const int64_t G = K / kGroup;
  for (int64_t g = 0; g < G; g++) {
    BFloat16 gathered[kGroup];
    for (int64_t i = 0; order && i < kGroup; i++) gathered[i] = x[order[g * kGroup + i]];
    const BFloat16* group = order ? gathered : x + g * kGroup;
    int32_t totals[2];
    scale[m * G + g] = quantize_group(group, kGroup, &bytes[m * K + g * kGroup], totals);
    const int32_t total = totals[0] + totals[1];
    sum[m * G + g] = scale[m * G + g] * static_cast<float>(total);
    offset8[m * G + g] = -128 * total;
    offset4[m * G + g] = -8 * total;
    for (int i = 0; i < 2; i++) offset6[2 * (m * G + g) + i] = -32 * totals[i];
  }
}

void packed_blocks(const Activations& x, int64_t M, const Linear& weight, BFloat16* y, int64_t begin, int64_t end,
                   int64_t width) {
  if (is_lossless(weight)) return lossless_rows(x.rows(), M, weight, y, begin * kLanes, end * kLanes, width);
  if (is_fp8(weight)) return fp8_blocks(x.rows(), M, weight, y, begin, end, width);
  const auto multiply = weight.bits == 8          ? blocks_of<kInt8>
                        : weight.bits == 6        ? blocks_of<kInt6>
                        : weight.bits == 5        ? blocks_of<kUint5>
                        : is_looked_up(weight)    ? blocks_of<kNl4>
                        : weight.span             ? blocks_of<kUint4>
                        : has_byte_scales(weight) ? blocks_of<kByteScales>
                                                  : blocks_of<kInt4>;
  multiply(x, M, weight, y, begin, end, width);
}

void qwen3fast_quantized_linear(const BFloat16* x, const Linear* weights, int64_t count, BFloat16* y, int64_t M,
                                int64_t threads) {
  if (M >= kManyRows && std::all_of(weights, weights + count, is_bfloat16))
    return linear_together(x, weights, count, y, M, threads);
  const int64_t K = weights[0].K;
  int64_t width = 0;
  for (int64_t i = 0; i < count; i++) width += weights[i].N;
  for (; M > kKeptRows; M -= kKeptRows, x += kKeptRows * K, y += kKeptRows * width)
    qwen3fast_quantized_linear(x, weights, count, y, kKeptRows, threads);
  const bool is_plain = std::all_of(weights, weights + count, takes_bfloat16);
  static thread_local Activations kept(0, 0);  // fresh memory would cost a page fault per 4 KiB in each call
  Activations& quantized = kept;  // in other threads, `kept` would be theirs
  if (!is_plain) quantized.make_room(M, K);
  quantized.where = x;
  parallel_for(is_plain ? 0 : M, 16, threads, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; m++) quantized.quantize_row(x + m * K, m, K);
  });
  parallel_for(width / kLanes, std::max<int64_t>(1, 32768 / (K * kLanes)), threads, [&](int64_t begin, int64_t end) {
    int64_t first = 0;  // block of this weight
    for (int64_t i = 0; i < count; i++) {
      const int64_t blocks = weights[i].N / kLanes;
      packed_blocks(quantized, M, weights[i], y + first * kLanes, std::max<int64_t>(begin - first, 0),
                    std::min(end - first, blocks), width);
      first += blocks;
    }
  }, parts_for(M));
}
