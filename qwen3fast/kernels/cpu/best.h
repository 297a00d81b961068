// The greedy choice of decode_layers.cpp. Source of its rules: `sample` in sampling/samplers.py.

#pragma once

#include <cmath>
#include <cstdint>

#include "vec.h"

namespace {

// The largest of some logits and its index, the first of equals. value: NaN if one of them is NaN.
struct Best {
  float value = -INFINITY;
  int64_t index = 0;

  Best() = default;

  // Of a row's logits begin..end, multiples of 16.
  Best(const BFloat16* row, int64_t begin, int64_t end) {
    Vec most = fill(value);
    Ints first = {}, is_nan = {};
    for (int64_t n = begin; n < end; n += kLanes) {
      const Vec x = load(row + n);
      const Ints is_more = x > most;
      most = is_more ? x : most;
      first = is_more ? static_cast<int32_t>(n) - Ints{} : first;
      is_nan |= x != x;
    }
    for (int64_t lane = 0; lane < kLanes; lane++) merge(most[lane], first[lane] + lane);
    if (sum(is_nan)) value = NAN;
  }

  void merge(float other, int64_t at) {
    if (other > value || other != other || (other == value && at < index)) value = other, index = at;
  }

  int64_t token() const { return std::isfinite(value) ? index : -1; }
};

}  // namespace
