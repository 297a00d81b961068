// Parts of a transformer block that decode_layers.cpp and prefill_layers.cpp share.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "ops.h"
#include "products.h"

namespace {

// One vector of model/norm.py.
inline void rms_norm(const BFloat16* x, const BFloat16* weight, int64_t size, float eps, BFloat16* y) {
  Vec squares = {};
  for (int64_t i = 0; i < size; i += kLanes) squares += load(x + i) * load(x + i);
  const float scale = 1.f / std::sqrt(sum(squares) / static_cast<float>(size) + eps);
  for (int64_t i = 0; i < size; i += kLanes) store(y + i, round_to_bfloat16(load(x + i) * scale) * load(weight + i));
}

// One head of model/rope.py, in place.
inline void rotate(BFloat16* x, const float* cos, const float* sin, int64_t D) {
  for (int64_t i = 0; i < D / 2; i += kLanes) {
    const Vec first = load(x + i), second = load(x + D / 2 + i);
    store(x + i, first * load(cos + i) - second * load(sin + i));
    store(x + D / 2 + i, second * load(cos + D / 2 + i) + first * load(sin + D / 2 + i));
  }
}

// Writes one vector to the cache. Source of int8_t's form: quantize_vectors in model/kv_cache.py.
inline void write_vector(const BFloat16* from, int64_t D, BFloat16* to, float*) { std::copy_n(from, D, to); }

inline void write_vector(const BFloat16* from, int64_t D, int8_t* to, float* scale) {
  int32_t totals[2];
  *scale = quantize_group(from, D, to, totals);
}

}  // namespace
