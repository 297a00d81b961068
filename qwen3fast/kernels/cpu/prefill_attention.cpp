// Attention of many queries per slot over the used part of a KV cache: scores exist for a small tile only.
//
// Keys and values are bfloat16, or int8 with a scale for each vector: k_scale, v_scale (R, K, S) float32. Sums are in
// float32. Softmax runs online, tile by tile. Source: FlashAttention, arXiv:2205.14135. The plain PyTorch form is in
// kernels/attention.py.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "attend.h"
#include "ops.h"
#include "parallel.h"
#include "tiles.h"
#include "vec.h"

namespace {

// Rows of a tile: queries, each with the G heads of a group. With AMX, which multiplies faster, keys and values must serve more
// rows for what it takes to put them in pairs, and sums more keys for what it takes to load and store them.
constexpr int64_t rows_of(bool by_tiles) { return by_tiles ? 512 : 128; }
constexpr int64_t keys_of(bool by_tiles) { return by_tiles ? 128 : 64; }
constexpr int64_t kTogether = 32;  // rows whose scores exist at a time: two tiles of AMX
constexpr float kHidden = -1e30f;  // the score of a key that a query may not see

// Keys in columns: pairs (D/2, width), two neighboring channels of a key in 32 bits. k: (count, D); the last key is
// repeated up to `padded`, a multiple of sixteen.
void key_columns(const BFloat16* k, int64_t count, int64_t padded, int64_t D, int64_t width, uint32_t* pairs) {
  for (int64_t t = 0; t < padded; t += kLanes)
    for (int64_t d = 0; d < D; d += 2 * kLanes) {
      Bits square[kLanes];
      for (int64_t i = 0; i < kLanes; i++) square[i] = load_as<Bits>(k + std::min(t + i, count - 1) * D + d);
      transpose(square);
      for (int64_t i = 0; i < kLanes; i++) store_as_is(pairs + (d / 2 + i) * width + t, square[i]);
    }
}

// out += a b for four rows and kChunks * 16 columns at a time; with kAdds false, out = a b. a: (rows, 2 num_pairs) bfloat16,
// rows a_stride apart; b: num_pairs rows of pairs of numbers, b_stride apart, each in 32 bits; out: (rows, columns) float32,
// out_stride apart.
template <int kChunks, bool kAdds>
void add_product(const BFloat16* a, int64_t a_stride, const uint32_t* b, int64_t b_stride, int64_t rows,
                 int64_t num_pairs, float* out, int64_t out_stride) {
  for (int64_t r = 0; r < rows; r += 4) {
    Vec total[4][kChunks] = {};
    for (int i = 0; kAdds && i < 4; i++)
      for (int c = 0; c < kChunks; c++) total[i][c] = load(out + (r + i) * out_stride + c * kLanes);
    for (int64_t t = 0; t < num_pairs; t++) {
      Bits value[kChunks];
      for (int c = 0; c < kChunks; c++) value[c] = load_as<Bits>(b + t * b_stride + c * kLanes);
      for (int i = 0; i < 4; i++) {
        const Bits two = load_as<uint32_t>(a + (r + i) * a_stride + 2 * t);
        for (int c = 0; c < kChunks; c++) total[i][c] = dot2(total[i][c], two, value[c]);
      }
    }
    for (int i = 0; i < 4; i++)
      for (int c = 0; c < kChunks; c++) store(out + (r + i) * out_stride + c * kLanes, total[i][c]);
  }
}

// The same for any number of columns that is a multiple of sixteen; by tiles, rows and pairs must be multiples of it, too.
template <bool kByTiles, bool kAdds>
void add_columns(const BFloat16* a, int64_t a_stride, const uint32_t* b, int64_t b_stride, int64_t rows,
                 int64_t num_pairs, int64_t columns, float* out, int64_t out_stride) {
  if (kByTiles) return add_by_tiles<kAdds>(a, a_stride, b, b_stride, rows, num_pairs, columns, out, out_stride);
  constexpr int64_t kChunks = kRegister / 16;  // whose sums fit the registers
  int64_t c = 0;
  for (; c + kChunks * kLanes <= columns; c += kChunks * kLanes)
    add_product<kChunks, kAdds>(a, a_stride, b + c, b_stride, rows, num_pairs, out + c, out_stride);
  for (; c < columns; c += kLanes)
    add_product<1, kAdds>(a, a_stride, b + c, b_stride, rows, num_pairs, out + c, out_stride);
}

// Sixteen cached numbers as bits of bfloat16, each in the lower half of a lane.
FORCE_INLINE Bits cached_bits(const BFloat16* p, float) { return load_halves(p); }
FORCE_INLINE Bits cached_bits(const int8_t* p, float scale) { return as_bfloat16(load(p) * scale); }

// Keys as bfloat16: where they are, or rounded ones written to `room`.
inline const BFloat16* tile_keys(const BFloat16* k, const float*, int64_t, int64_t, BFloat16*) { return k; }

const BFloat16* tile_keys(const int8_t* k, const float* scale, int64_t count, int64_t D, BFloat16* room) {
  for (int64_t t = 0; t < count; t++)
    for (int64_t d = 0; d < D; d += kLanes) store(room + t * D + d, load(k + t * D + d) * scale[t]);
  return room;
}

// Products take four rows at a time, or a tile's.
constexpr int64_t padded_rows(int64_t rows, bool by_tiles) {
  const int64_t multiple = by_tiles ? kTileRows : 4;
  return (rows + multiple - 1) / multiple * multiple;
}

// Room for one tile of up to `rows` rows, kept by a thread from tile to tile.
struct Tile {
  Lines<BFloat16> q, keys, weight;
  Lines<float> score, out, maximum, total;
  Lines<uint32_t> columns, pairs;
  std::vector<int64_t> visible;

