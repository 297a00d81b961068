// A decode step for a few rows: the embedding, all transformer blocks (norm, query/key/value, rotation, cache, attention, feed
// forward), output projection and sampler; or the blocks alone. Threads start once and meet at barriers, instead of starting
// once per product: the purpose of this operation. Each thread computes norms and quantizes activations by itself instead of
// waiting for another thread.
//
// A row at position -1 is empty: its part of the cache is left alone, and its result has no meaning.
//
// Experts: one thread routes all rows; products of the chosen experts are in experts.h. Empty rows have no experts.
//
// Results are rounded to bfloat16 at the same points as in the PyTorch form (model/block.py and its parts). A row's
// result depends neither on the other rows nor on the number of threads; by tiles, sums are rounded otherwise than without.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "attend.h"
#include "block.h"
#include "experts.h"
#include "input.h"
#include "low_rank.h"
#include "ops.h"
#include "parallel.h"
#include "products.h"
#include "sampler.h"
#include "tiles.h"

namespace {

void add_rows(BFloat16* x, const BFloat16* y, int64_t M, int64_t E, Range columns) {
  for (int64_t m = 0; m < M; m++)
    for (int64_t i = columns.begin; i < columns.end; i += kLanes)
      store(x + m * E + i, load(x + m * E + i) + load(y + m * E + i));
}

// The experts of the rows that are in use, as in model/moe.py.
struct Routing {
  std::vector<int64_t> row, expert;  // (N,), (N, C)
  Lines<float> share;                // (N, C)
  Lines<BFloat16> logits, y;         // (M, X), (N, C, E)
  RoutedExperts experts;

