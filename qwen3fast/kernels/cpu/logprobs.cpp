// Log-probabilities of chosen and most likely tokens. Each block of logits is read once, for its largest one and for the sum of
// exponentials relative to that. The largest ones tell which blocks hold the most likely tokens.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <numeric>
#include <vector>

#include "best.h"
#include "ops.h"
#include "parallel.h"
#include "vec.h"

namespace {

constexpr int64_t kBlock = 64;
constexpr int64_t kGrain = 256;  // blocks that are worth a thread's turn

// NaN comes first, as in torch.topk; of equal logits, the first one.
struct Before {
  const float* logits;

  bool operator()(int64_t a, int64_t b) const {
    const float x = logits[a], y = logits[b];
    if (x != x || y != y) return y == y || (x != x && a < b);
    return x > y || (x == y && a < b);
  }
};

// most: the largest logit, NaN if one is NaN. sum: of exp(logit - most), where most is finite.
void read_block(const float* logits, int64_t count, float* most, float* sum_of_block) {
  Vec x[kBlock / kLanes], largest_of_lanes = fill(-INFINITY);
  Ints is_nan = {};
  for (int64_t i = 0; i < kBlock / kLanes; i++) {
    x[i] = i * kLanes < count ? load_some(logits + i * kLanes, count - i * kLanes) : fill(-INFINITY);
    largest_of_lanes = larger(largest_of_lanes, x[i]);
    is_nan |= x[i] != x[i];
  }
  *most = sum(is_nan) ? NAN : largest(largest_of_lanes);
  Vec total = {};
  if (std::isfinite(*most))
    for (const Vec part : x) total += exp_of_negative(part - *most);
  *sum_of_block = sum(total);
}

// The logarithm of the sum of all exponentials: blocks are added in their order, whatever threads have read them.
float log_sum(const float* most, const float* sums, int64_t blocks) {
  float best = -INFINITY;
  for (int64_t block = 0; block < blocks; block++) {
    if (most[block] != most[block]) return NAN;
    best = std::max(best, most[block]);
  }
  if (!std::isfinite(best)) return best;
  double total = 0;
  for (int64_t block = 0; block < blocks; block += kLanes) {
    const int64_t left = blocks - block;
    const Vec part = load_some(sums + block, left) * exp_of_negative(load_some(most + block, left) - best);
    for (int64_t lane = 0; lane < std::min(kLanes, left); lane++) total += double{part[lane]};
  }
  return best + std::log(static_cast<float>(total));  // of float: with a double it would need glibc 2.29
}

// The n most likely tokens: each of the n blocks with the largest logits has one at least as large as the smallest of these.
void most_likely(const float* logits, int64_t V, const float* most, int64_t blocks, bool has_nan, int64_t n, int64_t* ids) {
  float bound = -INFINITY;
  if (n <= blocks && !has_nan) {
    Lines<float> sorted(most, most + blocks);
    std::nth_element(sorted.begin(), sorted.begin() + n - 1, sorted.end(), std::greater<>());
    bound = sorted[n - 1];
  }
  std::vector<int64_t> found;
  for (int64_t block = 0; block < blocks; block++) {
    if (most[block] < bound) continue;
    for (int64_t v = block * kBlock; v < std::min((block + 1) * kBlock, V); v++)
      if (has_nan || logits[v] >= bound) found.push_back(v);
  }
  std::partial_sort(found.begin(), found.begin() + n, found.end(), Before{logits});
  std::copy_n(found.begin(), n, ids);
}

}  // namespace

void qwen3fast_log_probabilities(const float* logits, const int64_t* token, float* chosen, int64_t* ids, float* values,
                                 int64_t M, int64_t V, int64_t n, int64_t threads) {
  const int64_t blocks = (V + kBlock - 1) / kBlock;
  Lines<float> most(M * blocks), sums(M * blocks);
  parallel_for(M * blocks, kGrain, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t m = i / blocks, first = i % blocks * kBlock;
      read_block(logits + m * V + first, std::min(kBlock, V - first), &most[i], &sums[i]);
    }
  });
  parallel_for(M, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; m++) {
      const float* row = logits + m * V;
      const float total = log_sum(&most[m * blocks], &sums[m * blocks], blocks);
      chosen[m] = token[m] >= 0 ? row[token[m]] - total : 0.f;
      if (n == 0) continue;
      most_likely(row, V, &most[m * blocks], blocks, total != total, n, ids + m * n);
      for (int64_t i = m * n; i < (m + 1) * n; i++) values[i] = row[ids[i]] - total;
    }
  });
}
