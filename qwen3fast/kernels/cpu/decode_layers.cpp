// decode_layers(x, cos, sin, position, keys[], values[], key_scales[], value_scales[], norms[], weights[], scales[], eps)
//     -> y
//
// All transformer blocks of a decode step, for 1 to 8 rows: norm, query/key/value, rotation, cache, attention, feed
// forward. Threads start once and meet at barriers, instead of being started for each product; that is what this
// operation is for. Each thread computes norms and rounds activations for itself, so as not to wait for another.
//
// Results are rounded to bfloat16 where the PyTorch form (model/block.py and what it is made of) rounds them. A row's
// result does not depend on the rows beside it.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <thread>
#include <vector>

#include "attend.h"
#include "ops.h"
#include "products.h"

namespace {

using Number = at::BFloat16;

// Where threads wait for each other.
struct Barrier {
  int threads = 1;
  alignas(64) std::atomic<int> arrived{0};
  alignas(64) std::atomic<int> round{0};

  void wait() {
    const int current = round.load(std::memory_order_relaxed);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      arrived.store(0, std::memory_order_relaxed);
      round.store(current + 1, std::memory_order_release);
      return;
    }
    for (int64_t spins = 0; round.load(std::memory_order_acquire) == current; spins++) {
#ifdef __x86_64__
      __builtin_ia32_pause();
#endif
      if (spins > 20000) std::this_thread::yield();  // another program has the processor of a thread waited for
    }
  }
};

struct Range {
  int64_t begin, end;
};

// What thread `thread` of `threads` does of `count` things.
Range share(int64_t count, int thread, int threads) {
  return {count * thread / threads, count * (thread + 1) / threads};
}

struct Linear {
  const void *weight, *scale;
  int64_t N, K;
  int bits;
};

struct Layer {
  const Number *input_norm, *q_norm, *k_norm, *post_norm;
  Linear q, k, v, o, gate, up, down;
  void *keys, *values;              // numbers of the cache's type
  float *key_scale, *value_scale;   // for a cache of int8_t
};

struct Sizes {
  int64_t M, E, H, K, D, I, S;  // rows, hidden, query heads, key/value heads, head_dim, intermediate, positions
  float eps;
};

// A thread's own copy of what products read: rows in bfloat16, and rounded to 8 bits where weights are.
struct Input {
  std::vector<Number> rows;
  Activations rounded;

  explicit Input(int64_t M, int64_t K) : rows(M * K), rounded{std::vector<int8_t>(M * K), {}, {}} {
    rounded.scale.resize(M * K / kGroup);
    rounded.offset.resize(M * K / kGroup);
  }

  void round(const Number* from, int64_t M, int64_t K, int bits) {
    if (bits == 16) return;
    const int64_t G = K / kGroup;
    for (int64_t m = 0; m < M; m++)
      quantize_row(from + m * K, K, bits == 8 ? 128 : 8, &rounded.bytes[m * K], &rounded.scale[m * G],
                   &rounded.offset[m * G]);
  }
};

// y[m, n] for the rows n of some blocks of 16; `width` is the distance between two rows m of y.
void multiply(const Linear& w, const Number* x, const Activations& rounded, int64_t M, Range blocks, Number* y,
              int64_t width) {
  if (w.bits == 16)
    return matvec_rows(x, M, static_cast<const Number*>(w.weight), y, blocks.begin * kLanes, blocks.end * kLanes, width,
                       w.K);
  const Weight weight{static_cast<const uint8_t*>(w.weight), w.scale, w.N / kLanes, y};
  for (int64_t block = blocks.begin; block < blocks.end; block++) {
    if (w.bits == 8)
      rows<8, 1>(rounded, M, weight, block, width, w.K);
    else
      rows<4, 1>(rounded, M, weight, block, width, w.K);
  }
}

