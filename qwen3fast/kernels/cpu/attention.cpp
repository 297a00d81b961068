// One query per row over the used part of a KV cache, and many queries per row, with scores for a small tile only.
//
// Keys and values are bfloat16, or int8 with one scale per vector: k_scale, v_scale (R, K, S) float32.
// Arithmetic is in float32. Softmax runs online, block by block. Source: Milakov and Gimelshein, arXiv:1805.02867; the
// tiles of prefill: FlashAttention, arXiv:2205.14135. The plain PyTorch form is in kernels/attention.py.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "attend.h"
#include "ops.h"
#include "parallel.h"
#include "vec.h"

namespace {

constexpr int64_t kBlock = 128;     // positions between two updates of the running maximum

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

// The product of a key and a query, summed up to sixteen lanes.
inline Vec dot(const BFloat16* key, const BFloat16* query, int64_t D) {
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

// Rows of keys or values to prefetch. The hardware prefetches as well, but stops at page borders.
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

}  // namespace

// Positions begin..end of one key/value head; each key and value is read once for all G query heads.
template <typename T>
Part attend(const BFloat16* q, const Cached<T>& cached, int64_t G, int64_t D, int64_t begin, int64_t end, float scale) {
  constexpr bool kIsRounded = std::is_same_v<T, int8_t>;
  using Query = std::conditional_t<kIsRounded, float, BFloat16>;
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
      // The padding added exp(-87) at most, 1e-38.
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

template Part attend(const BFloat16*, const Cached<BFloat16>&, int64_t, int64_t, int64_t, int64_t, float);
template Part attend(const BFloat16*, const Cached<int8_t>&, int64_t, int64_t, int64_t, int64_t, float);

namespace {

template <typename T>
void decode_heads(const BFloat16* q, const Cached<T>& cached, const int64_t* position, int64_t B, int64_t K,
                  int64_t G, int64_t S, int64_t D, BFloat16* out, int64_t threads) {
  const float scale = 1.f / std::sqrt(static_cast<float>(D));
  // Threads share the key/value heads of all rows; where these are few, also each head's positions.
  // An empty row, at position -1, reads one position all the same: its result has no meaning, but is a number.
  const auto length_of = [&](int64_t b) { return std::clamp<int64_t>(position[b] + 1, 1, S); };
  int64_t longest = 1;
  for (int64_t b = 0; b < B; b++) longest = std::max(longest, length_of(b));
  const int64_t splits = std::clamp<int64_t>(threads / (B * K), 1, (longest + kMinSplit - 1) / kMinSplit);
  std::vector<Part> parts(B * K * splits, Part(0, 0));
  parallel_for(B * K * splits, 1, threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) {
      const int64_t head = i / splits, split = i % splits, length = length_of(head / K);
      parts[i] = attend(q + head * G * D, cached.head(head, S, D), G, D, length * split / splits,
                        length * (split + 1) / splits, scale);
    }
  });
  for (int64_t head = 0; head < B * K; head++) {
    Part& whole = parts[head * splits];
    for (int64_t split = 1; split < splits; split++) whole.merge(parts[head * splits + split], G, D);
    for (int64_t i = 0; i < G * D; i++)
      out[head * G * D + i] = BFloat16(whole.out[i] / whole.total[i / D]);
  }
}

}  // namespace

void qwen3fast_decode_attention(const BFloat16* q, const Cache* cache, const int64_t* position, BFloat16* y, int64_t B,
                                int64_t H, int64_t K, int64_t S, int64_t D, int64_t threads) {
  if (cache->key_scale)
    decode_heads(q, Cached<int8_t>(*cache), position, B, K, H / K, S, D, y, threads);
  else
    decode_heads(q, Cached<BFloat16>(*cache), position, B, K, H / K, S, D, y, threads);
}

// ----------------------------------------------------------------------------------------------- prefill attention

