// Weights in bfloat16, in 12 bits per number and exactly: most exponents of a row lie in a window of 15. 128 channels
// take three vectors of 32 words of 16 bits. The lower 12 bits of the words are channels 0 to 95; the upper four bits of
// the three vectors are the bits 0 to 3, 4 to 7 and 8 to 11 of channels 96 to 127. Of 12 bits, 0 to 3 are a code, 0 for
// an exponent of 0, c for base + c; 4 is the sign, 5 to 11 the fraction. K is a multiple of 64; 64 channels that are left
// over are stored as they are.
//
// The scales of such a weight are a record per row, and behind all records the numbers whose exponents have no code.
//
// Results have the same bits as with the same weight in bfloat16.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "ops.h"

constexpr int64_t kCoded = 128;  // channels that are coded together
constexpr int64_t kCodedBytes = kCoded * 12 / 8;

struct RowRecord {
  int32_t first;         // of the row's exceptions: its distance from this record, in units of an exception's size
  uint16_t count, base;  // of exceptions; of exponents, where bfloat16 has them
};

struct Exception {
  uint16_t channel;
  BFloat16 number;
};

static_assert(sizeof(RowRecord) == 8 && sizeof(Exception) == 4);

inline bool is_lossless(const Linear& weight) { return weight.bits == 12; }

// Whether a weight's numbers are bfloat16, stored as such or in 12 bits.
inline bool is_bfloat16(const Linear& weight) { return weight.bits == 16 || is_lossless(weight); }

inline int64_t lossless_bytes(int64_t K) { return K / kCoded * kCodedBytes + K % kCoded * int64_t{sizeof(BFloat16)}; }

// Where row n of a weight lies whose numbers are bfloat16, stored as such or in 12 bits.
inline const uint8_t* stored_row(const Linear& weight, int64_t n) {
  const int64_t bytes = is_lossless(weight) ? lossless_bytes(weight.K) : weight.K * int64_t{sizeof(BFloat16)};
  return static_cast<const uint8_t*>(weight.weight) + n * bytes;
}

// Writes row n of a lossless weight to y (K,).
void unpack_row(const Linear& weight, int64_t n, BFloat16* y);

// Rows n..n+count-1 of a weight whose numbers are bfloat16, (count, K): where they lie, or in `room`.
inline const BFloat16* plain_rows(const Linear& weight, int64_t n, int64_t count, Lines<BFloat16>& room) {
  if (weight.bits == 16) return reinterpret_cast<const BFloat16*>(stored_row(weight, n));
  if (static_cast<int64_t>(room.size()) < count * weight.K) room.resize(count * weight.K);
  for (int64_t i = 0; i < count; i++) unpack_row(weight, n + i, room.data() + i * weight.K);
  return room.data();
}

// Rows of a lossless weight that are unpacked and multiplied at a time.
constexpr int64_t kUnpackedRows = 4;

// y[m, n] for rows begin..end-1 of a lossless weight; `width` is the distance between two rows m of y.
void lossless_rows(const BFloat16* x, int64_t M, const Linear& weight, BFloat16* y, int64_t begin, int64_t end,
                   int64_t width);