  void choose(int64_t m, int64_t X, int64_t C, bool renormalizes) {
    row.push_back(m);
    expert.resize(row.size() * C), share.resize(row.size() * C);
    choose_experts(&logits[m * X], X, C, renormalizes, expert.data() + expert.size() - C, share.data() + share.size() - C);
  }
};

// The state that threads share while the layers run.
struct Shared {
  const Sizes size;
  const float *cos, *sin;  // (positions, D)
  const int64_t* position;
  const int64_t intermediate;      // of the widest layer without experts
  BFloat16* x;                     // (M, E), the residual stream
  Lines<BFloat16> qkv, y, z, act;      // (M, (H + 2K) D), (M, H D), (M, E), (M, 2 I): gate, then up
  DecodeAttention attention;
  Routing routing;
  Barrier barrier;
  const Adapters* adapters;            // null for none
  const Tiles tiles;
  std::unique_ptr<BFloat16[]> scores;  // (M, V), the logits
  std::unique_ptr<Sampler> sampler;
};

// The feed-forward layer of a block: x += down(silu(gate(rows)) * up(rows)). input.rows: normalized, each thread's own.
// adapt: adds the adapters' products to those of a weight, see `run`.
template <typename Adapt>
void feed_forward(const Layer& layer, Input& input, Shared& s, const Adapt& adapt, int thread, int threads) {
  const int64_t M = s.size.M, E = s.size.E, I = layer.gate.N;
  const Range columns = share(E / kLanes, thread, threads), inner = share(I / kLanes, thread, threads);
  input.quantize(input.rows.data(), M, E, layer.gate);
  multiply(layer.gate, input.rows.data(), input, M, inner, s.act.data(), I);
  input.reorder(input.rows.data(), M, E, layer.up);
  multiply(layer.up, input.rows.data(), input, M, inner, s.act.data() + M * I, I);
  adapt(4, layer.gate, input.rows.data(), inner, s.act.data(), I);
  adapt(5, layer.up, input.rows.data(), inner, s.act.data() + M * I, I);
  for (int64_t m = 0; m < M; m++) {
    BFloat16* const gate = &s.act[m * I + inner.begin * kLanes];
    gate_values(gate, gate + M * I, (inner.end - inner.begin) * kLanes, gate);
  }
  s.barrier.wait();

  input.quantize(s.act.data(), M, I, layer.down);
  multiply(layer.down, s.act.data(), input, M, columns, s.z.data(), E);
  adapt(6, layer.down, s.act.data(), columns, s.z.data(), E);
  add_rows(s.x, s.z.data(), M, E, {columns.begin * kLanes, columns.end * kLanes});
}

// The same with experts: x += the sum of the chosen experts' outputs, each times its share.
void run_experts(const Layer& layer, Input& input, Shared& s, int thread, int threads) {
  const int64_t M = s.size.M, E = s.size.E, X = layer.router.N, C = layer.chosen;
  const Range columns = share(E / kLanes, thread, threads), routes = share(X / kLanes, thread, threads);
  Routing& routing = s.routing;
  input.quantize(input.rows.data(), M, E, layer.router);
  multiply(layer.router, input.rows.data(), input, M, routes, routing.logits.data(), X);
  s.barrier.wait();

  if (thread == 0) {
    routing.row.clear(), routing.expert.clear(), routing.share.clear();
    for (int64_t m = 0; m < M; m++)
      if (s.position[m] >= 0) routing.choose(m, X, C, layer.renormalizes);
    routing.experts.plan(routing.expert.data(), routing.row.size(), C, layer.gate, layer.down);
  }
  s.barrier.wait();

  const auto row_of = [&](int64_t n) { return input.rows.data() + routing.row[n] * E; };
  routing.experts.run(row_of, layer.gate, layer.down, routing.y.data(), s.barrier, thread, threads);
  s.barrier.wait();

  for (size_t n = 0; n < routing.row.size(); n++)
    add_chosen(&routing.y[n * C * E], &routing.share[n * C], C, E, columns.begin * kLanes, columns.end * kLanes,
               s.x + routing.row[n] * E);
}

template <typename T>  // of the cache
void run(const Layer* layers, int64_t count, Shared& s, int thread, int threads) {
  const auto& [M, E, H, K, D, S, eps] = s.size;
  const int64_t G = H / K, width = (H + 2 * K) * D;
  const Range columns = share(E / kLanes, thread, threads), qkv_blocks = share(width / kLanes, thread, threads);
  const DecodeAttention::Share own_heads = s.attention.share(thread, threads);
  Input input(M, std::max({E, H * D, s.intermediate}), s.tiles);
  Lines<float> low(s.adapters ? s.adapters->rank : 0);
  const LowRank* added = nullptr;  // beside this layer's weights
  // Adds the adapters' products to those of weight number j.
  const auto adapt = [&](int64_t j, const Linear& w, const BFloat16* x, Range blocks, BFloat16* y, int64_t width) {
    if (added)
      add_low_rank(added[j], *s.adapters, x, s.size.M, w.N, w.K, blocks.begin * kLanes, blocks.end * kLanes, y, width, low.data());
  };
  for (int64_t i = 0; i < count; i++) {
    const Layer& layer = layers[i];
    const Cache& cache = layer.cache;
    T *keys = static_cast<T*>(cache.keys), *values = static_cast<T*>(cache.values);
    if (s.adapters) added = s.adapters->weights + 7 * i;
    for (int64_t m = 0; m < M; m++) rms_norm(s.x + m * E, layer.input_norm, E, eps, &input.rows[m * E]);
    input.quantize(input.rows.data(), M, E, layer.q);
    int64_t first = 0, j = 0;
    for (const Linear* w : {&layer.q, &layer.k, &layer.v}) {
      const int64_t blocks = w->N / kLanes;
      const Range own{std::clamp<int64_t>(qkv_blocks.begin - first, 0, blocks),
                      std::clamp<int64_t>(qkv_blocks.end - first, 0, blocks)};
      input.reorder(input.rows.data(), M, E, *w);
      multiply(*w, input.rows.data(), input, M, own, &s.qkv[first * kLanes], width);
      adapt(j++, *w, input.rows.data(), own, &s.qkv[first * kLanes], width);
      first += blocks;
    }
    s.barrier.wait();

    for (int64_t i = own_heads.heads.begin; i < own_heads.heads.end; i++) {
      const int64_t m = s.attention.row_of(i), head = s.attention.head_of(i), at = std::max<int64_t>(s.position[m], 0);
      BFloat16 *q = &s.qkv[m * width + head * G * D], *k = &s.qkv[m * width + (H + head) * D];
      for (int64_t g = 0; g <= G; g++) {
        BFloat16* vector = g < G ? q + g * D : k;
        rms_norm(vector, g < G ? layer.q_norm : layer.k_norm, D, eps, vector);
        rotate(vector, s.cos + at * D, s.sin + at * D, D);
      }
      if (s.position[m] < 0) continue;
      const int64_t place = (m * K + head) * S + at;
      write_vector(k, D, keys + place * D, cache.key_scale + (cache.key_scale ? place : 0));
      write_vector(&s.qkv[m * width + (H + K + head) * D], D, values + place * D,
                   cache.value_scale + (cache.value_scale ? place : 0));
    }
    s.attention.run(own_heads, s.qkv.data(), width, Cached<T>(cache), s.y.data(), s.barrier);
    s.barrier.wait();

    input.quantize(s.y.data(), M, H * D, layer.o);
    multiply(layer.o, s.y.data(), input, M, columns, s.z.data(), E);
    adapt(3, layer.o, s.y.data(), columns, s.z.data(), E);
    add_rows(s.x, s.z.data(), M, E, {columns.begin * kLanes, columns.end * kLanes});
    s.barrier.wait();

    for (int64_t m = 0; m < M; m++) rms_norm(s.x + m * E, layer.post_norm, E, eps, &input.rows[m * E]);
    if (layer.router.weight)
      run_experts(layer, input, s, thread, threads);
    else
      feed_forward(layer, input, s, adapt, thread, threads);
    s.barrier.wait();
  }
}

// What to do after the blocks: see qwen3fast_decode_step.
struct Task {
  const Ends& ends;
  const Sampling* sampling;
  float* logits;
};

// Each thread computes the logits of a share of the vocabulary.
void run_head(const Task& task, Shared& s, int thread, int threads) {
  const auto& [ends, sampling, logits] = task;
  const int64_t M = s.size.M, E = s.size.E, V = ends.head.N;
  const Range blocks = share(V / kLanes, thread, threads);
  Input input(M, E, s.tiles);
  for (int64_t m = 0; m < M; m++) rms_norm(s.x + m * E, ends.norm, E, s.size.eps, &input.rows[m * E]);
  input.quantize(input.rows.data(), M, E, ends.head);
  multiply(ends.head, input.rows.data(), input, M, blocks, s.scores.get(), V);
  if (!logits) s.barrier.wait();
  for (int64_t m = 0; m < M; m++) {
    const BFloat16* row = s.scores.get() + m * V;
    if (logits) {
      for (int64_t n = blocks.begin * kLanes; n < blocks.end * kLanes; n += kLanes) store(logits + m * V + n, load(row + n));
      continue;
    }
    const int64_t token = s.sampler->choose(row, sampling, m, s.barrier, thread, threads);
    if (thread) continue;
    ends.output[m] = token;
    ends.input[m] = std::max<int64_t>(token, 0);  // the next input must be a valid token
    ends.position[m] += ends.advance[m], ends.step[m] += ends.advance[m];
  }
}

// The embeddings of the input tokens. Returns false for a token or a position that does not exist.
bool embed(const Ends& ends, int64_t M, int64_t E, BFloat16* x) {
  const Linear& table = ends.embedding;
  for (int64_t m = 0; m < M; m++) {
    const int64_t token = ends.input[m], position = ends.position[m];
    if (token < 0 || token >= table.N || position < -1 || position >= ends.end) return false;
    if (table.bits == 16) std::copy_n(static_cast<const BFloat16*>(table.weight) + token * E, E, x + m * E);
  }
  return table.bits == 16 || qwen3fast_quantized_rows(&table, ends.input, x, M, 1);
}

// task: null for the blocks alone.
double run_step(const Layer* layers, int64_t count, const Sizes& sizes, const float* cos, const float* sin,
                const int64_t* position, BFloat16* x, const Adapters* adapters, const Task* task, Tiles tiles,
                int64_t threads) {
  const auto& [M, E, H, K, D, S, eps] = sizes;
  int64_t I = 0, X = 0, C = 0;
  for (const Layer* layer = layers; layer < layers + count; layer++) {
    if (!layer->router.weight) I = std::max(I, layer->gate.N);
    X = std::max(X, layer->router.N), C = std::max(C, layer->chosen);
  }
  const auto room = [](int64_t count) { return Lines<BFloat16>(count); };
  Shared shared{sizes, cos, sin, position, I, x, room(M * (H + 2 * K) * D), room(M * H * D), room(M * E),
                room(2 * M * I), DecodeAttention(position, M, K, H / K, S, D), {}, {}, adapters, tiles, {}, {}};
  shared.routing.logits = room(M * X);
  shared.routing.y = room(M * C * E);
  if (task) {
    shared.scores.reset(new BFloat16[M * task->ends.head.N]);
    if (!task->logits) shared.sampler = std::make_unique<Sampler>(task->ends.head.N, threads, !task->sampling);
  }
  const bool is_rounded = layers[0].cache.key_scale;
  const double begin = seconds(CLOCK_MONOTONIC);
  std::vector<double> used(threads, INFINITY);  // a thread's seconds on a processor, or asleep until others arrived
  const auto step = [&](int thread, int number) {
    std::optional<TileUse> use;
    if (tiles) use.emplace();
    const double before = seconds(CLOCK_THREAD_CPUTIME_ID) + Barrier::slept;
    (is_rounded ? run<int8_t> : run<BFloat16>)(layers, count, shared, thread, number);
    if (task) run_head(*task, shared, thread, number);
    used[thread] = seconds(CLOCK_THREAD_CPUTIME_ID) + Barrier::slept - before;
  };
  run_threads(threads, step, &shared.barrier);
  const double least = *std::min_element(used.begin(), used.end());
  return std::clamp(1 - least / (seconds(CLOCK_MONOTONIC) - begin), 0., 1.);
}

}  // namespace

double qwen3fast_decode_layers(const Layer* layers, int64_t count, const Sizes* sizes, const float* cos, const float* sin,
                               const int64_t* position, BFloat16* x, const Adapters* adapters, Tiles tiles,
                               int64_t threads) {
  return run_step(layers, count, *sizes, cos, sin, position, x, adapters, nullptr, tiles, threads);
}

double qwen3fast_decode_step(const Layer* layers, int64_t count, const Sizes* sizes, const float* cos, const float* sin,
                             const Ends* ends, const Adapters* adapters, const Sampling* sampling, float* logits,
                             Tiles tiles, int64_t threads) {
  Lines<BFloat16> x(sizes->M * sizes->E);
  if (!embed(*ends, sizes->M, sizes->E, x.data())) return -1;
  const Task task{*ends, sampling, logits};
  return run_step(layers, count, *sizes, cos, sin, ends->position, x.data(), adapters, &task, tiles, threads);
}