namespace {

constexpr int64_t kQueries = 32;  // of a tile, each with the G heads of a group
constexpr int64_t kKeys = 64;     // of a tile

// Scores of four queries and four keys at a time. q: (rows, D), k: (count, D), score: (rows, kKeys); rows and count are
// multiples of four; the last keys are repeated if there are fewer.
void score_tile(const BFloat16* q, const BFloat16* k, int64_t rows, int64_t count, int64_t D, float scale,
                float* score) {
  for (int64_t t = 0; t < count; t += 4) {
    const BFloat16* key[4];
    for (int j = 0; j < 4; j++) key[j] = k + std::min(t + j, count - 1) * D;
    for (int64_t r = 0; r < rows; r += 4) {
      Vec dots[kLanes] = {};
      for (int64_t d = 0; d < D; d += 2 * kLanes) {
        Bits query[4], other[4];
        for (int i = 0; i < 4; i++) query[i] = load_as<Bits>(q + (r + i) * D + d);
        for (int j = 0; j < 4; j++) other[j] = load_as<Bits>(key[j] + d);
        for (int i = 0; i < 4; i++)
          for (int j = 0; j < 4; j++) dots[4 * i + j] = dot2(dots[4 * i + j], query[i], other[j]);
      }
      const Vec four_by_four = sums(dots) * scale;
      for (int i = 0; i < 4; i++)
        std::memcpy(score + (r + i) * kKeys + t, reinterpret_cast<const float*>(&four_by_four) + 4 * i, 4 * sizeof(float));
    }
  }
}

// out += weight v for four rows and kChunks * 16 channels at a time. weight: (rows, kKeys) bfloat16; pairs: (kKeys/2, D),
// two neighboring positions' values in 32 bits.
template <int kChunks>
void add_tile(const BFloat16* weight, const uint32_t* pairs, int64_t rows, int64_t num_pairs, int64_t D, float* out) {
  for (int64_t r = 0; r < rows; r += 4) {
    Vec total[4][kChunks];
    for (int i = 0; i < 4; i++)
      for (int c = 0; c < kChunks; c++) total[i][c] = load(out + (r + i) * D + c * kLanes);
    for (int64_t t = 0; t < num_pairs; t++) {
      Bits value[kChunks];
      for (int c = 0; c < kChunks; c++) value[c] = load_as<Bits>(pairs + t * D + c * kLanes);
      for (int i = 0; i < 4; i++) {
        const Bits two = load_as<uint32_t>(weight + (r + i) * kKeys + 2 * t) + Bits{};
        for (int c = 0; c < kChunks; c++) total[i][c] = dot2(total[i][c], two, value[c]);
      }
    }
    for (int i = 0; i < 4; i++)
      for (int c = 0; c < kChunks; c++) store(out + (r + i) * D + c * kLanes, total[i][c]);
  }
}

// Sixteen cached numbers as bits of bfloat16, each in the lower half of a lane.
inline Bits cached_bits(const BFloat16* p, float) { return __builtin_convertvector(load_as<Half>(p), Bits); }
inline Bits cached_bits(const int8_t* p, float scale) { return as_bfloat16(load(p) * scale); }

// Keys as bfloat16: in place, or converted and written to `room`.
inline const BFloat16* tile_keys(const BFloat16* k, const float*, int64_t, int64_t, BFloat16*) { return k; }

const BFloat16* tile_keys(const int8_t* k, const float* scale, int64_t count, int64_t D, BFloat16* room) {
  for (int64_t t = 0; t < count; t++)
    for (int64_t d = 0; d < D; d += kLanes) store(room + t * D + d, load(k + t * D + d) * scale[t]);
  return room;
}

// Room for one tile, kept by a thread from tile to tile.
struct Tile {
  std::vector<BFloat16> q, keys, weight;
  std::vector<float> score, out, maximum, total;
  std::vector<uint32_t> pairs;

