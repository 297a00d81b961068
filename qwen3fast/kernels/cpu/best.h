// The largest of a row's logits.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "vec.h"

namespace {

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

}  // namespace