  Tile(int64_t rows, int64_t num_keys, int64_t D)
      : q(rows * D), keys(num_keys * D), weight(kTogether * num_keys), score(kTogether * num_keys), out(rows * D),
        maximum(rows + kLanes), total(rows + kLanes), columns(D / 2 * num_keys), pairs(num_keys / 2 * D), visible(rows) {}
};

constexpr float kLog2E = 1.44269504f;

// 2^x for x <= 0 as `exp_of_negative`, with fewer terms: to 5e-5 relative, where bfloat16 has 4e-3. At least 2^-126.
FORCE_INLINE Vec short_exp2(Vec x) {
  const Vec y = larger(fill(-126.f), x), n = y + 12582912.f, f = y - (n - 12582912.f);
  Vec series = fill(9.61812911e-3f);
  for (const float term : {5.55041087e-2f, 0.240226507f, 0.693147181f, 1.f}) series = series * f + term;
  return as<Vec>(as<Bits>(series) + (as<Bits>(n) << 23));
}

// Scores of up to kTogether rows with `columns` keys from `start` on, and what they do to the results of the keys before.
template <bool kByTiles>
void add_scores(Tile& tile, int64_t r, int64_t rows, int64_t start, int64_t columns, int64_t D, float scale) {
  constexpr int64_t kKeys = keys_of(kByTiles);
  add_columns<kByTiles, false>(&tile.q[r * D], D, tile.columns.data(), kKeys, rows, D / 2, columns, tile.score.data(), kKeys);
  for (int64_t first = 0; first < rows; first += kLanes) {  // sixteen rows at a time share the latency of their reductions
    const int64_t count = std::min(kLanes, rows - first), at = r + first;
    Vec most[kLanes] = {}, total[kLanes] = {};
    for (int64_t i = 0; i < count; i++) {
      float* s = &tile.score[(first + i) * kKeys];
      for (int64_t t = std::clamp<int64_t>(tile.visible[at + i] - start, 0, columns); t < columns; t++) s[t] = kHidden;
      most[i] = load(s);
      for (int64_t t = kLanes; t < columns; t += kLanes) most[i] = larger(most[i], load(s + t));
    }
    const Vec before = load(&tile.maximum[at]), maximum = larger(before, fold(most, larger));
    const Vec shrink = exp_of_negative((before - maximum) * scale);
    store(&tile.maximum[at], maximum);
    for (int64_t i = 0; i < count; i++) {
      const float* s = &tile.score[(first + i) * kKeys];
      for (int64_t t = 0; t < columns; t += kLanes) {
        const Vec weight = kByTiles ? short_exp2((load(s + t) - maximum[i]) * (scale * kLog2E))
                                    : exp_of_negative((load(s + t) - maximum[i]) * scale);
        store(&tile.weight[(first + i) * kKeys + t], weight);
        total[i] += weight;
      }
      float* const out = &tile.out[(at + i) * D];
      for (int64_t d = 0; start && shrink[i] < 1 && d < D; d += kLanes) store(out + d, load(out + d) * shrink[i]);
    }
    store(&tile.total[at], load(&tile.total[at]) * shrink + sums(total));
  }
  const auto add = start ? add_columns<kByTiles, true> : add_columns<kByTiles, false>;
  add(tile.weight.data(), kKeys, tile.pairs.data(), D, rows, columns / 2, D, &tile.out[r * D], D);
}

// `count` queries of one key/value head over all keys up to each one's position. q and y point at the first query's
// first head of the group; the next query is a stride of numbers on. Row r of the tile is query r / G, head r % G.
template <bool kByTiles, typename T>
void attend_tile(Tile& tile, const BFloat16* q, int64_t q_stride, const int64_t* position, int64_t count,
                 const Cached<T>& cached, int64_t S, int64_t G, int64_t D, float scale, BFloat16* y, int64_t y_stride) {
  const auto [k, v, k_scale, v_scale] = cached;
  constexpr int64_t kKeys = keys_of(kByTiles);
  const int64_t used = count * G, rows = padded_rows(used, kByTiles);
  constexpr int64_t multiple = kByTiles ? kTileDepth : kLanes;
  for (int64_t r = 0; r < rows; r++)  // the last row is repeated
    std::copy_n(q + std::min(r, used - 1) / G * q_stride + std::min(r, used - 1) % G * D, D, &tile.q[r * D]);
  std::fill(tile.total.begin(), tile.total.end(), 0.f);
  std::fill(tile.maximum.begin(), tile.maximum.end(), kHidden);
  for (int64_t r = 0; r < rows; r++) tile.visible[r] = position[std::min(r, used - 1) / G] + 1;
  const int64_t end = std::min(*std::max_element(position, position + count) + 1, S);
  for (int64_t start = 0; start < end; start += kKeys) {
    const int64_t keys = std::min(kKeys, end - start), padded = (keys + multiple - 1) / multiple * multiple;
    const BFloat16* key = tile_keys(k + start * D, k_scale + (k_scale ? start : 0), keys, D, tile.keys.data());
    key_columns(key, keys, padded, D, kKeys, tile.columns.data());
    for (int64_t t = 0; t < padded; t += 2) {
      const int64_t first = start + std::min(t, keys - 1), second = start + std::min(t + 1, keys - 1);
      const float first_scale = v_scale ? v_scale[first] : 1.f, second_scale = v_scale ? v_scale[second] : 1.f;
      for (int64_t d = 0; d < D; d += kLanes) {
        const Bits pair = cached_bits(v + first * D + d, first_scale) | cached_bits(v + second * D + d, second_scale) << 16;
        store_as_is(&tile.pairs[t / 2 * D + d], pair);
      }
    }
    for (int64_t r = 0; r < rows; r += kTogether) {
      const int64_t count_r = std::min(kTogether, rows - r), *visible = &tile.visible[r];
      const int64_t seen = *std::max_element(visible, visible + count_r) - start;  // keys behind these cost nothing
      const int64_t columns = std::clamp((seen + multiple - 1) / multiple * multiple, start ? 0 : multiple, padded);
      if (columns > 0) add_scores<kByTiles>(tile, r, count_r, start, columns, D, scale);
    }
  }
  for (int64_t r = 0; r < used; r++)
    for (int64_t d = 0; d < D; d += kLanes)
      store(y + r / G * y_stride + r % G * D + d, load(&tile.out[r * D + d]) / tile.total[r]);
}

// The tile that is number n in an order in which threads, each with a share of `each` tiles, read keys of the same head at
// the same time: a long cache's heads together are more than the level 3 cache holds. Every other round of tiles is
// reversed, since later queries see more keys.
int64_t interleaved(int64_t n, int64_t each, int64_t threads) {
  const int64_t round = n % each, thread = n / each;
  return round * threads + (round % 2 ? threads - 1 - thread : thread);
}

template <bool kByTiles, typename N>
void prefill_heads(const BFloat16* q, int64_t q_stride, const Cached<N>& cached, const int64_t* position,
                   const int64_t* row, BFloat16* y, int64_t B, int64_t T, int64_t H, int64_t K, int64_t S, int64_t D,
                   int64_t threads) {
  const float scale = 1.f / std::sqrt(static_cast<float>(D));
  const int64_t G = H / K, most = std::max<int64_t>(1, rows_of(kByTiles) / G);  // queries of a tile
  const int64_t shared = kByTiles ? std::max<int64_t>(1, T * B * K / (4 * threads)) : T;  // to give all threads some
  const int64_t queries = std::min(most, std::max(shared, std::max<int64_t>(1, rows_of(false) / G)));
  const int64_t tiles = (T + queries - 1) / queries;
  const int64_t count = B * K * tiles, each = count / threads;
  parallel_for(count, 1, threads, [&](int64_t begin, int64_t end) {
    [[maybe_unused]] const std::conditional_t<kByTiles, TileUse, int> use{};
    Tile tile(padded_rows(std::min(queries, T) * G, kByTiles), keys_of(kByTiles), D);
    for (int64_t n = begin; n < end; n++) {
      const int64_t i = count % threads ? n : interleaved(n, each, threads);
      const int64_t b = i / tiles / K, head = i / tiles % K, first = i % tiles * queries;
      const int64_t token = b * T + first, column = head * G * D;
      attend_tile<kByTiles>(tile, q + token * q_stride + column, q_stride, position + token, std::min(queries, T - first),
                            cached.head(row[b] * K + head, S, D), S, G, D, scale, y + token * H * D + column, H * D);
    }
  }, parts_for(*std::max_element(position, position + B * T)));
}

}  // namespace

