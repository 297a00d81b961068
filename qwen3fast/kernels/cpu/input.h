// A thread's inputs of products in a decode step (decode_layers.cpp).

#pragma once

#include <cstdint>
#include <vector>

#include "ops.h"
#include "parallel.h"
#include "products.h"

namespace {

// A thread's own copy of the inputs of products: rows in bfloat16, and quantized to 8 bits for quantized weights.
struct Input {
  Lines<BFloat16> rows;
  Activations quantized;
  const int32_t* order = nullptr;  // in which `quantized` holds the channels
  bool is_plain = false;           // `quantized` holds bfloat16

  Input(int64_t M, int64_t K) : rows(M * K), quantized(M, K) {}

  // As `weight` needs the rows, and others of its kind with the same input and order of channels.
  void quantize(const BFloat16* from, int64_t M, int64_t K, const Linear& weight) {
    order = weight.order, is_plain = takes_bfloat16(weight);
    quantized.where = order ? nullptr : from;
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

// y[m, n] for the rows n of some blocks of 16; `width` is the distance between two rows m of y.
void multiply(const Linear& w, const BFloat16* x, const Activations& quantized, int64_t M, Range blocks, BFloat16* y,
              int64_t width) {
  if (w.bits == 16)
    return matvec_rows(x, M, static_cast<const BFloat16*>(w.weight), y, blocks.begin * kLanes, blocks.end * kLanes, width,
                       w.K);
  packed_blocks(quantized, M, w, y, blocks.begin, blocks.end, width);
}

}  // namespace
