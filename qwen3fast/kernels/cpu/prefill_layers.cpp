// All transformer blocks for chunks of prompts: the products of linear.cpp, quantized.cpp and tiles.cpp, the attention of
// prefill_attention.cpp, and between them norms, rotation and the cache, without a return to Python.
//
// Results are rounded to bfloat16 at the same points as in the PyTorch form (model/block.py and its parts). A token's
// result does not depend on the other batch rows.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "attend.h"
#include "block.h"
#include "experts.h"
#include "ops.h"
#include "parallel.h"
#include "products.h"
#include "tiles.h"

namespace {

constexpr int64_t kTail = 8;

// One forward pass. M tokens, all batch rows together.
struct Pass {
  const Sizes size;
  const float *cos, *sin;  // (positions, D)
  const int64_t *position, *row;  // (M,), (B,)
  const int64_t T;
  BFloat16* const x;  // (M, E), the residual stream
  const Tiles tiles;
  const int64_t tiles_from, threads;  // of attention, see ops.h
  Lines<BFloat16> normed, qkv, y, z;  // (M, E), (M, (H + 2K) D), (M, H D), (M, E)
  // Where a layer needs them. Gate and up, and their product: (M, 2I), (M, I). Of experts: (M, X), (M, C), (M, C), (M, C, E).
  Lines<BFloat16> gate_up, act, logits, each;
  std::vector<int64_t> expert;
  Lines<float> share;
};

// Returns whether a product with this many channels is made by tiles.
bool takes_tiles(const Pass& p, int64_t K) { return p.tiles && K % kTileDepth == 0; }

// out: the products of weights of the same input, side by side.
void multiply(const Pass& p, const BFloat16* x, const Linear* weights, int64_t count, BFloat16* out) {
  if (takes_tiles(p, weights[0].K)) return tile_products(x, weights, count, out, p.size.M, p.tiles, kReplace, p.threads);
  const bool is_plain = std::all_of(weights, weights + count, is_bfloat16);
  const auto run = is_plain ? linear_together : qwen3fast_quantized_linear;
  run(x, weights, count, out, p.size.M, p.threads);
}

void norm_rows(Pass& p, const BFloat16* weight) {
  const int64_t E = p.size.E;
  parallel_for(p.size.M, 4, p.threads, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; m++) rms_norm(p.x + m * E, weight, E, p.size.eps, &p.normed[m * E]);
  });
}

// The residual stream += the product, rounded first.
void multiply_and_add(Pass& p, const BFloat16* x, const Linear& weight) {
  const int64_t E = p.size.E;
  if (takes_tiles(p, weight.K)) return tile_products(x, &weight, 1, p.x, p.size.M, p.tiles, kAdd, p.threads);
  multiply(p, x, &weight, 1, p.z.data());
  parallel_for(p.size.M, 4, p.threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * E; i < end * E; i += kLanes) store(p.x + i, load(p.x + i) + load(&p.z[i]));
  });
}

// Normalizes and rotates H query heads and K key heads in place, and writes keys and values to the cache, whose numbers are T.
// qkv: (M, (H + 2K) D).
template <typename T>
void write_cache(Pass& p, const Layer& layer, int64_t H, int64_t K) {
  const int64_t M = p.size.M, D = p.size.D, S = p.size.S;
  const float eps = p.size.eps;
  const Cache& cache = layer.cache;
  parallel_for(M, 4, p.threads, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; m++) {
      const int64_t at = p.position[m];
      BFloat16* const vectors = &p.qkv[m * (H + 2 * K) * D];
      for (int64_t head = 0; head < H + K; head++) {
        BFloat16* vector = vectors + head * D;
        rms_norm(vector, head < H ? layer.q_norm : layer.k_norm, D, eps, vector);
        rotate(vector, p.cos + at * D, p.sin + at * D, D);
      }
      for (int64_t head = 0; head < K; head++) {
        const int64_t place = (p.row[m / p.T] * K + head) * S + at, scale = cache.key_scale ? place : 0;
        write_vector(vectors + (H + head) * D, D, static_cast<T*>(cache.keys) + place * D, cache.key_scale + scale);
        write_vector(vectors + (H + K + head) * D, D, static_cast<T*>(cache.values) + place * D, cache.value_scale + scale);
      }
    }
  });
}

// act: silu(gate(normed)) * up(normed).
void multiply_gated(Pass& p, const Layer& layer) {
  const int64_t M = p.size.M, I = layer.gate.N;
  p.act.resize(M * I);
  const Linear weights[] = {layer.gate, layer.up};
  if (takes_tiles(p, layer.gate.K))
    return tile_products(p.normed.data(), weights, 2, p.act.data(), M, p.tiles, kGate, p.threads);
  if (is_bfloat16(layer.gate) && is_bfloat16(layer.up))
    return gated_together(p.normed.data(), layer.gate, layer.up, p.act.data(), M, p.threads);
  p.gate_up.resize(M * 2 * I);
  multiply(p, p.normed.data(), weights, 2, p.gate_up.data());
  parallel_for(M, 4, p.threads, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; m++) gate_values(&p.gate_up[m * 2 * I], &p.gate_up[(m * 2 + 1) * I], I, &p.act[m * I]);
  });
}

