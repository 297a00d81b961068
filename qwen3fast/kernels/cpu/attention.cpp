// decode_attention(q, k, v, position) -> y          one query a row over the used part of a KV cache
// prefill_attention(q, k, v, position, row) -> y    many queries a row; scores exist for a small tile only
//
// Keys and values are bfloat16, or int8 with a factor for each vector: k_scale, v_scale (R, K, S) float32.
// Arithmetic is in float32. Softmax runs online, block by block. Source: Milakov and Gimelshein, arXiv:1805.02867; the
// tiles of prefill: FlashAttention, arXiv:2205.14135. The plain PyTorch form is in model/attention.py.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "attend.h"
#include "ops.h"

namespace {

using qwen3fast::Factors;

void check_cache(const char* name, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const Factors& k_scale,
                 const Factors& v_scale) {
  const bool is_rounded = k.scalar_type() == at::kChar;
  TORCH_CHECK(q.scalar_type() == at::kBFloat16 && (is_rounded || k.scalar_type() == at::kBFloat16) &&
                  v.scalar_type() == k.scalar_type(),
              name, ": bfloat16 only (keys and values: or int8)");
  TORCH_CHECK(k.is_contiguous() && v.is_contiguous() && k.sizes() == v.sizes() && k.size(3) == q.size(3) &&
                  q.size(2) % k.size(1) == 0,
              name, ": k and v (R, K, S, D) contiguous, heads a multiple of K");
  TORCH_CHECK(k_scale.has_value() == is_rounded && v_scale.has_value() == is_rounded, name, ": factors for int8 only");
  if (is_rounded)
    for (const at::Tensor& scale : {*k_scale, *v_scale})
      TORCH_CHECK(scale.scalar_type() == at::kFloat && scale.is_contiguous() && scale.sizes() == k.sizes().slice(0, 3),
                  name, ": factors (R, K, S) float32, contiguous");
}

template <typename T>
Cached<T> as_cached(const at::Tensor& k, const at::Tensor& v, const Factors& k_scale, const Factors& v_scale) {
  return {k.const_data_ptr<T>(), v.const_data_ptr<T>(), k_scale ? k_scale->const_data_ptr<float>() : nullptr,
          v_scale ? v_scale->const_data_ptr<float>() : nullptr};
}

template <typename T>
void decode_heads(const at::BFloat16* q, const Cached<T>& cached, const int64_t* position, int64_t B, int64_t K,
                  int64_t G, int64_t S, int64_t D, at::BFloat16* out) {
  const float scale = 1.f / std::sqrt(static_cast<float>(D));
  // Threads share out the key/value heads of all rows; where these are few, each head's positions, too.
  const int64_t longest = std::min(*std::max_element(position, position + B) + 1, S);
  const int64_t splits = std::clamp<int64_t>(at::get_num_threads() / (B * K), 1, (longest + kMinSplit - 1) / kMinSplit);
  std::vector<Part> parts(B * K * splits, Part(0, 0));
  at::parallel_for(0, B * K * splits, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) {
      const int64_t head = i / splits, split = i % splits, length = std::min(position[head / K] + 1, S);
      parts[i] = attend(q + head * G * D, cached.head(head, S, D), G, D, length * split / splits,
                        length * (split + 1) / splits, scale);
    }
  });
  for (int64_t head = 0; head < B * K; head++) {
    Part& whole = parts[head * splits];
    for (int64_t split = 1; split < splits; split++) whole.merge(parts[head * splits + split], G, D);
    for (int64_t i = 0; i < G * D; i++)
      out[head * G * D + i] = static_cast<at::BFloat16>(whole.out[i] / whole.total[i / D]);
  }
}

}  // namespace

// q: (B, 1, H, D) bfloat16; k, v: (R, K, S, D) with R >= B; position: (B, 1) int64, the query's own place. Positions
// 0..position are attended to. Returns (B, H, 1, D) bfloat16.
at::Tensor qwen3fast::decode_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& position,
                            const Factors& k_scale, const Factors& v_scale) {
  const int64_t B = q.size(0), H = q.size(2), D = q.size(3), K = k.size(1), S = k.size(2), G = H / K;
  check_cache("decode_attention", q, k, v, k_scale, v_scale);
  TORCH_CHECK(D % kLanes == 0 && q.size(1) == 1 && B <= k.size(0) && position.numel() == B,
              "decode_attention: q (B, 1, H, D), D a multiple of 16, a position for each");
  const at::Tensor queries = q.contiguous(), places = position.contiguous();
  at::Tensor y = q.new_empty({B, H, 1, D});
  const auto run = [&](const auto& cached) {
    decode_heads(queries.const_data_ptr<at::BFloat16>(), cached, places.const_data_ptr<int64_t>(), B, K, G, S, D,
                 y.mutable_data_ptr<at::BFloat16>());
  };
  k_scale ? run(as_cached<int8_t>(k, v, k_scale, v_scale)) : run(as_cached<at::BFloat16>(k, v, k_scale, v_scale));
  return y;
}

// ----------------------------------------------------------------------------------------------- prefill attention

