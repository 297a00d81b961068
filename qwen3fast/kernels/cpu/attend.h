// One query over keys and values: what decode_attention and decode_layers share (decode_attention.cpp). Chunks of queries:
// prefill_attention.cpp.
// T is the type of a cached number: BFloat16, or int8_t with one scale per vector.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "ops.h"
#include "vec.h"

constexpr int64_t kMinSplit = 256;  // positions that are worth a thread of their own

// One head's keys and values, (S, D) each, and for int8_t their scales, (S,) each; or all heads' together; or nothing.
template <typename T>
struct Cached {
  const T *keys = nullptr, *values = nullptr;
  const float *key_scale = nullptr, *value_scale = nullptr;

  Cached() = default;
  explicit Cached(const Cache& c)
      : Cached(static_cast<const T*>(c.keys), static_cast<const T*>(c.values), c.key_scale, c.value_scale) {}
  Cached(const T* keys, const T* values, const float* key_scale, const float* value_scale)
      : keys(keys), values(values), key_scale(key_scale), value_scale(value_scale) {}

  Cached head(int64_t index, int64_t S, int64_t D) const {
    return {keys + index * S * D, values + index * S * D, key_scale ? key_scale + index * S : nullptr,
            value_scale ? value_scale + index * S : nullptr};
  }
};

// The next 32 channels of a value as two vectors, in an order that depends on the type; and the same in bfloat16, in order.
FORCE_INLINE void load_two(const BFloat16* p, Vec* two) {
  const Bits pairs = load_as<Bits>(p);
  two[0] = as<Vec>(pairs << 16), two[1] = as<Vec>(pairs & 0xffff0000u);
}

FORCE_INLINE void load_two(const int8_t* p, Vec* two) { two[0] = load(p), two[1] = load(p + kLanes); }

template <typename T>
FORCE_INLINE void store_two(BFloat16* p, Vec first, Vec second) {
  if (std::is_same_v<T, int8_t>) {
    store(p, first), store(p + kLanes, second);
    return;
  }
  store_as_is(p, as_bfloat16(first, second));
}

// The result of one key/value head for its G query heads over some positions: the largest score, the sum of
// exp(score - maximum), and the values weighted by these, (G, D) in the order of `load_two`. Parts
// over different positions can be merged.
// Source: online softmax, Milakov and Gimelshein, arXiv:1805.02867.
struct Part {
  Lines<float> maximum, total, out;

  // Removes all positions.
  void clear(int64_t G, int64_t D) {
    maximum.assign(G, -1e30f);
    total.assign(G, 0.f);
    out.assign(G * D, 0.f);
  }

  // Makes room for scores up to `limit` of head g. Returns the new maximum.
  float raise(int64_t g, int64_t D, float limit) {
    if (limit <= maximum[g]) return maximum[g];
    const float next = limit, shrink = std::exp(maximum[g] - next);
    maximum[g] = next;
    total[g] *= shrink;
    for (int64_t d = 0; d < D; d++) out[g * D + d] *= shrink;
    return next;
  }

  void merge(const Part& other, int64_t G, int64_t D) {
    for (int64_t g = 0; g < G; g++) {
      const float scale = std::exp(other.maximum[g] - raise(g, D, other.maximum[g]));
      total[g] += other.total[g] * scale;
      for (int64_t d = 0; d < D; d++) out[g * D + d] += other.out[g * D + d] * scale;
    }
  }

  // Writes the weighted means, (G, D), of values of type T.
  template <typename T>
  void write(int64_t G, int64_t D, BFloat16* y) const {
    for (int64_t i = 0; i < G * D; i += 2 * kLanes)
      store_two<T>(y + i, load(&out[i]) / total[i / D], load(&out[i + kLanes]) / total[i / D]);
  }
};

// Positions begin..end of one key/value head, into `part`; each key and value is read once for all G query heads.
// D: a multiple of 32. `following`: what the caller reads next, which is asked for ahead; or nothing.
template <typename T>
void attend(const BFloat16* q, const Cached<T>& cached, int64_t G, int64_t D, int64_t begin, int64_t end, float scale,
            const Cached<T>& following, Part& part);

// Attention of chunks of prompts, as qwen3fast_prefill_attention; q's tokens are q_stride numbers apart.
void attend_chunks(const BFloat16* q, int64_t q_stride, const Cache& cache, const int64_t* position, const int64_t* row,
                   BFloat16* y, int64_t B, int64_t T, int64_t H, int64_t K, int64_t S, int64_t D, int64_t threads);
