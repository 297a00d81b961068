// Two operations that decoding on a CPU spends its time in, for bfloat16 weights and cache:
//
//   matvec(x, weight) -> y            y[m, n] = sum_k x[m, k] weight[n, k]   for few rows m: streams the weight once
//   decode_attention(q, k, v, position) -> y      one query a row over the used part of a KV cache
//
// Arithmetic is in float32. The code is written with the compilers' vector extensions, not with one processor's
// intrinsics: a Vec of 16 floats is one AVX-512 register, two AVX2 or four NEON registers. The plain PyTorch forms of
// both operations are in kernels/linear.py and model/attention.py.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t kLanes = 16;
typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef uint32_t Bits __attribute__((vector_size(kLanes * sizeof(uint32_t))));
typedef uint16_t Half __attribute__((vector_size(kLanes * sizeof(uint16_t))));

// Sixteen bfloat16 numbers as float32: their bits are the upper halves.
inline Vec load(const at::BFloat16* p) {
  Half half;
  std::memcpy(&half, p, sizeof half);
  Bits bits = __builtin_convertvector(half, Bits) << 16;
  Vec vec;
  std::memcpy(&vec, &bits, sizeof vec);
  return vec;
}

inline Vec load(const float* p) {
  Vec vec;
  std::memcpy(&vec, p, sizeof vec);
  return vec;
}

inline void store(float* p, Vec vec) { std::memcpy(p, &vec, sizeof vec); }

inline Vec fill(float value) { return value - Vec{}; }

inline float sum(Vec vec) {
  float total = 0;
  for (int64_t i = 0; i < kLanes; i++) total += vec[i];
  return total;
}

void to_float(const at::BFloat16* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; i++) to[i] = static_cast<float>(from[i]);
}

// ---------------------------------------------------------------------------------------------------------- matvec

// Rows n0..n1 of the weight, kRows at a time (each has its own accumulators, so that additions overlap).
template <int M, int kRows>
void matvec_rows(const float* x, const at::BFloat16* weight, at::BFloat16* y, int64_t n0, int64_t n1, int64_t N,
                 int64_t K) {
  // The hardware prefetcher stops at page borders; asking for the rows after these keeps memory busy.
  constexpr int64_t kAhead = 2048 / sizeof(at::BFloat16);
  for (int64_t n = n0; n < n1; n += kRows) {
    const int rows = static_cast<int>(std::min<int64_t>(kRows, n1 - n));
    const at::BFloat16* w[kRows];
    for (int r = 0; r < kRows; r++) w[r] = weight + (n + std::min(r, rows - 1)) * K;
    Vec total[kRows][M] = {};
    for (int64_t k = 0; k < K; k += kLanes) {
      Vec xs[M];
      for (int m = 0; m < M; m++) xs[m] = load(x + m * K + k);
      for (int r = 0; r < kRows; r++) {
        __builtin_prefetch(w[r] + k + kAhead);
        const Vec ws = load(w[r] + k);
        for (int m = 0; m < M; m++) total[r][m] += ws * xs[m];
      }
    }
    for (int r = 0; r < rows; r++)
      for (int m = 0; m < M; m++) y[m * N + n + r] = static_cast<at::BFloat16>(sum(total[r][m]));
  }
}

// x: (..., K), M rows in all; weight: (N, K) contiguous; both bfloat16. Returns (..., N).
at::Tensor matvec(const at::Tensor& x, const at::Tensor& weight) {
  const int64_t N = weight.size(0), K = weight.size(1), M = x.numel() / K;
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 && weight.scalar_type() == at::kBFloat16, "matvec: bfloat16 only");
  TORCH_CHECK(weight.is_contiguous() && x.size(-1) == K, "matvec: weight (N, K) contiguous, x (..., K)");
  TORCH_CHECK(K % kLanes == 0 && M >= 1 && M <= 8, "matvec: K a multiple of 16, 1 to 8 rows");
  auto shape = x.sizes().vec();
  shape.back() = N;
  at::Tensor y = at::empty(shape, x.options());
  const at::Tensor x_contiguous = x.contiguous();
  std::vector<float> xs(M * K);
  to_float(x_contiguous.const_data_ptr<at::BFloat16>(), xs.data(), M * K);
  const auto* w = weight.const_data_ptr<at::BFloat16>();
  auto* out = y.mutable_data_ptr<at::BFloat16>();
  at::parallel_for(0, N, std::max<int64_t>(64, 16384 / K), [&](int64_t n0, int64_t n1) {
    const float* xp = xs.data();
    switch (M) {
      case 1: return matvec_rows<1, 8>(xp, w, out, n0, n1, N, K);
      case 2: return matvec_rows<2, 6>(xp, w, out, n0, n1, N, K);
      case 3: return matvec_rows<3, 4>(xp, w, out, n0, n1, N, K);
      case 4: return matvec_rows<4, 4>(xp, w, out, n0, n1, N, K);
      case 5: return matvec_rows<5, 3>(xp, w, out, n0, n1, N, K);
      case 6: return matvec_rows<6, 3>(xp, w, out, n0, n1, N, K);
      case 7: return matvec_rows<7, 2>(xp, w, out, n0, n1, N, K);
      case 8: return matvec_rows<8, 2>(xp, w, out, n0, n1, N, K);
    }
  });
  return y;
}

