// One query over keys and values: the part of attention that decode_attention and decode_layers share.
// T is the type of a cached number: at::BFloat16, or int8_t with a factor for each vector.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "vec.h"

namespace {

constexpr int64_t kBlock = 128;     // positions between two updates of the running maximum
constexpr int64_t kMinSplit = 256;  // positions that are worth a thread of their own

// The sums of sixteen vectors, as one vector: each step adds halves of two vectors side by side.
inline Vec sums(Vec* v) {
#define HALVES(a, b, lo, hi) __builtin_shufflevector(a, b, lo) + __builtin_shufflevector(a, b, hi)
#define LO8 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define HI8 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
#define LO4 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27
#define HI4 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31
#define LO2 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define HI2 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#define LO1 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30
#define HI1 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31
  for (int i = 0; i < 8; i++) v[i] = HALVES(v[i], v[i + 8], LO8, HI8);
  for (int i = 0; i < 4; i++) v[i] = HALVES(v[i], v[i + 4], LO4, HI4);
  for (int i = 0; i < 2; i++) v[i] = HALVES(v[i], v[i + 2], LO2, HI2);
  return HALVES(v[0], v[1], LO1, HI1);
}

// exp(x) for x <= 0, to about 2e-7 relative: 2^n from the exponent's bits, 2^f for |f| <= 0.5 from the series of exp.
inline Vec exp_of_negative(Vec x) {
  const Vec y = (x > -87.f ? x : fill(-87.f)) * 1.44269504f;
  const Ints n = __builtin_convertvector(y - 0.5f, Ints);  // rounds towards zero, so to the nearest for y <= 0
  const Vec f = (y - __builtin_convertvector(n, Vec)) * 0.693147181f;
  Vec series = fill(1.f / 720);
  for (const float term : {1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f}) series = series * f + term;
  const Ints power = (n + 127) << 23;
  Vec scale;
  std::memcpy(&scale, &power, sizeof scale);
  return series * scale;
}

// One head's keys and values, (S, D) each, and for int8_t their factors, (S,) each.
template <typename T>
struct Cached {
  const T *keys, *values;
  const float *key_scale, *value_scale;

  Cached head(int64_t index, int64_t S, int64_t D) const {
    return {keys + index * S * D, values + index * S * D, key_scale ? key_scale + index * S : nullptr,
            value_scale ? value_scale + index * S : nullptr};
  }
};

// The product of a key and a query, summed up to sixteen lanes.
inline Vec dot(const at::BFloat16* key, const at::BFloat16* query, int64_t D) {
  Vec total = {};
  int64_t d = 0;
  for (; d + 2 * kLanes <= D; d += 2 * kLanes) total = dot2(total, load_as<Bits>(key + d), load_as<Bits>(query + d));
  for (; d < D; d += kLanes) total += load(key + d) * load(query + d);
  return total;
}

inline Vec dot(const int8_t* key, const float* query, int64_t D) {
  Vec total = {};
  for (int64_t d = 0; d < D; d += kLanes) total += load(key + d) * load(query + d);
  return total;
}

// Rows of keys or values to ask memory for before they are needed. The hardware does so, too, but stops at page borders.
constexpr int64_t kRowsAhead = 24;

template <typename T>
inline void prefetch(const T* p, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof *p;
  for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(p + i, 0, 2);
}

// out[g] += sum_t score[g][t] v[t] over kChunks * 16 channels of two query heads; all sums stay in registers.
template <int kChunks, typename T>
void add_values(const float* score, const float* other_score, const T* v, int64_t D, int64_t count, const T* next,
                float* out, float* other_out) {
  Vec a[kChunks], b[kChunks];
  for (int c = 0; c < kChunks; c++) a[c] = load(out + c * kLanes), b[c] = load(other_out + c * kLanes);
  for (int64_t t = 0; t < count; t++) {
    const Vec weight = fill(score[t]), other_weight = fill(other_score[t]);
    if (next) prefetch(t + kRowsAhead < count ? v + (t + kRowsAhead) * D : next + (t + kRowsAhead - count) * D, kChunks * kLanes);
    for (int c = 0; c < kChunks; c++) {
      const Vec value = load(v + t * D + c * kLanes);
      a[c] += weight * value;
      b[c] += other_weight * value;
    }
  }
  // An odd last head is computed twice, with the same result.
  for (int c = 0; c < kChunks; c++) store(other_out + c * kLanes, b[c]), store(out + c * kLanes, a[c]);
}

// What one key/value head gives for its G query heads over some positions: the largest score, the sum of
// exp(score - maximum), and the values weighted by these, (G, D). Parts over different positions can be merged.
// Source: online softmax, Milakov and Gimelshein, arXiv:1805.02867.
struct Part {
  std::vector<float> maximum, total, out;