void attend_chunks(const BFloat16* q, int64_t q_stride, const Cache& cache, const int64_t* position, const int64_t* row,
                   BFloat16* y, int64_t B, int64_t T, int64_t H, int64_t K, int64_t S, int64_t D, int64_t tiles_from,
                   int64_t threads) {
  const auto attend = [&](const auto& cached, int64_t b, int64_t rows, bool by_tiles) {
    const auto run = by_tiles ? prefill_heads<true, std::remove_cvref_t<decltype(*cached.keys)>>
                              : prefill_heads<false, std::remove_cvref_t<decltype(*cached.keys)>>;
    run(q + b * T * q_stride, q_stride, cached, position + b * T, row + b, y + b * T * H * D, rows, T, H, K, S, D, threads);
  };
  const auto by_tiles = [&](int64_t b) { return position[b * T + T - 1] + 1 >= tiles_from; };
  for (int64_t b = 0, same; b < B; b += same) {  // batch rows of the same form
    for (same = 1; b + same < B && by_tiles(b + same) == by_tiles(b);) same++;
    cache.key_scale ? attend(Cached<int8_t>(cache), b, same, by_tiles(b)) : attend(Cached<BFloat16>(cache), b, same, by_tiles(b));
  }
}

void qwen3fast_prefill_attention(const BFloat16* q, const Cache* cache, const int64_t* position, const int64_t* row,
                                 BFloat16* y, int64_t B, int64_t T, int64_t H, int64_t K, int64_t S, int64_t D,
                                 int64_t tiles_from, int64_t threads) {
  attend_chunks(q, H * D, *cache, position, row, y, B, T, H, K, S, D, tiles_from, threads);
}