// ------------------------------------------------------------------------------------------------ decode attention

constexpr int64_t kBlock = 128;  // positions between two updates of the running maximum

// One key/value head of one row: its G query heads over positions 0..length-1, each key and value read once.
// Online softmax; source: Milakov and Gimelshein, arXiv:1805.02867.
void attend_head(const float* q, const at::BFloat16* k, const at::BFloat16* v, at::BFloat16* y, int64_t G, int64_t D,
                 int64_t length, float scale) {
  std::vector<float> score(G * kBlock), out(G * D, 0.f), maximum(G, -1e30f), total(G, 0.f);
  for (int64_t start = 0; start < length; start += kBlock) {
    const int64_t count = std::min(kBlock, length - start);
    for (int64_t t = 0; t < count; t++) {
      const at::BFloat16* key = k + (start + t) * D;
      for (int64_t g = 0; g < G; g++) {
        Vec dot = {};
        for (int64_t d = 0; d < D; d += kLanes) dot += load(key + d) * load(q + g * D + d);
        score[g * kBlock + t] = sum(dot) * scale;
      }
    }
    for (int64_t g = 0; g < G; g++) {
      float* s = score.data() + g * kBlock;
      const float new_maximum = std::max(maximum[g], *std::max_element(s, s + count));
      const float shrink = std::exp(maximum[g] - new_maximum);
      float added = 0;
      for (int64_t t = 0; t < count; t++) {
        s[t] = std::exp(s[t] - new_maximum);
        added += s[t];
      }
      total[g] = total[g] * shrink + added;
      maximum[g] = new_maximum;
      for (int64_t d = 0; d < D; d++) out[g * D + d] *= shrink;
    }
    // Two query heads at a time share the loads of the values; sums stay in registers over the whole block.
    for (int64_t g = 0; g < G; g += 2) {
      const int64_t other = std::min(g + 1, G - 1);
      for (int64_t d = 0; d < D; d += kLanes) {
        Vec a = load(out.data() + g * D + d), b = load(out.data() + other * D + d);
        for (int64_t t = 0; t < count; t++) {
          const Vec value = load(v + (start + t) * D + d);
          a += fill(score[g * kBlock + t]) * value;
          b += fill(score[other * kBlock + t]) * value;
        }
        store(out.data() + other * D + d, b);
        store(out.data() + g * D + d, a);
      }
    }
  }
  for (int64_t g = 0; g < G; g++)
    for (int64_t d = 0; d < D; d++) y[g * D + d] = static_cast<at::BFloat16>(out[g * D + d] / total[g]);
}

// q: (B, 1, H, D); k, v: (R, K, S, D) with R >= B; position: (B, 1) int64, the query's own place. Positions 0..position
// are attended to. Returns (B, H, 1, D). All bfloat16.
at::Tensor decode_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const at::Tensor& position) {
  const int64_t B = q.size(0), H = q.size(2), D = q.size(3), K = k.size(1), S = k.size(2), G = H / K;
  TORCH_CHECK(q.scalar_type() == at::kBFloat16 && k.scalar_type() == at::kBFloat16 && v.scalar_type() == at::kBFloat16,
              "decode_attention: bfloat16 only");
  TORCH_CHECK(k.is_contiguous() && v.is_contiguous() && k.size(3) == D && D % kLanes == 0 && H % K == 0 && q.size(1) == 1,
              "decode_attention: k and v (R, K, S, D) contiguous, D a multiple of 16");
  const at::Tensor q_contiguous = q.contiguous(), position_contiguous = position.contiguous();
  std::vector<float> qs(B * H * D);
  to_float(q_contiguous.const_data_ptr<at::BFloat16>(), qs.data(), B * H * D);
  at::Tensor y = at::empty({B, H, 1, D}, q.options());
  const auto* ks = k.const_data_ptr<at::BFloat16>();
  const auto* vs = v.const_data_ptr<at::BFloat16>();
  const auto* at_position = position_contiguous.const_data_ptr<int64_t>();
  auto* out = y.mutable_data_ptr<at::BFloat16>();
  const float scale = 1.f / std::sqrt(static_cast<float>(D));
  at::parallel_for(0, B * K, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t length = std::min(at_position[i / K] + 1, S);
      attend_head(qs.data() + i * G * D, ks + i * S * D, vs + i * S * D, out + i * G * D, G, D, length, scale);
    }
  });
  return y;
}

}  // namespace

TORCH_LIBRARY(qwen3fast, library) {
  library.def("matvec(Tensor x, Tensor weight) -> Tensor");
  library.def("decode_attention(Tensor q, Tensor k, Tensor v, Tensor position) -> Tensor");
}

TORCH_LIBRARY_IMPL(qwen3fast, CPU, library) {
  library.impl("matvec", &matvec);
  library.impl("decode_attention", &decode_attention);
}
