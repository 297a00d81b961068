// Products of any number of rows with a bfloat16 weight, which is read where it lies, or unpacked (lossless.h) some rows
// at a time. A few rows stream the weight (matvec.cpp). With more, arithmetic counts: lanes are rows of x, put into pairs
// of channels once per call; the weight's pairs go to all lanes. A result then needs no sum over lanes. The plain PyTorch
// form is in kernels/linear.py.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "ops.h"
#include "parallel.h"
#include "products.h"

namespace {

constexpr int64_t kPanel = 8;  // rows of the weight that are multiplied together
// Of rows of x, and rows of the weight, whose sums fit the registers.
#ifdef __AVX512F__
constexpr int64_t kMaxVectors = 3, kTogether = kPanel;
#else
constexpr int64_t kMaxVectors = 1, kTogether = kPanel / 2;
#endif
constexpr int64_t kSpan = 4;  // panels whose results fill cache lines
constexpr int64_t kInCache = 1 << 18;  // numbers of x that stay in a core's cache
constexpr int64_t kAtATime = 1 << 16;  // numbers of a weight in a group, or 64 rows: the next group needs room as well

// Writes sums of 16 rows, which are lanes, with the weight's rows of a panel: y (16, kPanel), kSpan * kPanel apart.
void store_panel(const Vec* sums, BFloat16* y) {
  Bits two[4];  // columns, for each row
  for (int i = 0; i < 4; i++) two[i] = as_bfloat16(sums[2 * i], sums[2 * i + 1]);
#define LOW 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29
#define HIGH 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31
  const Bits a = shuffle<LOW>(two[0], two[1]), b = shuffle<LOW>(two[2], two[3]);
  const Bits c = shuffle<HIGH>(two[0], two[1]), d = shuffle<HIGH>(two[2], two[3]);
#define LOW_TWO 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define HIGH_TWO 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
  const Bits eight[4] = {shuffle<LOW_TWO>(a, b), shuffle<HIGH_TWO>(a, b),
                         shuffle<LOW_TWO>(c, d), shuffle<HIGH_TWO>(c, d)};
  constexpr int64_t kBytes = kPanel * sizeof(BFloat16);
  for (int64_t m = 0; m < kLanes; m++)  // row 4i + j is part i of vector j
    std::memcpy(y + m * kSpan * kPanel, reinterpret_cast<const char*>(&eight[m % 4]) + m / 4 * kBytes, kBytes);
}

// Sums of kVectors blocks of 16 rows of x with kTogether rows of the weight: block i and row j are sums[i * kPanel + j].
// Lines of both are asked for per 32 channels.
template <int kVectors>
void sum_rows(const Bits* x, const BFloat16* weight, Vec* sums, int64_t K, Ahead next_weight, Ahead next_x) {
  const int64_t pairs = K / 2;
  Vec total[kVectors][kTogether] = {};
  for (int64_t begin = 0; begin < pairs; begin += kLanes) {
    next_weight.ask(), next_x.ask();
    for (int64_t p = begin; p < std::min(begin + kLanes, pairs); p++) {
      Bits xs[kVectors];
#pragma GCC unroll 3
      for (int i = 0; i < kVectors; i++) xs[i] = x[i * pairs + p];
#pragma GCC unroll 8
      for (int j = 0; j < kTogether; j++) {
        const Bits two = load_as<uint32_t>(weight + j * K + 2 * p);
#pragma GCC unroll 3
        for (int i = 0; i < kVectors; i++) total[i][j] = dot2(total[i][j], xs[i], two);
      }
    }
  }
#pragma GCC unroll 3
  for (int i = 0; i < kVectors; i++)
#pragma GCC unroll 8
    for (int j = 0; j < kTogether; j++) sums[i * kPanel + j] = total[i][j];
}

// kVectors blocks of 16 rows of x times a panel of the weight. y: (16 kVectors, kPanel), kSpan * kPanel apart.
template <int kVectors>
void multiply(const Bits* x, const BFloat16* weight, BFloat16* y, int64_t K, Ahead next_weight, Ahead next_x) {
  Vec sums[kVectors * kPanel];
  for (int64_t j = 0; j < kPanel; j += kTogether) {
    sum_rows<kVectors>(x, weight + j * K, sums + j, K, next_weight, next_x);
    next_weight.count = next_x.count = 0;
  }
  for (int i = 0; i < kVectors; i++) store_panel(sums + i * kPanel, y + i * kLanes * kSpan * kPanel);
}

// Panels begin..end of the weight with all M rows, in pairs. y: `width` numbers from one row to the next. Some rows of x pass
// over a group of panels, then the next rows; meanwhile the next group and these rows are asked for. Results are written in whole
// cache lines: rows of y often lie a multiple of 4,096 bytes apart, and their lines, if they were not complete, would drive
// each other out of the cache.
// up: null, or a second weight, whose results are combined with the first one's as in a feed-forward layer.
void multiply_panels(const Bits* x, int64_t M, const Linear& weight, const Linear* up, BFloat16* y, int64_t begin,
                     int64_t end, int64_t width) {
  const int64_t K = weight.K;
  const int64_t most = std::clamp(2 * kInCache / (kLanes * K), std::min<int64_t>(2, kMaxVectors), kMaxVectors);
  const int64_t blocks = (M + kLanes - 1) / kLanes, parts = (blocks + most - 1) / most;
  const int64_t numbers = kPanel * K, lines = (kPanel + parts - 1) / parts, columns = kSpan * kPanel;
  const bool is_small = M * K <= kInCache;
  const int64_t group = kSpan * (is_small ? 1 : std::max<int64_t>(2, kAtATime / (kSpan * numbers)));
  alignas(64) BFloat16 results[2][kMaxVectors * kLanes * kSpan * kPanel];
  static thread_local Lines<BFloat16> rooms[2];
  const Linear* const weights[] = {&weight, up};
  for (int64_t first = begin; first < end; first += group) {
    const BFloat16* panels[2] = {};  // from `first` on
    for (int64_t which = 0; which < (up ? 2 : 1); which++)
      panels[which] = plain_rows(*weights[which], first * kPanel, std::min(group, end - first) * kPanel, rooms[which]);
    for (int64_t part = 0; part < parts; part++) {
      const int64_t block = blocks * part / parts, vectors = blocks * (part + 1) / parts - block;
      const int64_t rows = std::min(M - block * kLanes, vectors * kLanes), last = std::min(first + group, end);
      const int64_t next_block = part + 1 < parts ? block + vectors : 0;
      const int64_t x_lines = is_small || parts == 1 ? 0 : (most * kLanes + last - first - 1) / (last - first);
      const auto run = vectors == 1 ? multiply<1> : vectors == 2 ? multiply<std::min<int64_t>(2, kMaxVectors)> : multiply<kMaxVectors>;
      for (int64_t panel = first; panel < last; panel += kSpan) {
        const int64_t count = std::min(kSpan, last - panel);
        BFloat16* const to = y + block * kLanes * width + panel * kPanel;
        for (int64_t r = 0; r < rows; r++) __builtin_prefetch(to + r * width, 1);
        for (int64_t which = 0; which < (up ? 2 : 1); which++)
          for (int64_t i = 0; i < count; i++) {
            const uint8_t* weight_ahead = stored_row(*weights[which], (panel + i + group) * kPanel + part * lines);
            const Bits* x_ahead = x + next_block * K / 2 + (panel - first + i) * x_lines * K / (2 * kLanes);
            run(x + block * K / 2, panels[which] + (panel - first + i) * numbers, results[which] + i * kPanel, K,
                {reinterpret_cast<const char*>(weight_ahead), lines},
                {reinterpret_cast<const char*>(x_ahead), which ? 0 : x_lines});
          }
        if (up) gate_values(results[0], results[1], rows * columns, results[0]);
        for (int64_t r = 0; r < rows; r++)
          if (count == kSpan)  // a constant size: one move
            std::memcpy(to + r * width, results[0] + r * columns, columns * sizeof(BFloat16));
          else
            std::copy_n(results[0] + r * columns, count * kPanel, to + r * width);
      }
    }
  }
}

// x in pairs of channels, 16 rows after 16 rows, in memory that is kept: fresh memory would cost a page fault per 4 KiB in
// each call.
const Bits* paired(const BFloat16* x, int64_t M, int64_t K, int64_t threads) {
  const int64_t blocks = (M + kLanes - 1) / kLanes;
  static thread_local std::vector<Bits> room;
  if (static_cast<int64_t>(room.size()) < blocks * K / 2) room.resize(blocks * K / 2);
  Bits* const pairs = room.data();
  parallel_for(blocks, 2, threads, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin * kLanes; m < std::min(M, end * kLanes); m += kLanes)
      put_into_pairs(x + m * K, std::min(M - m, kLanes), K, kLanes, reinterpret_cast<uint32_t*>(pairs) + m * K / 2);
  });
  return pairs;
}

}  // namespace