  Part(int64_t G, int64_t D) : maximum(G, -1e30f), total(G, 0.f), out(G * D, 0.f) {}

  // Makes room for scores up to `limit` of head g. Returns the new maximum.
  float raise(int64_t g, int64_t D, float limit) {
    const float next = std::max(maximum[g], limit), shrink = std::exp(maximum[g] - next);
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
};

// Positions begin..end of one key/value head; each key and value is read once for all G query heads.
template <typename T>
Part attend(const at::BFloat16* q, const Cached<T>& cached, int64_t G, int64_t D, int64_t begin, int64_t end,
            float scale) {
  constexpr bool kIsRounded = std::is_same_v<T, int8_t>;
  using Query = std::conditional_t<kIsRounded, float, at::BFloat16>;
  const auto [k, v, k_scale, v_scale] = cached;
  std::vector<Query> query(q, q + G * D);
  Part part(G, D);
  std::vector<float> score(G * kBlock);
  for (int64_t start = begin; start < end; start += kBlock) {
    const int64_t count = std::min(kBlock, end - start);
    for (int64_t t = 0; t < count; t += kLanes) {
      for (int64_t i = 0; i < kLanes; i++) {
        const int64_t row = t + i + kRowsAhead;
        prefetch(row < count ? k + (start + row) * D : v + (start + row - count) * D, D);
      }
      for (int64_t g = 0; g < G; g++) {
        Vec dots[kLanes];
        for (int64_t i = 0; i < kLanes; i++) dots[i] = dot(k + (start + std::min(t + i, count - 1)) * D, &query[g * D], D);
        store(score.data() + g * kBlock + t, sums(dots) * scale);
      }
    }
    for (int64_t g = 0; g < G; g++) {
      float* s = score.data() + g * kBlock;
      if (kIsRounded)
        for (int64_t t = 0; t < count; t++) s[t] *= k_scale[start + t];
      for (int64_t t = count; t % kLanes; t++) s[t] = -1e30f;
      Vec most = load(s), total = {};
      for (int64_t t = kLanes; t < count; t += kLanes) most = larger(most, load(s + t));
      const float maximum = part.raise(g, D, largest(most));
      for (int64_t t = 0; t < count; t += kLanes) {
        const Vec weight = exp_of_negative(load(s + t) - maximum);
        store(s + t, weight);
        total += weight;
      }
      // What the padding added: exp(-87) at most, 1e-38.
      part.total[g] += sum(total);
      if (kIsRounded)
        for (int64_t t = 0; t < count; t++) s[t] *= v_scale[start + t];
    }
    for (int64_t g = 0; g < G; g += 2) {
      const int64_t other = std::min(g + 1, G - 1);
      const float *s = score.data() + g * kBlock, *other_s = score.data() + other * kBlock;
      float *out = part.out.data() + g * D, *other_out = part.out.data() + other * D;
      const T *value = v + start * D, *next = g == 0 ? k + (start + count) * D : nullptr;
      int64_t d = 0;
      for (; d + 8 * kLanes <= D; d += 8 * kLanes) add_values<8>(s, other_s, value + d, D, count, next ? next + d : nullptr, out + d, other_out + d);
      for (; d + 4 * kLanes <= D; d += 4 * kLanes) add_values<4>(s, other_s, value + d, D, count, next ? next + d : nullptr, out + d, other_out + d);
      for (; d < D; d += kLanes) add_values<1>(s, other_s, value + d, D, count, next ? next + d : nullptr, out + d, other_out + d);
    }
  }
  return part;
}

}  // namespace