namespace {

constexpr int64_t kQueries = 32;  // of a tile, each with the G heads of a group
constexpr int64_t kKeys = 64;     // of a tile

// Scores of four queries and four keys at a time. q: (rows, D), k: (count, D), score: (rows, kKeys); rows and count are
// multiples of four but for the last keys, which are repeated.
void score_tile(const at::BFloat16* q, const at::BFloat16* k, int64_t rows, int64_t count, int64_t D, float scale,
                float* score) {
  for (int64_t t = 0; t < count; t += 4) {
    const at::BFloat16* key[4];
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
// two neighbouring positions' values in 32 bits.
template <int kChunks>
void add_tile(const at::BFloat16* weight, const uint32_t* pairs, int64_t rows, int64_t num_pairs, int64_t D, float* out) {
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
inline Bits cached_bits(const at::BFloat16* p, float) { return __builtin_convertvector(load_as<Half>(p), Bits); }
inline Bits cached_bits(const int8_t* p, float scale) { return as_bfloat16(load(p) * scale); }

// Keys as bfloat16: where they are, or rounded ones written to `room`.
inline const at::BFloat16* tile_keys(const at::BFloat16* k, const float*, int64_t, int64_t, at::BFloat16*) { return k; }

const at::BFloat16* tile_keys(const int8_t* k, const float* scale, int64_t count, int64_t D, at::BFloat16* room) {
  for (int64_t t = 0; t < count; t++)
    for (int64_t d = 0; d < D; d += kLanes) store(room + t * D + d, load(k + t * D + d) * scale[t]);
  return room;
}

// Room for one tile, kept by a thread from tile to tile.
struct Tile {
  std::vector<at::BFloat16> q, keys, weight;
  std::vector<float> score, out, maximum, total;
  std::vector<uint32_t> pairs;

  Tile(int64_t rows, int64_t D)
      : q(rows * D), keys(kKeys * D), weight(rows * kKeys), score(rows * kKeys), out(rows * D), maximum(rows), total(rows),
        pairs(kKeys / 2 * D) {}
};

// `count` queries of one key/value head over all keys up to each one's position. q and y point at the first query's
// first head of the group; the next query is `stride` numbers on. Row r of the tile is query r / G, head r % G.
template <typename T>
void attend_tile(Tile& tile, const at::BFloat16* q, int64_t stride, const int64_t* position, int64_t count,
                 const Cached<T>& cached, int64_t S, int64_t G, int64_t D, float scale, at::BFloat16* y) {
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
    const at::BFloat16* key = tile_keys(k + start * D, k_scale + (k_scale ? start : 0), keys, D, tile.keys.data());
    score_tile(tile.q.data(), key, rows, keys, D, scale, tile.score.data());
    for (int64_t r = 0; r < rows; r++) {
      float* s = &tile.score[r * kKeys];
      const int64_t visible = position[std::min(r, used - 1) / G] + 1 - start;
      for (int64_t t = std::max<int64_t>(0, std::min(visible, keys)); t < padded; t++) s[t] = -1e30f;
      const float maximum = std::max(tile.maximum[r], *std::max_element(s, s + padded));
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

}  // namespace

// q: (B, T, H, D) bfloat16; k, v: (R, K, S, D); position: (B, T) int64; row: (B,) int64, the cache row of each batch row.
// A query attends to positions 0..its own. Returns (B, T, H, D) bfloat16.
at::Tensor qwen3fast::prefill_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& position,
                             const at::Tensor& row, const Factors& k_scale, const Factors& v_scale) {
  const int64_t B = q.size(0), T = q.size(1), H = q.size(2), D = q.size(3), K = k.size(1), S = k.size(2), G = H / K;
  check_cache("prefill_attention", q, k, v, k_scale, v_scale);
  TORCH_CHECK(D % (2 * kLanes) == 0 && position.numel() == B * T && row.numel() == B,
              "prefill_attention: D a multiple of 32, a position for each query, a row for each batch row");
  const at::Tensor q_contiguous = q.contiguous(), position_contiguous = position.contiguous();
  const at::Tensor row_contiguous = row.contiguous();
  at::Tensor y = q.new_empty({B, T, H, D});
  const auto* qs = q_contiguous.const_data_ptr<at::BFloat16>();
  const auto* at_position = position_contiguous.const_data_ptr<int64_t>();
  const auto* rows = row_contiguous.const_data_ptr<int64_t>();
  auto* out = y.mutable_data_ptr<at::BFloat16>();
  const float scale = 1.f / std::sqrt(static_cast<float>(D));
  const int64_t tiles = (T + kQueries - 1) / kQueries;
  const auto run = [&](const auto& cached) {
    at::parallel_for(0, B * K * tiles, 1, [&](int64_t begin, int64_t end) {
      Tile tile((kQueries * G + 3) / 4 * 4, D);
      for (int64_t i = begin; i < end; i++) {
        const int64_t b = i / tiles / K, head = i / tiles % K, first = i % tiles * kQueries;
        const int64_t offset = ((b * T + first) * H + head * G) * D;
        attend_tile(tile, qs + offset, H * D, at_position + b * T + first, std::min(kQueries, T - first),
                    cached.head(rows[b] * K + head, S, D), S, G, D, scale, out + offset);
      }
    });
  };
  k_scale ? run(as_cached<int8_t>(k, v, k_scale, v_scale)) : run(as_cached<at::BFloat16>(k, v, k_scale, v_scale));
  return y;
}
