// Products of any number of rows with a bfloat16 weight, which is read where it lies. A few rows stream the weight
// (matvec.cpp). With more, arithmetic counts: lanes are rows of x, put into pairs of channels once per call; the weight's
// pairs go to all lanes. A result then needs no sum over lanes. The plain PyTorch form is in kernels/linear.py.

#include <algorithm>
#include <cstdint>
#include <memory>

#include "ops.h"
#include "parallel.h"
#include "products.h"

namespace {

constexpr int64_t kPanel = 8;  // rows of the weight that are multiplied together
#ifdef __AVX512F__
constexpr int64_t kMaxVectors = 3;  // of rows of x: kMaxVectors * kPanel sums fit the registers
#else
constexpr int64_t kMaxVectors = 1;
#endif
constexpr int64_t kManyRows = 8;  // from which lanes are rows; all chunks of prompts have as many
constexpr int64_t kVectorsInCache = 12;  // rows of x, in vectors, that pass while a panel of the weight is in the cache

// Writes sums of up to 16 rows, which are lanes, with the weight's rows of a panel: y (rows, kPanel), N apart.
void store_panel(const Vec* sums, BFloat16* y, int64_t rows, int64_t N) {
  Bits two[4];  // columns, for each row
  for (int i = 0; i < 4; i++) two[i] = as_bfloat16(sums[2 * i]) | as_bfloat16(sums[2 * i + 1]) << 16;
#define LOW 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29
#define HIGH 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31
  const Bits a = __builtin_shufflevector(two[0], two[1], LOW), b = __builtin_shufflevector(two[2], two[3], LOW);
  const Bits c = __builtin_shufflevector(two[0], two[1], HIGH), d = __builtin_shufflevector(two[2], two[3], HIGH);
#define LOW_TWO 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define HIGH_TWO 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
  const Bits eight[4] = {__builtin_shufflevector(a, b, LOW_TWO), __builtin_shufflevector(a, b, HIGH_TWO),
                         __builtin_shufflevector(c, d, LOW_TWO), __builtin_shufflevector(c, d, HIGH_TWO)};
  constexpr int64_t kBytes = kPanel * sizeof(BFloat16);
  for (int64_t m = 0; m < rows; m++)  // row 4i + j is part i of vector j
    std::memcpy(y + m * N, reinterpret_cast<const char*>(&eight[m % 4]) + m / 4 * kBytes, kBytes);
}

// kVectors blocks of 16 rows, the first of `rows` of x, times a panel of the weight. Meanwhile `lines` cache lines per 32
// channels are asked for from `next` on.
template <int kVectors>
void multiply(const Bits* x, const BFloat16* weight, BFloat16* y, int64_t rows, int64_t N, int64_t K, int64_t lines,
              const char* next) {
  const int64_t pairs = K / 2;
  Vec total[kVectors][kPanel] = {};
  for (int64_t begin = 0; begin < pairs; begin += kLanes) {
    for (int64_t i = 0; i < lines; i++, next += 64) __builtin_prefetch(next, 0, kIntoL2);
    for (int64_t p = begin; p < std::min(begin + kLanes, pairs); p++) {
      Bits xs[kVectors];
#pragma GCC unroll 3
      for (int i = 0; i < kVectors; i++) xs[i] = x[i * pairs + p];
#pragma GCC unroll 8
      for (int j = 0; j < kPanel; j++) {
        const Bits two = load_as<uint32_t>(weight + j * K + 2 * p) - Bits{};
#pragma GCC unroll 3
        for (int i = 0; i < kVectors; i++) total[i][j] = dot2(total[i][j], xs[i], two);
      }
    }
  }
#pragma GCC unroll 3
  for (int i = 0; i < kVectors; i++)
    store_panel(total[i], y + i * kLanes * N, std::min(rows - i * kLanes, kLanes), N);
}

// Panels begin..end of the weight with all M rows, in pairs. Each panel is read from memory during the one before it.
void multiply_panels(const Bits* x, int64_t M, const BFloat16* weight, BFloat16* y, int64_t begin, int64_t end, int64_t N,
                     int64_t K) {
  const int64_t blocks = (M + kLanes - 1) / kLanes;
  for (int64_t first = 0; first < blocks; first += kVectorsInCache) {
    const int64_t count = std::min(kVectorsInCache, blocks - first), parts = (count + kMaxVectors - 1) / kMaxVectors;
    const int64_t lines = (kPanel + parts - 1) / parts;
    for (int64_t panel = begin; panel < end; panel++) {
      const BFloat16* w = weight + panel * kPanel * K;
      const auto* next = reinterpret_cast<const char*>(w + kPanel * K);
      for (int64_t part = 0; part < parts; part++, next += lines * K * 2) {
        const int64_t block = first + count * part / parts, vectors = first + count * (part + 1) / parts - block;
        const auto run = vectors == 1 ? multiply<1> : vectors == 2 ? multiply<std::min(2l, kMaxVectors)> : multiply<kMaxVectors>;
        run(x + block * K / 2, w, y + block * kLanes * N + panel * kPanel, M - block * kLanes, N, K, lines, next);
      }
    }
  }
}

}  // namespace

void qwen3fast_linear(const BFloat16* x, const BFloat16* weight, BFloat16* y, int64_t M, int64_t N, int64_t K,
                      int64_t threads) {
  if (M < kManyRows || N % kPanel) {
    parallel_for(N, std::max<int64_t>(64, 16384 / K), threads,
                 [&](int64_t n0, int64_t n1) { matvec_rows(x, M, weight, y, n0, n1, N, K); });
    return;
  }
  const int64_t blocks = (M + kLanes - 1) / kLanes;
  const std::unique_ptr<Bits[]> pairs(new Bits[blocks * K / 2]);
  parallel_for(blocks, 2, threads, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin * kLanes; m < std::min(M, end * kLanes); m += kLanes)
      put_into_pairs(x + m * K, std::min(M - m, kLanes), K, kLanes, reinterpret_cast<uint32_t*>(pairs.get()) + m * K / 2);
  });
  parallel_for(N / kPanel, std::max<int64_t>(1, 32768 / (K * kPanel)), threads,
               [&](int64_t begin, int64_t end) { multiply_panels(pairs.get(), M, weight, y, begin, end, N, K); });
}
