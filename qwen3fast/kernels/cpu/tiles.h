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

#define TILE_ZERO(c) (emulated[c] = Tile{})
#define TILE_LOAD(t, from, stride) emulated[t].load(from, stride)
#define TILE_STORE(t, to, stride) emulated[t].store(to, stride)
#define TILE_MULTIPLY(c, a, b) emulated[c].add_product(emulated[a], emulated[b])

namespace {

struct Tile {
  uint8_t rows[kTileRows][kTileBytes];

  void load(const void* from, int64_t stride) {
    for (int64_t m = 0; m < kTileRows; m++) std::memcpy(rows[m], static_cast<const uint8_t*>(from) + m * stride, kTileBytes);
  }
  void store(void* to, int64_t stride) const {
    for (int64_t m = 0; m < kTileRows; m++) std::memcpy(static_cast<uint8_t*>(to) + m * stride, rows[m], kTileBytes);
  }
  void add_product(const Tile& a, const Tile& b) {
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

thread_local Tile emulated[8];

struct TileUse {
  TileUse() {}
};

}  // namespace
#endif
