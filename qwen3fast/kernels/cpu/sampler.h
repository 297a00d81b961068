// The samplers of sampling/samplers.py, by all threads together: the same rules and noise. The largest score of each block
// tells where the kept tokens are, and a bound which of them can win: few need sorting, or logarithms, unless scores are flat.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include "ops.h"
#include "parallel.h"

// The largest of some numbers and its index, the first of equals. value: NaN if one of them is NaN.
struct Best {
  float value = -INFINITY;
  int64_t index = 0;

  void merge(Best other) {
    if (other.value > value || other.value != other.value || (other.value == value && other.index < index)) *this = other;
  }
};

class Sampler {
 public:
  static constexpr int64_t kBlock = 64;  // scores, whose largest one is kept

  Sampler(int64_t V, int64_t threads, bool is_greedy);

  // The tokens begin..end of a row whose logits a thread reads.
  struct Tokens {
    int64_t begin, end;
  };
  Tokens share(int thread, int threads) const {
    return {blocks_ * thread / threads * kBlock, std::min(blocks_ * (thread + 1) / threads * kBlock, V_)};
  }

  // Returns the token of row m to all threads, -1 if its logits hold NaN or infinity, or only -infinity. Rows come one after
  // the other. sampling: null for greedy.
  int64_t choose(const float* logits, const Sampling* sampling, int64_t m, Barrier& barrier, int thread, int threads);

 private:
  struct Row;
  struct Noise;

  Best together(int64_t place, Best own, Barrier& barrier, int thread, int threads);
  bool needs_mass(const Row& row) const;
  void score(const float* logits, float best, const Row& row, int64_t begin, int64_t end, int64_t* mass);
  float threshold(const Row& row, int threads);
  template <typename Condition>
  void collect(const Condition& holds, float least);
  float descend(int64_t above, int64_t reached);
  Best race(const Noise& noise, int64_t best, int64_t begin, int64_t end);

  int64_t V_, blocks_;
  std::vector<Best> best_;  // (3, threads)
  std::unique_ptr<float[]> score_;
  std::vector<float> most_, kept_;
  std::vector<int64_t> mass_;  // (threads, bins)
  float threshold_ = 0;
};
