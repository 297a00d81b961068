// A thread's inputs of products in a decode step (decode_layers.cpp).

#pragma once

#include <cstdint>
#include <vector>

#include "ops.h"
#include "parallel.h"
#include "products.h"
#include "tiles.h"

namespace {

// A thread's own copy of the inputs of products: rows in bfloat16, quantized to 8 bits for quantized weights, and in pairs
// for weights in bfloat16 that are multiplied by tiles.
struct Input {
  Lines<BFloat16> rows;
  Activations quantized;
  Lines<uint32_t> pairs;           // per 16 rows; empty without tiles
  const int32_t* order = nullptr;  // in which `quantized` holds the channels
  bool is_plain = false;           // `quantized` holds bfloat16

  Input(int64_t M, int64_t K, Tiles tiles = kNoTiles)
      : rows(M * K), quantized(M, K), pairs(tiles ? (M + kLanes - 1) / kLanes * kLanes * K / 2 : 0) {}

  bool has_tiles(const Linear& weight) const { return !pairs.empty() && weight.bits == 16 && weight.K % kTileDepth == 0; }

  // As `weight` needs the rows, and others of its kind with the same input and order of channels.
  void quantize(const BFloat16* from, int64_t M, int64_t K, const Linear& weight) {
    order = weight.order, is_plain = takes_bfloat16(weight);
    quantized.where = order ? nullptr : from;
    for (int64_t m = 0; has_tiles(weight) && m < M; m += kLanes)
      put_into_pairs(from + m * K, std::min(M - m, kLanes), K, kLanes, &pairs[m * K / 2]);
    if (weight.bits == 16 || (is_plain && !order)) return;
    if (is_plain) quantized.copies.resize(M * K);
    for (int64_t m = 0; m < M; m++)
      is_plain ? quantized.copy_row(from + m * K, m, K, order) : quantized.quantize_row(from + m * K, m, K, order);
  }

  // The same for a further weight with the same input.
  void reorder(const BFloat16* from, int64_t M, int64_t K, const Linear& weight) {
    if (weight.order != order || takes_bfloat16(weight) != is_plain) quantize(from, M, K, weight);
  }
};

// y[m, n] for the rows n of some blocks of 16; `width` is the distance between two rows m of y. x: what `input` was made of.
void multiply(const Linear& w, const BFloat16* x, const Input& input, int64_t M, Range blocks, BFloat16* y, int64_t width) {
  const int64_t n0 = blocks.begin * kLanes, n1 = blocks.end * kLanes;
  const auto* const plain = static_cast<const BFloat16*>(w.weight);
  if (input.has_tiles(w)) return tile_rows(input.pairs.data(), M, plain, y, n0, n1, width, w.K);
  if (w.bits == 16) return matvec_rows(x, M, plain, y, n0, n1, width, w.K);
  packed_blocks(input.quantized, M, w, y, blocks.begin, blocks.end, width);
}

}  // namespace
