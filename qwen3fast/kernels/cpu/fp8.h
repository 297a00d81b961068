// Bytes of float8_e4m3fn as numbers: a sign, four bits of exponent, three of fraction; no infinity; NaN has all seven set.

#pragma once

#include "vec.h"

namespace {

// Sixteen bytes, each in the lowest bits of a lane. A float32 with the same exponent and fraction is 2^120 times as small.
FORCE_INLINE Vec from_fp8(Bits byte) {
  const Bits size = byte & 0x7fu, bits = (byte & 0x80u) << 24 | size << 20;
  return select(size == 0x7fu, fill(__builtin_nanf("")), as<Vec>(bits) * 0x1p120f);
}

}  // namespace
