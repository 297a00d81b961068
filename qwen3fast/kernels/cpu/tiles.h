// Products of tiles of bfloat16 with AMX, and the same in plain C++ elsewhere: the kernels of tiles.cpp run everywhere, at
// speed only where a processor has AMX.
//
// A tile has 16 rows of 64 bytes. Tile registers are named by literal numbers 0 to 7 (they are part of the instruction):
//   TILE_ZERO(c)            TILE_LOAD(t, from, bytes between rows)            TILE_STORE(t, to, bytes between rows)
//   TILE_MULTIPLY(c, a, b)  c[m][n] += sum over k < 32 of a[m][k] * b[k / 2][n][k % 2]; c float32, a and b bfloat16
// Source: Intel, "Intel 64 and IA-32 Architectures Software Developer's Manual", volume 1, chapter 18 (AMX).

#pragma once

#include <cstdint>

#include "vec.h"

// Compilers do not know that a tile instruction reads memory: what was written before it must be there.
#define TILE_BARRIER() asm volatile("" ::: "memory")

constexpr int64_t kTileRows = 16, kTileBytes = 64;
constexpr int64_t kTileDepth = 32;  // channels that one product of tiles sums over

// Whether attention of prefill multiplies by tiles; set by qwen3fast_use_tiles.
extern bool tiles_are_used;

#if defined(__AMX_TILE__) && defined(__AMX_BF16__)
#define QWEN3FAST_HAS_AMX 1

#define TILE_ZERO(c) _tile_zero(c)
#define TILE_LOAD(t, from, stride) _tile_loadd(t, from, stride)
#define TILE_STORE(t, to, stride) _tile_stored(t, to, stride)
#define TILE_MULTIPLY(c, a, b) _tile_dpbf16ps(c, a, b)

namespace {

// While there is one, the thread that made it can use tiles.
class TileUse {
 public:
  TileUse() {
    alignas(64) Palette palette;
    for (int t = 0; t < 8; t++) palette.bytes[t] = kTileBytes, palette.rows[t] = kTileRows;
    TILE_BARRIER();
    _tile_loadconfig(&palette);
  }
  ~TileUse() { _tile_release(); }
  TileUse(const TileUse&) = delete;

 private:
  struct Palette {
    uint8_t number = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  };
};

}  // namespace

#else
#define QWEN3FAST_HAS_AMX 0

#define TILE_ZERO(c) (emulated[c] = EmulatedTile{})
#define TILE_LOAD(t, from, stride) emulated[t].load(from, stride)
#define TILE_STORE(t, to, stride) emulated[t].store(to, stride)
#define TILE_MULTIPLY(c, a, b) emulated[c].add_product(emulated[a], emulated[b])

namespace {

struct EmulatedTile {
  uint8_t rows[kTileRows][kTileBytes];

  void load(const void* from, int64_t stride) {
    for (int64_t m = 0; m < kTileRows; m++) std::memcpy(rows[m], static_cast<const uint8_t*>(from) + m * stride, kTileBytes);
  }
  void store(void* to, int64_t stride) const {
    for (int64_t m = 0; m < kTileRows; m++) std::memcpy(static_cast<uint8_t*>(to) + m * stride, rows[m], kTileBytes);
  }
  void add_product(const EmulatedTile& a, const EmulatedTile& b) {
    for (int64_t m = 0; m < kTileRows; m++) {
      Vec sum = load_as<Vec>(rows[m]);
      for (int64_t pair = 0; pair < kTileDepth / 2; pair++) {
        const uint32_t two = load_as<uint32_t>(a.rows[m] + 4 * pair);
        sum = dot2(sum, load_as<Bits>(b.rows[pair]), two - Bits{});
      }
      std::memcpy(rows[m], &sum, kTileBytes);
    }
  }
};

thread_local EmulatedTile emulated[8];

struct TileUse {
  TileUse() {}
};

}  // namespace
#endif

namespace {

template <int kA, int kB, bool kAdds>
void multiply_tiles(const BFloat16* a, int64_t a_stride, const uint32_t* b, int64_t b_stride, int64_t num_pairs, float* c,
                    int64_t c_stride) {
  const int64_t a_bytes = a_stride * sizeof(BFloat16), b_bytes = b_stride * sizeof(uint32_t);
  const int64_t c_bytes = c_stride * sizeof(float);
  float* const below = c + kTileRows * c_stride;
  TILE_BARRIER();
  if constexpr (kAdds) {
    TILE_LOAD(0, c, c_bytes);
    if constexpr (kB == 2) TILE_LOAD(1, c + kTileRows, c_bytes);
    if constexpr (kA == 2) TILE_LOAD(2, below, c_bytes);
    if constexpr (kA == 2 && kB == 2) TILE_LOAD(3, below + kTileRows, c_bytes);
  } else {
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
  }
  for (int64_t pair = 0; pair < num_pairs; pair += kTileDepth / 2) {
    TILE_LOAD(4, a + 2 * pair, a_bytes);
    TILE_LOAD(6, b + pair * b_stride, b_bytes);
    TILE_MULTIPLY(0, 4, 6);
    if constexpr (kB == 2) {
      TILE_LOAD(7, b + pair * b_stride + kTileRows, b_bytes);
      TILE_MULTIPLY(1, 4, 7);
    }
    if constexpr (kA == 2) {
      TILE_LOAD(5, a + kTileRows * a_stride + 2 * pair, a_bytes);
      TILE_MULTIPLY(2, 5, 6);
      if constexpr (kB == 2) TILE_MULTIPLY(3, 5, 7);
    }
  }
  TILE_STORE(0, c, c_bytes);
  if constexpr (kB == 2) TILE_STORE(1, c + kTileRows, c_bytes);
  if constexpr (kA == 2) TILE_STORE(2, below, c_bytes);
  if constexpr (kA == 2 && kB == 2) TILE_STORE(3, below + kTileRows, c_bytes);
  TILE_BARRIER();
}

// c += a b; with kAdds false, c = a b. a: (rows, 2 num_pairs) bfloat16; b: num_pairs lines of pairs of bfloat16, one pair per
// column; c: (rows, columns) float32. Strides are in numbers, of b in pairs. rows, num_pairs, columns: multiples of 16.
template <bool kAdds = true>
void add_by_tiles(const BFloat16* a, int64_t a_stride, const uint32_t* b, int64_t b_stride, int64_t rows,
                  int64_t num_pairs, int64_t columns, float* c, int64_t c_stride) {
  for (int64_t r = 0; r < rows; r += 2 * kTileRows)
    for (int64_t n = 0; n < columns; n += 2 * kTileRows) {
      const bool two_rows = rows - r > kTileRows, two_columns = columns - n > kTileRows;
      const auto multiply = two_rows ? two_columns ? multiply_tiles<2, 2, kAdds> : multiply_tiles<2, 1, kAdds>
                                     : two_columns ? multiply_tiles<1, 2, kAdds> : multiply_tiles<1, 1, kAdds>;
      multiply(a + r * a_stride, a_stride, b + n, b_stride, num_pairs, c + r * c_stride + n, c_stride);
    }
}

}  // namespace
