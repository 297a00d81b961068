// Products of tiles with AMX, and the same in plain C++ elsewhere: the kernels of tiles.cpp run everywhere, at speed only
// where a processor has AMX.
//
// A tile has 16 rows of 64 bytes. Tile registers are named by literal numbers 0 to 7 (they are part of the instruction):
//   TILE_ZERO(c)            TILE_LOAD(t, from, bytes between rows)            TILE_STORE(t, to, bytes between rows)
//   TILE_MULTIPLY(Sum, c, a, b)
//     Sum float    c[m][n] += sum over k < 32 of a[m][k] * b[k / 2][n][k % 2]; c float32, a and b bfloat16
//     Sum int32_t  c[m][n] += sum over k < 64 of a[m][k] * b[k / 4][n][k % 4]; c int32, a int8, b uint8
// Source: Intel, "Intel 64 and IA-32 Architectures Software Developer's Manual", volume 1, chapter 18 (AMX).

#pragma once

#include <cstdint>
#include <type_traits>

#include "vec.h"

// Compilers do not know that a tile instruction reads memory: what was written before it must be there.
#define TILE_BARRIER() asm volatile("" ::: "memory")

constexpr int64_t kTileRows = 16, kTileBytes = 64;
constexpr int64_t kTileDepth = 32;  // channels that one product of tiles of bfloat16 sums over; of int8 twice as many

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__)
#define QWEN3FAST_HAS_AMX 1

#define TILE_ZERO(c) _tile_zero(c)
#define TILE_LOAD(t, from, stride) _tile_loadd(t, from, stride)
#define TILE_STORE(t, to, stride) _tile_stored(t, to, stride)
#define TILE_MULTIPLY(Sum, c, a, b)            \
  do {                                         \
    if constexpr (std::is_same_v<Sum, float>)  \
      _tile_dpbf16ps(c, a, b);                 \
    else                                       \
      _tile_dpbsud(c, a, b);                   \
  } while (false)

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
#define TILE_MULTIPLY(Sum, c, a, b) emulated[c].add_product<Sum>(emulated[a], emulated[b])

namespace {

struct EmulatedTile {
  uint8_t rows[kTileRows][kTileBytes];

  void load(const void* from, int64_t stride) {
    for (int64_t m = 0; m < kTileRows; m++) std::memcpy(rows[m], static_cast<const uint8_t*>(from) + m * stride, kTileBytes);
  }
  void store(void* to, int64_t stride) const {
    for (int64_t m = 0; m < kTileRows; m++) std::memcpy(static_cast<uint8_t*>(to) + m * stride, rows[m], kTileBytes);
  }
  template <typename Sum>
  void add_product(const EmulatedTile& a, const EmulatedTile& b) {
    for (int64_t m = 0; m < kTileRows; m++) {
      auto sum = load_as<Wide<Sum>>(rows[m]);
      for (int64_t k = 0; k < kTileRows; k++) {
        const uint32_t of_a = load_as<uint32_t>(a.rows[m] + 4 * k);
        const Bits of_b = load_as<Bits>(b.rows[k]);
        if constexpr (std::is_same_v<Sum, float>)
          sum = dot2(sum, of_b, of_a);
        else
          sum = dot4(sum, of_b, static_cast<int32_t>(of_a));
      }
      store_as_is(rows[m], sum);
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

// The tiles of one side of a product: where the first one lies, and the bytes from there to its next row, to the next tile
// along the channels, and to the second tile beside it.
struct Side {
  const void* first;
  int64_t row, next, beside;

  const uint8_t* at(int64_t step) const { return static_cast<const uint8_t*>(first) + step * next; }
};

// ahead: lines that are asked for at each step; may be null.
template <typename Sum, int kA, int kB, bool kAdds>
void multiply_tiles(Side a, Side b, int64_t steps, Sum* c, int64_t c_stride, Ahead* ahead) {
  const int64_t c_bytes = c_stride * sizeof(Sum);
  Sum* const below = c + kTileRows * c_stride;
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
  for (int64_t step = 0; step < steps; step++) {
    if (ahead) ahead->ask();
    TILE_LOAD(4, a.at(step), a.row);
    TILE_LOAD(6, b.at(step), b.row);
    if constexpr (kB == 2) TILE_LOAD(7, b.at(step) + b.beside, b.row);
    if constexpr (kA == 2) TILE_LOAD(5, a.at(step) + a.beside, a.row);
    TILE_MULTIPLY(Sum, 0, 4, 6);
    if constexpr (kB == 2) TILE_MULTIPLY(Sum, 1, 4, 7);
    if constexpr (kA == 2) TILE_MULTIPLY(Sum, 2, 5, 6);
    if constexpr (kA == 2 && kB == 2) TILE_MULTIPLY(Sum, 3, 5, 7);
  }
  TILE_STORE(0, c, c_bytes);
  if constexpr (kB == 2) TILE_STORE(1, c + kTileRows, c_bytes);
  if constexpr (kA == 2) TILE_STORE(2, below, c_bytes);
  if constexpr (kA == 2 && kB == 2) TILE_STORE(3, below + kTileRows, c_bytes);
  TILE_BARRIER();
}

// c += a b for one or two tiles of each side; with kAdds false, c = a b. steps: tiles along the channels.
template <bool kAdds, typename Sum>
void multiply_sides(bool two_a, bool two_b, Side a, Side b, int64_t steps, Sum* c, int64_t c_stride,
                    Ahead* ahead = nullptr) {
  const auto multiply = two_a ? two_b ? multiply_tiles<Sum, 2, 2, kAdds> : multiply_tiles<Sum, 2, 1, kAdds>
                              : two_b ? multiply_tiles<Sum, 1, 2, kAdds> : multiply_tiles<Sum, 1, 1, kAdds>;
  multiply(a, b, steps, c, c_stride, ahead);
}

// c += a b; with kAdds false, c = a b. a: (rows, 2 num_pairs) bfloat16; b: num_pairs lines of pairs of bfloat16, one pair per
// column; c: (rows, columns) float32. Strides are in numbers, of b in pairs. rows, num_pairs, columns: multiples of 16.
template <bool kAdds = true>
void add_by_tiles(const BFloat16* a, int64_t a_stride, const uint32_t* b, int64_t b_stride, int64_t rows,
                  int64_t num_pairs, int64_t columns, float* c, int64_t c_stride) {
  const int64_t a_row = a_stride * sizeof(BFloat16), b_row = b_stride * sizeof(uint32_t);
  for (int64_t r = 0; r < rows; r += 2 * kTileRows)
    for (int64_t n = 0; n < columns; n += 2 * kTileRows)
      multiply_sides<kAdds>(rows - r > kTileRows, columns - n > kTileRows,
                            {a + r * a_stride, a_row, kTileBytes, kTileRows * a_row},
                            {b + n, b_row, kTileRows * b_row, kTileBytes}, num_pairs / kTileRows, c + r * c_stride + n,
                            c_stride);
}

}  // namespace