// One vector of model/norm.py.
void rms_norm(const Number* x, const Number* weight, int64_t size, float eps, Number* y) {
  Vec squares = {};
  for (int64_t i = 0; i < size; i += kLanes) squares += load(x + i) * load(x + i);
  const float scale = 1.f / std::sqrt(sum(squares) / static_cast<float>(size) + eps);
  for (int64_t i = 0; i < size; i += kLanes) {
    Number normed[kLanes];
    store(normed, load(x + i) * scale);
    store(y + i, load(normed) * load(weight + i));
  }
}

// One head of model/rope.py, in place.
void rotate(Number* x, const float* cos, const float* sin, int64_t D) {
  for (int64_t i = 0; i < D / 2; i += kLanes) {
    const Vec first = load(x + i), second = load(x + D / 2 + i);
    store(x + i, first * load(cos + i) - second * load(sin + i));
    store(x + D / 2 + i, second * load(cos + D / 2 + i) + first * load(sin + D / 2 + i));
  }
}

// silu(gate) * up, in place of gate.
void gate_values(Number* gate, const Number* up, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec x = load(gate + i), exponential = exp_of_negative(x < 0 ? x : -x);  // exp(-|x|)
    Number gated[kLanes];
    store(gated, x * (x < 0 ? exponential : fill(1.f)) / (1.f + exponential));
    store(gate + i, load(gated) * load(up + i));
  }
}

// Puts one vector into the cache. Source of int8_t's form: round_vectors in kv_cache.py.
void write_vector(const Number* from, int64_t D, Number* to, float*) { std::copy_n(from, D, to); }

void write_vector(const Number* from, int64_t D, int8_t* to, float* scale) {
  Vec most = {}, poison = {};
  for (int64_t d = 0; d < D; d += kLanes) {
    const Vec x = load(from + d);
    most = larger(most, x < 0 ? -x : x);
    poison += x * 0;  // NaN where x is NaN or infinite, which a maximum may lose
  }
  const float size = largest(most), to_bytes = size > 0 ? 127.f / size : 0.f;
  *scale = size / 127.f + sum(poison);
  for (int64_t d = 0; d < D; d += kLanes) {
    const Bytes bytes = __builtin_convertvector(round_to_ints(load(from + d) * to_bytes), Bytes);
    std::memcpy(to + d, &bytes, sizeof bytes);
  }
}

void add_rows(Number* x, const Number* y, int64_t M, int64_t E, Range columns) {
  for (int64_t m = 0; m < M; m++)
    for (int64_t i = columns.begin; i < columns.end; i += kLanes)
      store(x + m * E + i, load(x + m * E + i) + load(y + m * E + i));
}

// What threads share while the layers run.
struct Shared {
  const Sizes size;
  const float *cos, *sin;  // (positions, D)
  const int64_t* position;
  int64_t splits;
  Number* x;                         // (M, E), the residual stream
  std::vector<Number> qkv, y, z, act;  // (M, (H + 2K) D), (M, H D), (M, E), (M, 2 I): gate, then up
  std::vector<Part> parts;
  Barrier barrier;
};