  Tile(int64_t rows, int64_t D)
      : q(rows * D), keys(kKeys * D), weight(rows * kKeys), score(rows * kKeys), out(rows * D), maximum(rows), total(rows),
        pairs(kKeys / 2 * D) {}
};

// `count` queries of one key/value head over all keys up to each one's position. q and y point at the first query's
// first head of the group; the next query is `stride` numbers on. Row r of the tile is query r / G, head r % G.
template <typename T>
void attend_tile(Tile& tile, const BFloat16* q, int64_t stride, const int64_t* position, int64_t count,
                 const Cached<T>& cached, int64_t S, int64_t G, int64_t D, float scale, BFloat16* y) {
  const auto [k, v, k_scale, v_scale] = cached;
  const int64_t used = count * G, rows = (used + 3) / 4 * 4;
  for (int64_t r = 0; r < rows; r++)  // the last row is repeated up to a multiple of four
    std::copy_n(q + std::min(r, used - 1) / G * stride + std::min(r, used - 1) % G * D, D, &tile.q[r * D]);
  std::fill_n(tile.out.begin(), rows * D, 0.f);
  std::fill_n(tile.total.begin(), rows, 0.f);
  std::fill_n(tile.maximum.begin(), rows, -1e30f);
  const int64_t end = std::min(*std::max_element(position, position + count) + 1, S);
  for (int64_t start = 0; start < end; start += kKeys) {
    const int64_t keys = std::min(kKeys, end - start), padded = (keys + kLanes - 1) / kLanes * kLanes;
    const BFloat16* key = tile_keys(k + start * D, k_scale + (k_scale ? start : 0), keys, D, tile.keys.data());
    score_tile(tile.q.data(), key, rows, keys, D, scale, tile.score.data());
    for (int64_t r = 0; r < rows; r++) {
      float* s = &tile.score[r * kKeys];
      const int64_t visible = position[std::min(r, used - 1) / G] + 1 - start;
      for (int64_t t = std::max<int64_t>(0, std::min(visible, keys)); t < padded; t++) s[t] = -1e30f;
      Vec most = load(s);
      for (int64_t t = kLanes; t < padded; t += kLanes) most = larger(most, load(s + t));
      const float maximum = std::max(tile.maximum[r], largest(most));
      const float shrink = std::exp(tile.maximum[r] - maximum);
      Vec total = {};
      for (int64_t t = 0; t < padded; t += kLanes) {
        const Vec weight = exp_of_negative(load(s + t) - maximum);
        store(&tile.weight[r * kKeys + t], weight);
        total += weight;
      }
      tile.total[r] = tile.total[r] * shrink + sum(total);
      tile.maximum[r] = maximum;
      if (shrink < 1)
        for (int64_t d = 0; d < D; d++) tile.out[r * D + d] *= shrink;
    }
    for (int64_t t = 0; t < padded; t += 2) {
      const int64_t first = start + std::min(t, keys - 1), second = start + std::min(t + 1, keys - 1);
      const float first_scale = v_scale ? v_scale[first] : 1.f, second_scale = v_scale ? v_scale[second] : 1.f;
      for (int64_t d = 0; d < D; d += kLanes) {
        const Bits pair = cached_bits(v + first * D + d, first_scale) | cached_bits(v + second * D + d, second_scale) << 16;
        std::memcpy(&tile.pairs[t / 2 * D + d], &pair, sizeof pair);
      }
    }
    int64_t d = 0;
    for (; d + 4 * kLanes <= D; d += 4 * kLanes)
      add_tile<4>(tile.weight.data(), &tile.pairs[d], rows, padded / 2, D, &tile.out[d]);
    for (; d < D; d += kLanes) add_tile<1>(tile.weight.data(), &tile.pairs[d], rows, padded / 2, D, &tile.out[d]);
  }
  for (int64_t r = 0; r < used; r++)
    for (int64_t d = 0; d < D; d += kLanes)
      store(y + r / G * stride + r % G * D + d, load(&tile.out[r * D + d]) / tile.total[r]);
}

template <typename N>
void prefill_heads(const BFloat16* q, const Cached<N>& cached, const int64_t* position, const int64_t* row, BFloat16* y,
                   int64_t B, int64_t T, int64_t H, int64_t K, int64_t S, int64_t D, int64_t threads) {
  const float scale = 1.f / std::sqrt(static_cast<float>(D));
  const int64_t G = H / K, tiles = (T + kQueries - 1) / kQueries;
  parallel_for(B * K * tiles, 1, threads, [&](int64_t begin, int64_t end) {
    Tile tile((kQueries * G + 3) / 4 * 4, D);
    for (int64_t i = begin; i < end; i++) {
      const int64_t b = i / tiles / K, head = i / tiles % K, first = i % tiles * kQueries;
      const int64_t offset = ((b * T + first) * H + head * G) * D;
      attend_tile(tile, q + offset, H * D, position + b * T + first, std::min(kQueries, T - first),
                  cached.head(row[b] * K + head, S, D), S, G, D, scale, y + offset);
    }
  });
}

}  // namespace

void qwen3fast_prefill_attention(const BFloat16* q, const Cache* cache, const int64_t* position, const int64_t* row,
                                 BFloat16* y, int64_t B, int64_t T, int64_t H, int64_t K, int64_t S, int64_t D,
                                 int64_t threads) {
  if (cache->key_scale)
    prefill_heads(q, Cached<int8_t>(*cache), position, row, y, B, T, H, K, S, D, threads);
  else
    prefill_heads(q, Cached<BFloat16>(*cache), position, row, y, B, T, H, K, S, D, threads);
}
