// The samplers of sampling/samplers.py, by all threads together: the same rules and noise. The largest score of each block
// tells where the kept tokens are, and a bound which of them can win: few need sorting, or logarithms, unless scores are flat.

#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "ops.h"
#include "parallel.h"
#include "vec.h"

namespace {

constexpr int64_t kScores = 64;  // in a block, whose largest one is kept
constexpr float kUnit = 0x1p31f;  // of integer weights, whose sum does not depend on the order
constexpr int64_t kBins = 1024;
constexpr float kBinsPerScore = kBins / 21.5f;  // weights below exp(-21.5) are 0

// Sixteen numbers of `count` that are left, -infinity beyond them.
template <typename T>
FORCE_INLINE Vec load_some(const T* p, int64_t count) {
  if (count >= kLanes) return load(p);
  T padded[kLanes];
  std::fill_n(padded, kLanes, T(-INFINITY));
  std::copy_n(p, count, padded);
  return load(padded);
}

// The largest number and its index, the first of equals. value: NaN if a number is NaN.
struct Best {
  float value = -INFINITY;
  int64_t index = 0;

  Best() = default;
  Best(float value, int64_t index) : value(value), index(index) {}

  // Of numbers begin..end of a row.
  template <typename T>
  Best(const T* row, int64_t begin, int64_t end) {
    Vec most = fill(value);
    Ints first = {}, is_nan = {};
    for (int64_t n = begin; n < end; n += kLanes) {
      const Vec x = load_some(row + n, end - n);
      const Ints is_more = x > most;
      most = select(is_more, x, most);
      first = select(is_more, Ints(static_cast<int32_t>(n)), first);
      is_nan |= x != x;
    }
    for (int64_t lane = 0; lane < kLanes; lane++) merge({most[lane], first[lane] + lane});
    if (sum(is_nan)) value = NAN;
  }