template <typename T>  // of the cache
void run(const std::vector<Layer>& layers, Shared& s, int thread, int threads) {
  const auto& [M, E, H, K, D, I, S, eps] = s.size;
  const int64_t G = H / K, width = (H + 2 * K) * D;
  const float scale = 1.f / std::sqrt(static_cast<float>(D));
  const Range columns = share(E / kLanes, thread, threads), heads = share(M * K, thread, threads);
  const Range inner = share(I / kLanes, thread, threads), qkv_blocks = share(width / kLanes, thread, threads);
  const Range tasks = share(M * K * s.splits, thread, threads);
  Input input(M, std::max({E, H * D, I}));
  for (const Layer& layer : layers) {
    T *keys = static_cast<T*>(layer.keys), *values = static_cast<T*>(layer.values);
    const Cached<T> cached{keys, values, layer.key_scale, layer.value_scale};
    for (int64_t m = 0; m < M; m++) rms_norm(s.x + m * E, layer.input_norm, E, eps, &input.rows[m * E]);
    input.round(input.rows.data(), M, E, layer.q.bits);
    int64_t first = 0;
    for (const Linear* w : {&layer.q, &layer.k, &layer.v}) {
      const int64_t blocks = w->N / kLanes;
      const Range own{std::clamp<int64_t>(qkv_blocks.begin - first, 0, blocks),
                      std::clamp<int64_t>(qkv_blocks.end - first, 0, blocks)};
      multiply(*w, input.rows.data(), input.rounded, M, own, &s.qkv[first * kLanes], width);
      first += blocks;
    }
    s.barrier.wait();

    for (int64_t i = heads.begin; i < heads.end; i++) {
      const int64_t m = i / K, head = i % K, at = s.position[m];
      Number *q = &s.qkv[m * width + head * G * D], *k = &s.qkv[m * width + (H + head) * D];
      for (int64_t g = 0; g <= G; g++) {
        Number* vector = g < G ? q + g * D : k;
        rms_norm(vector, g < G ? layer.q_norm : layer.k_norm, D, eps, vector);
        rotate(vector, s.cos + at * D, s.sin + at * D, D);
      }
      const int64_t place = (m * K + head) * S + at;
      write_vector(k, D, keys + place * D, layer.key_scale + (layer.key_scale ? place : 0));
      write_vector(&s.qkv[m * width + (H + K + head) * D], D, values + place * D,
                   layer.value_scale + (layer.value_scale ? place : 0));
    }
    if (s.splits > 1) s.barrier.wait();  // otherwise a head's keys are read by the thread that wrote them
    for (int64_t i = tasks.begin; i < tasks.end; i++) {
      const int64_t head = i / s.splits, split = i % s.splits, m = head / K, length = s.position[m] + 1;
      s.parts[i] = attend(&s.qkv[m * width + head % K * G * D], cached.head(head, S, D), G, D, length * split / s.splits,
                          length * (split + 1) / s.splits, scale);
    }
    if (s.splits > 1) s.barrier.wait();
    for (int64_t head = heads.begin; head < heads.end; head++) {
      Part& whole = s.parts[head * s.splits];
      for (int64_t split = 1; split < s.splits; split++) whole.merge(s.parts[head * s.splits + split], G, D);
      for (int64_t i = 0; i < G * D; i += kLanes) store(&s.y[head * G * D + i], load(&whole.out[i]) / whole.total[i / D]);
    }
    s.barrier.wait();

    input.round(s.y.data(), M, H * D, layer.o.bits);
    multiply(layer.o, s.y.data(), input.rounded, M, columns, s.z.data(), E);
    add_rows(s.x, s.z.data(), M, E, {columns.begin * kLanes, columns.end * kLanes});
    s.barrier.wait();

    for (int64_t m = 0; m < M; m++) rms_norm(s.x + m * E, layer.post_norm, E, eps, &input.rows[m * E]);
    input.round(input.rows.data(), M, E, layer.gate.bits);
    multiply(layer.gate, input.rows.data(), input.rounded, M, inner, s.act.data(), I);
    multiply(layer.up, input.rows.data(), input.rounded, M, inner, s.act.data() + M * I, I);
    for (int64_t m = 0; m < M; m++)
      gate_values(&s.act[m * I + inner.begin * kLanes], &s.act[(M + m) * I + inner.begin * kLanes],
                  (inner.end - inner.begin) * kLanes);
    s.barrier.wait();

    input.round(s.act.data(), M, I, layer.down.bits);
    multiply(layer.down, s.act.data(), input.rounded, M, columns, s.z.data(), E);
    add_rows(s.x, s.z.data(), M, E, {columns.begin * kLanes, columns.end * kLanes});
    s.barrier.wait();
  }
}