void linear_together(const BFloat16* x, const Linear* weights, int64_t count, BFloat16* y, int64_t M, int64_t threads) {
  const int64_t K = weights[0].K;
  int64_t width = 0;
  for (int64_t i = 0; i < count; i++) width += weights[i].N;
  for (; M > kKeptRows; M -= kKeptRows, x += kKeptRows * K, y += kKeptRows * width)
    linear_together(x, weights, count, y, kKeptRows, threads);
  const Bits* const pairs = paired(x, M, K, threads);
  parallel_for(width / kPanel, std::max<int64_t>(1, 32768 / (K * kPanel)), threads, [&](int64_t begin, int64_t end) {
    int64_t first = 0;  // panel of this weight
    for (int64_t i = 0; i < count; i++) {
      const int64_t panels = weights[i].N / kPanel;
      multiply_panels(pairs, M, weights[i], nullptr, y + first * kPanel, std::max<int64_t>(begin - first, 0),
                      std::min(end - first, panels), width);
      first += panels;
    }
  }, parts_for(M));
}

void gated_together(const BFloat16* x, const Linear& gate, const Linear& up, BFloat16* y, int64_t M, int64_t threads) {
  const int64_t N = gate.N, K = gate.K;
  for (; M > kKeptRows; M -= kKeptRows, x += kKeptRows * K, y += kKeptRows * N)
    gated_together(x, gate, up, y, kKeptRows, threads);
  const Bits* const pairs = paired(x, M, K, threads);
  parallel_for(N / kPanel, std::max<int64_t>(1, 32768 / (K * kPanel)), threads,
               [&](int64_t begin, int64_t end) { multiply_panels(pairs, M, gate, &up, y, begin, end, N); }, parts_for(M));
}

void qwen3fast_linear(const BFloat16* x, const BFloat16* weight, BFloat16* y, int64_t M, int64_t N, int64_t K,
                      int64_t threads) {
  if (M >= kManyRows && N % kPanel == 0) {
    const Linear linear{weight, nullptr, N, K, 16, 0, 0, nullptr};
    return linear_together(x, &linear, 1, y, M, threads);
  }
  parallel_for(N, std::max<int64_t>(64, 16384 / K), threads,
               [&](int64_t n0, int64_t n1) { matvec_rows(x, M, weight, y, n0, n1, N, K); });
}