// x += the sum of each token's chosen experts' outputs, each times its share.
void add_experts(Pass& p, const Layer& layer) {
  const int64_t M = p.size.M, E = p.size.E, X = layer.router.N, C = layer.chosen;
  p.logits.resize(M * X), p.each.resize(M * C * E), p.expert.resize(M * C), p.share.resize(M * C);
  multiply(p, p.normed.data(), &layer.router, 1, p.logits.data());
  parallel_for(M, 4, p.threads, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; m++)
      choose_experts(&p.logits[m * X], X, C, layer.renormalizes, &p.expert[m * C], &p.share[m * C]);
  });
  qwen3fast_quantized_experts(p.normed.data(), p.expert.data(), &layer.gate, &layer.down, p.each.data(), M, C, p.threads);
  parallel_for(M, 4, p.threads, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; m++) add_chosen(&p.each[m * C * E], &p.share[m * C], C, E, 0, E, p.x + m * E);
  });
}

// The rest of a block behind its attention y.
void finish_block(Pass& p, const Layer& layer) {
  multiply_and_add(p, p.y.data(), layer.o);
  norm_rows(p, layer.post_norm);
  if (layer.router.weight) return add_experts(p, layer);
  multiply_gated(p, layer);
  multiply_and_add(p, p.act.data(), layer.down);
}

Pass make_pass(Sizes size, const float* cos, const float* sin, const int64_t* position, const int64_t* row, int64_t T,
               BFloat16* x, Tiles tiles, int64_t tiles_from, int64_t threads) {
  const auto room = [&](int64_t columns) { return Lines<BFloat16>(size.M * columns); };
  const int64_t E = size.E, width = (size.H + 2 * size.K) * size.D;
  return {size, cos, sin, position, row, T, x, tiles, tiles_from, threads, room(E), room(width), room(size.H * size.D),
          room(E), {}, {}, {}, {}, {}, {}};
}

template <typename T>
void run_block(Pass& p, const Layer& layer) {
  const auto& [M, E, H, K, D, S, eps] = p.size;
  norm_rows(p, layer.input_norm);
  const Linear qkv[] = {layer.q, layer.k, layer.v};
  multiply(p, p.normed.data(), qkv, 3, p.qkv.data());
  write_cache<T>(p, layer, H, K);
  attend_chunks(p.qkv.data(), (H + 2 * K) * D, layer.cache, p.position, p.row, p.y.data(), M / p.T, p.T, H, K, S, D,
                p.tiles_from, p.threads);
  finish_block(p, layer);
}

// The same for the last block, of which one token per batch row is needed: keys and values of all tokens, the rest of kTail
// tokens that include it, since products of fewer rows have another form.
template <typename T>
void run_last_block(Pass& p, const Layer& layer, const int64_t* last) {
  const auto& [M, E, H, K, D, S, eps] = p.size;
  const int64_t B = M / p.T;
  norm_rows(p, layer.input_norm);
  const Linear kv[] = {layer.k, layer.v};
  multiply(p, p.normed.data(), kv, 2, p.qkv.data());
  write_cache<T>(p, layer, 0, K);

  Lines<BFloat16> x(B * kTail * E);
  std::vector<int64_t> position(B * kTail), from(B * kTail);
  for (int64_t m = 0; m < B * kTail; m++) {
    const int64_t b = m / kTail, first = std::clamp<int64_t>(last[b] - kTail + 1, 0, p.T - kTail);
    from[m] = b * p.T + first + m % kTail;
    position[m] = p.position[from[m]];
    std::copy_n(p.x + from[m] * E, E, &x[m * E]);
  }
  Pass few = make_pass({B * kTail, E, H, K, D, S, eps}, p.cos, p.sin, position.data(), p.row, kTail, x.data(), p.tiles,
                       p.tiles_from, p.threads);
  norm_rows(few, layer.input_norm);
  multiply(few, few.normed.data(), &layer.q, 1, few.qkv.data());
  write_cache<T>(few, layer, H, 0);
  attend_chunks(few.qkv.data(), H * D, layer.cache, few.position, p.row, few.y.data(), B, kTail, H, K, S, D,
                p.tiles_from, p.threads);
  finish_block(few, layer);
  for (int64_t m = 0; m < B * kTail; m++) std::copy_n(&x[m * E], E, p.x + from[m] * E);
}

}  // namespace

void qwen3fast_prefill_layers(const Layer* layers, int64_t count, const Sizes* sizes, const float* cos, const float* sin,
                              const int64_t* position, const int64_t* row, int64_t T, const int64_t* last, BFloat16* x,
                              Tiles tiles, int64_t tiles_from, int64_t threads) {
  Team::lead(threads, [&] {
    Pass p = make_pass(*sizes, cos, sin, position, row, T, x, tiles, tiles_from, threads);
    const bool is_int8 = layers[0].cache.key_scale;
    for (const Layer* layer = layers; layer < layers + count; layer++) {
      if (last && T > kTail && layer == layers + count - 1)
        (is_int8 ? run_last_block<int8_t> : run_last_block<BFloat16>)(p, *layer, last);
      else
        (is_int8 ? run_block<int8_t> : run_block<BFloat16>)(p, *layer);
    }
  });
}
