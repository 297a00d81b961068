// Attention over a KV cache: one query per row in decode_attention.cpp, chunks of queries in prefill_attention.cpp.
// T is the type of a cached number: BFloat16, or int8_t with one scale per vector.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "ops.h"
#include "parallel.h"
#include "vec.h"

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
  Cached from(int64_t position, int64_t D) const { return {keys + position * D, values + position * D, nullptr, nullptr}; }
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

// Attention of one query per row. A head's positions are divided into parts that their number alone decides: a row's result
// depends neither on other rows nor on the number of threads.
class DecodeAttention {
 public:
  // position: (M,); an empty row, at position -1, reads one position all the same: its result has no meaning, but is a number.
  DecodeAttention(const int64_t* position, int64_t M, int64_t K, int64_t G, int64_t S, int64_t D);

  // A thread's work. heads: of all K * M, ordered by key/value head, then by row. Where these shares differ by much, threads
  // share the parts of all heads instead, and merge them afterwards: has_parts.
  struct Share {
    Range heads, parts;
    bool has_parts;
  };
  Share share(int thread, int threads) const;

  int64_t row_of(int64_t head) const { return parts_[first_[head]].row; }
  int64_t head_of(int64_t head) const { return parts_[first_[head]].head; }

  // Does a thread's share. q: (M, K, G, D), its rows `stride` numbers apart. y: (M, K, G, D). All threads meet at the barrier if
  // they share parts; otherwise a head's keys are read by its owner alone.
  template <typename T>
  void run(const Share& own, const BFloat16* q, int64_t stride, const Cached<T>& cached, BFloat16* y, Barrier& barrier);

 private:
  struct Positions {
    int64_t head, row, begin, end, before;  // before: the number of positions in earlier parts
  };
  const int64_t M_, K_, G_, S_, D_;
  std::vector<Positions> parts_;  // and one behind the last
  std::vector<int64_t> first_;    // (K * M + 1): of each head's parts
  std::vector<Part> results_;     // of shared parts
};

// Attention of chunks of prompts, as qwen3fast_prefill_attention; q's tokens are q_stride numbers apart.
void attend_chunks(const BFloat16* q, int64_t q_stride, const Cache& cache, const int64_t* position, const int64_t* row,
                   BFloat16* y, int64_t B, int64_t T, int64_t H, int64_t K, int64_t S, int64_t D, int64_t tiles_from,
                   int64_t threads);