Linear as_linear(const at::Tensor& weight, const at::Tensor& scale) {
  TORCH_CHECK(weight.is_contiguous() && scale.is_contiguous(), "decode_layers: weights and scales contiguous");
  if (weight.scalar_type() == at::kBFloat16 && weight.dim() == 2)
    return {weight.const_data_ptr(), nullptr, weight.size(0), weight.size(1), 16};
  TORCH_CHECK(weight.scalar_type() == at::kByte && weight.dim() == 4, "decode_layers: weights bfloat16 or packed");
  const int bits = scale.dim() == 1 ? 8 : 4;
  const int64_t N = weight.size(0) * kLanes, K = weight.size(1) * (bits == 8 ? 4 : 8);
  TORCH_CHECK(scale.numel() == (bits == 8 ? N : N * K / kGroup) &&
                  scale.scalar_type() == (bits == 8 ? at::kFloat : at::kBFloat16),
              "decode_layers: scales that fit the weight");
  return {weight.const_data_ptr(), scale.const_data_ptr(), N, K, bits};
}

const Number* as_vector(const at::Tensor& vector, int64_t size) {
  TORCH_CHECK(vector.scalar_type() == at::kBFloat16 && vector.is_contiguous() && vector.numel() == size,
              "decode_layers: norms bfloat16, of the size of what they scale");
  return vector.const_data_ptr<Number>();
}

void check_sizes(const Layer& layer, int64_t E, int64_t H, int64_t K, int64_t D, int64_t I) {
  const auto fits = [](const Linear& w, int64_t outputs, int64_t inputs, int bits) {
    return w.N == outputs && w.K == inputs && w.bits == bits && w.N % kLanes == 0 &&
           w.K % (bits == 16 ? kLanes : kGroup) == 0;
  };
  TORCH_CHECK(fits(layer.q, H * D, E, layer.q.bits) && fits(layer.k, K * D, E, layer.q.bits) &&
                  fits(layer.v, K * D, E, layer.q.bits) && fits(layer.o, E, H * D, layer.o.bits) &&
                  fits(layer.gate, I, E, layer.gate.bits) && fits(layer.up, I, E, layer.gate.bits) &&
                  fits(layer.down, E, I, layer.down.bits) && H % K == 0,
              "decode_layers: weights of alike layers, sizes multiples of 16 (packed: of 32)");
}

}  // namespace