  void merge(Best other) {
    if (other.value > value || other.value != other.value || (other.value == value && other.index < index)) *this = other;
  }
};

// 32-bit hashes: see samplers.py.
template <typename T>  // uint32_t or Bits
FORCE_INLINE T mix(T x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

struct Noise {
  uint32_t first, second;

  Noise(int64_t seed, int64_t step) {
    first = mix(mix(static_cast<uint32_t>(seed)) ^ mix(static_cast<uint32_t>(seed >> 32) ^ 0x5bd1e995u) ^
                mix(static_cast<uint32_t>(step) + 0x3c6ef372u));
    second = mix(first ^ 0x2545f491u);
  }

  // Uniform numbers of sixteen tokens.
  Vec uniform(int64_t token) const {
    Bits index;
    for (int64_t lane = 0; lane < kLanes; lane++) index.set(lane, static_cast<uint32_t>(token + lane));
    const Bits bits = mix(mix(index + first) ^ second);
    return (convert<Vec>(bits) + 0.5f) * 0x1p-32f;
  }

  static float gumbel(float uniform) { return -std::log(-std::log1p(-std::min(uniform, 1 - 0x1p-24f))); }
};

FORCE_INLINE Bits weights(Vec score) { return convert<Bits>(exp_of_negative(score) * kUnit); }

// In descending order of scores.
FORCE_INLINE Ints bins(Vec score) {
  const Vec bin = score * -kBinsPerScore;
  return convert<Ints>(select(bin < kBins - 1, bin, fill(kBins - 1)));
}

struct RowSampling {
  float temperature = 0;
  int64_t top_k = 0;
  float top_p = 1, min_p = 0;
  int64_t seed = 0, step = 0;

  RowSampling() = default;
  RowSampling(const Sampling& rows, int64_t m)
      : temperature(rows.temperature[m]), top_k(rows.top_k[m]), top_p(rows.top_p[m]), min_p(rows.min_p[m]),
        seed(rows.seed[m]), step(rows.step[m]) {}

  // By its bits, on which threads agree: in some, subnormal numbers may count as 0.
  bool is_greedy() const { return std::bit_cast<int32_t>(temperature) <= 0; }
};

class Sampler {
 public:
  Sampler(int64_t V, int64_t threads, bool is_greedy) : V_(V), blocks_((V + kScores - 1) / kScores), best_(3 * threads) {
    if (is_greedy) return;
    score_.reset(new float[blocks_ * kScores]), most_.resize(blocks_);
    mass_.resize(threads * kBins);
  }

  // Returns the token of row m to all threads, -1 if its logits hold NaN or infinity, or only -infinity. Rows come one after
  // the other. sampling: null for greedy.
  template <typename T>
  int64_t choose(const T* logits, const Sampling* sampling, int64_t m, Barrier& barrier, int thread, int threads) {
    const RowSampling row = sampling ? RowSampling(*sampling, m) : RowSampling();
    const int64_t begin = blocks_ * thread / threads, end = blocks_ * (thread + 1) / threads;
    const Best best = together(m % 2, {logits, begin * kScores, std::min(end * kScores, V_)}, barrier, thread, threads);
    if (!std::isfinite(best.value)) return -1;
    if (row.is_greedy()) return best.index;

    score(logits, best.value, row, begin, end, mass_.data() + thread * kBins);
    barrier.wait();
    if (thread == 0) threshold_ = threshold(row, threads);
    barrier.wait();
    return together(2, race(Noise(row.seed, row.step), best.index, begin, end), barrier, thread, threads).index;
  }

 private:
  // The best of all threads. Two of the places take turns: a thread may still read one when another is in the next row.
  Best together(int64_t place, Best own, Barrier& barrier, int thread, int threads) {
    Best* all = best_.data() + place * threads;
    all[thread] = own;
    barrier.wait();
    Best best = all[0];
    for (int other = 1; other < threads; other++) best.merge(all[other]);
    return best;
  }

  static bool needs_mass(const RowSampling& row, int64_t V) { return row.top_p < 1 && (row.top_k <= 0 || row.top_k >= V); }

  // Blocks begin..end: their scores, at most 0, the largest of each, and the weight of each bin of scores where needed.
  template <typename T>
  void score(const T* logits, float best, const RowSampling& row, int64_t begin, int64_t end, int64_t* mass) {
    const bool has_mass = needs_mass(row, V_);
    if (has_mass) std::fill_n(mass, kBins, 0);
    for (int64_t block = begin; block < end; block++) {
      Vec most = fill(-INFINITY);
      for (int64_t n = block * kScores; n < (block + 1) * kScores; n += kLanes) {
        const Vec x = n < V_ ? (load_some(logits + n, V_ - n) - best) / row.temperature + 0.f : fill(-INFINITY);
        store(&score_[n], x);
        most = larger(most, x);
        if (!has_mass) continue;
        const Bits weight = weights(x);
        if (!sum(weight != 0)) continue;
        const Ints bin = bins(x);
        for (int64_t lane = 0; lane < kLanes; lane++) mass[bin[lane]] += weight[lane];
      }
      most_[block] = largest(most);
    }
  }

  // The smallest score that is kept.
  float threshold(const RowSampling& row, int threads) {
    float least = -INFINITY;
    if (row.top_k > 0 && row.top_k < V_) {
      // Each of the top_k blocks with the largest scores has one at least as large as the smallest of these.
      const int64_t k = row.top_k;
      float bound = -INFINITY;
      if (k <= blocks_) {
        kept_ = most_;
        std::nth_element(kept_.begin(), kept_.begin() + k - 1, kept_.end(), std::greater<>());
        bound = kept_[k - 1];
      }
      collect([&](Vec x) { return x >= bound; }, bound);
      std::nth_element(kept_.begin(), kept_.begin() + k - 1, kept_.end(), std::greater<>());
      least = kept_[k - 1];
      if (row.top_p < 1) {
        std::erase_if(kept_, [&](float x) { return !(x >= least); });
        int64_t total = 0;
        for (const float x : kept_) total += weights(fill(x))[0];
        least = descend(0, target(row.top_p, total));
      }
    } else if (row.top_p < 1) {
      int64_t total = 0, above = 0, bin = 0;
      for (int64_t i = 0; i < threads * kBins; i++) total += mass_[i];
      const int64_t reached = target(row.top_p, total);
      for (; bin < kBins - 1; bin++) {
        int64_t mass = 0;
        for (int thread = 0; thread < threads; thread++) mass += mass_[thread * kBins + bin];
        if (above + mass >= reached) break;
        above += mass;
      }
      const float margin = bin < kBins - 1 ? (static_cast<float>(bin) + 1.5f) / kBinsPerScore : INFINITY;
      collect([&](Vec x) { return bins(x) == static_cast<int32_t>(bin) - Ints{}; }, -margin);
      least = descend(above, reached);
    }
    return std::max(least, std::log(row.min_p));
  }

  static int64_t target(float top_p, int64_t total) {
    return std::max<int64_t>(1, static_cast<int64_t>(std::ceil(double{top_p} * static_cast<double>(total))));
  }

  // Puts the scores for which a condition holds into kept_; they must be at least `least`.
  template <typename Condition>
  void collect(const Condition& holds, float least) {
    kept_.clear();
    for (int64_t block = 0; block < blocks_; block++) {
      if (most_[block] < least) continue;
      for (int64_t n = block * kScores; n < std::min((block + 1) * kScores, V_); n += kLanes) {
        const Ints is_held = holds(load(&score_[n]));
        if (!sum(is_held)) continue;
        for (int64_t lane = 0; lane < std::min(kLanes, V_ - n); lane++)
          if (is_held[lane]) kept_.push_back(score_[n + lane]);
      }
    }
  }

  // The score in kept_ at which the weight above it and before kept_ reaches a target.
  float descend(int64_t above, int64_t reached) {
    std::sort(kept_.begin(), kept_.end(), std::greater<>());
    for (const float x : kept_)
      if ((above += weights(fill(x))[0]) >= reached) return x;
    return kept_.empty() ? -INFINITY : kept_.back();
  }

  // The largest score + noise of blocks begin..end. The best score wins at first. Noise -log(-log(1 - u)) can lift a score s
  // above the winner only if u < exp(s - winner), since -log(1 - u) >= u.
  Best race(const Noise& noise, int64_t best, int64_t begin, int64_t end) {
    Best winner(Noise::gumbel(noise.uniform(best)[0]), best);
    const auto bound = [&] { return std::exp(-winner.value) * 1.001f; };
    float limit = bound();
    for (int64_t block = begin; block < end; block++) {
      if (!(most_[block] >= threshold_)) continue;
      for (int64_t n = block * kScores; n < (block + 1) * kScores; n += kLanes) {
        const Vec x = load(&score_[n]), uniform = noise.uniform(n);
        const Ints can_win = (x >= threshold_) & (uniform <= exp_of_negative(x) * limit);
        if (!sum(can_win)) continue;
        for (int64_t lane = 0; lane < kLanes; lane++)
          if (can_win[lane]) winner.merge({x[lane] + Noise::gumbel(uniform[lane]), n + lane});
        limit = bound();
      }
    }
    return winner;
  }

  int64_t V_, blocks_;
  std::vector<Best> best_;
  std::unique_ptr<float[]> score_;
  Lines<float> most_, kept_;
  std::vector<int64_t> mass_;  // (threads, kBins)
  float threshold_ = 0;
};

}  // namespace
