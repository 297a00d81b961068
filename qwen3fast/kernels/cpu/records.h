// The records of scales of weights of 4 and 5 bits with a minimum or a zero point, of 6 bits and of nl4; see quantized.cpp.

#pragma once

#include <cstdint>

#include "products.h"

constexpr int64_t kZeroRecord = 3 * kLanes;  // bytes of a record with zero points

constexpr int64_t kRecordsAhead = 512;  // bytes to prefetch

namespace {

// Whether the numbers of a weight's records, beside their units, have 6 bits.
inline bool is_short(const Linear& weight) { return weight.span == 256 && weight.record == 16 * kLanes; }

// Reads the records of a block of a weight with a minimum, group after group.
class Records {
 public:
  void start(const Linear& weight, int64_t block) {
    next_ = static_cast<const uint8_t*>(weight.scale) + block * (weight.K / weight.span) * weight.record;
    record_ = weight.record;
    groups_ = weight.span / kGroup;
    left_ = 0;
    is_short_ = is_short(weight);
  }

  // Sets the factor of levels, and the minimum that is taken off, of the next group.
  FORCE_INLINE void read(Vec& scale, Vec& minimum) {
    if (left_ == 0) {
      factor_ = load(reinterpret_cast<const Float16*>(next_));
      minimum_ = record_ == kZeroRecord ? factor_ * load(next_ + 2 * kLanes)
                                        : load(reinterpret_cast<const Float16*>(next_ + 2 * kLanes));
      levels_ = next_ + 4 * kLanes;
      next_ += record_;
      for (int64_t i = 0; i < record_; i += 64) __builtin_prefetch(next_ + i + kRecordsAhead);
      left_ = groups_;
    }
    left_--;
    scale = factor_;
    minimum = minimum_;
    if (record_ == kZeroRecord) return;
    if (is_short_) {
      typedef uint8_t Levels __attribute__((vector_size(kLanes)));
      const auto first = load_as<Levels>(levels_), low = load_as<Levels>(levels_ + (left_ < 4 ? 4 : 8) * kLanes);
      const Levels s = first & 63, m = (first >> 2 & 48) | (left_ < 4 ? low >> 4 : low & 15);
      scale *= load(reinterpret_cast<const uint8_t*>(&s));
      minimum *= load(reinterpret_cast<const uint8_t*>(&m));
      levels_ += kLanes;
      return;
    }
    scale *= load(levels_);
    minimum *= load(levels_ + kLanes);
    levels_ += 2 * kLanes;
  }

 private:
  const uint8_t *next_, *levels_;
  int64_t record_, groups_, left_;
  bool is_short_;
  Vec factor_, minimum_;
};

// Reads the records of a block of a weight of 6 bits, half a group after half a group, or of nl4, group after group.
class SignedScales {
 public:
  void start(const Linear& weight, int64_t block) {
    next_ = static_cast<const uint8_t*>(weight.scale) + block * (weight.K / weight.span) * weight.record;
    record_ = weight.record;
    in_record_ = weight.span / unit_of(weight.bits);
    left_ = 0;
  }

  FORCE_INLINE Vec read() {
    if (left_ == 0) {
      for (int64_t i = 0; i < record_; i += 64) __builtin_prefetch(next_ + i + kRecordsAhead);
      d_ = load(reinterpret_cast<const Float16*>(next_));
      next_ += 2 * kLanes;
      left_ = in_record_;
    }
    left_--;
    if (record_ == 2 * kLanes) return d_;
    const Vec scale = d_ * convert<Vec>(load_ints(reinterpret_cast<const int8_t*>(next_)));
    next_ += kLanes;
    return scale;
  }

 private:
  const uint8_t* next_;
  int64_t record_, in_record_, left_;
  Vec d_;
};

}  // namespace