// x: (B, 1, E) bfloat16, B from 1 to 8; cos, sin: (positions, D) float32; position: (B, 1) int64; keys, values: a cache
// (R, K, S, D) a layer, bfloat16 or int8, written at `position`; key_scales, value_scales: (R, K, S) float32 a layer for
// int8, otherwise none; norms: 4 a layer (input, query, key, post-attention); weights: 7
// a layer (query, key, value, output, gate, up, down), (N, K) bfloat16 or packed; scales: as many, empty for bfloat16.
// Returns (B, 1, E).
at::Tensor qwen3fast::decode_layers(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& position,
                         at::TensorList keys, at::TensorList values, at::TensorList key_scales,
                         at::TensorList value_scales, at::TensorList norms, at::TensorList weights,
                         at::TensorList scales, double eps) {
  const size_t L = keys.size();
  TORCH_CHECK(L > 0 && values.size() == L && norms.size() == 4 * L && weights.size() == 7 * L && scales.size() == 7 * L,
              "decode_layers: two caches, four norms, seven weights and seven scales a layer");
  const int64_t M = x.size(0), E = x.size(-1), K = keys[0].size(1), S = keys[0].size(2), D = keys[0].size(3);
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 && x.numel() == M * E && M >= 1 && M <= 8 && M <= keys[0].size(0) &&
                  E % kLanes == 0 && D % (2 * kLanes) == 0,
              "decode_layers: x (1 to 8, 1, E) bfloat16, E a multiple of 16, D of 32");
  for (const at::Tensor& table : {cos, sin})
    TORCH_CHECK(table.scalar_type() == at::kFloat && table.is_contiguous() && table.dim() == 2 && table.size(1) == D,
                "decode_layers: cos and sin (positions, D) float32, contiguous");
  const at::Tensor places = position.contiguous();
  TORCH_CHECK(places.scalar_type() == at::kLong && places.numel() == M, "decode_layers: position (B, 1) int64");
  const int64_t* at_position = places.const_data_ptr<int64_t>();
  for (int64_t m = 0; m < M; m++)
    TORCH_CHECK(at_position[m] >= 0 && at_position[m] < std::min({S, cos.size(0), sin.size(0)}),
                "decode_layers: position ", at_position[m], " is not in the cache or the tables");

  const bool is_rounded = keys[0].scalar_type() == at::kChar;
  TORCH_CHECK(is_rounded || keys[0].scalar_type() == at::kBFloat16, "decode_layers: keys and values bfloat16 or int8");
  TORCH_CHECK(key_scales.size() == (is_rounded ? L : 0) && value_scales.size() == key_scales.size(),
              "decode_layers: factors of keys and values for int8 only");
  std::vector<Layer> layers;
  for (size_t i = 0; i < L; i++) {
    for (const at::Tensor& cache : {keys[i], values[i]})
      TORCH_CHECK(cache.scalar_type() == keys[0].scalar_type() && cache.is_contiguous() && cache.sizes() == keys[0].sizes(),
                  "decode_layers: keys and values (R, K, S, D), alike, contiguous");
    float* factors[] = {nullptr, nullptr};
    for (int j = 0; is_rounded && j < 2; j++) {
      const at::Tensor& scale = (j ? value_scales : key_scales)[i];
      TORCH_CHECK(scale.scalar_type() == at::kFloat && scale.is_contiguous() &&
                      scale.sizes() == keys[0].sizes().slice(0, 3),
                  "decode_layers: factors (R, K, S) float32, contiguous");
      factors[j] = scale.mutable_data_ptr<float>();
    }
    const auto linear = [&](size_t j) { return as_linear(weights[7 * i + j], scales[7 * i + j]); };
    layers.push_back({as_vector(norms[4 * i], E), as_vector(norms[4 * i + 1], D), as_vector(norms[4 * i + 2], D),
                      as_vector(norms[4 * i + 3], E), linear(0), linear(1), linear(2), linear(3), linear(4), linear(5),
                      linear(6), keys[i].mutable_data_ptr(), values[i].mutable_data_ptr(), factors[0], factors[1]});
    check_sizes(layers[i], E, layers[0].q.N / D, K, D, layers[0].gate.N);
  }

  const int64_t H = layers[0].q.N / D, I = layers[0].gate.N;
  const int threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t longest = *std::max_element(at_position, at_position + M) + 1;
  const int64_t splits = std::clamp<int64_t>(threads / (M * K), 1, (longest + kMinSplit - 1) / kMinSplit);
  at::Tensor y = x.clone(at::MemoryFormat::Contiguous);
  const auto room = [](int64_t count) { return std::vector<Number>(count); };
  Shared shared{{M, E, H, K, D, I, S, static_cast<float>(eps)}, cos.const_data_ptr<float>(), sin.const_data_ptr<float>(),
                at_position, splits, y.mutable_data_ptr<Number>(), room(M * (H + 2 * K) * D), room(M * H * D), room(M * E),
                room(2 * M * I), std::vector<Part>(M * K * splits, Part(0, 0)), {}};
#pragma omp parallel num_threads(threads)
  {
#pragma omp single
    shared.barrier.threads = omp_get_num_threads();  // OpenMP may give fewer than asked for
    (is_rounded ? run<int8_t> : run<Number>)(layers, shared, omp_get_thread_num(), omp_get_num_threads());
  }
  return y;
}
