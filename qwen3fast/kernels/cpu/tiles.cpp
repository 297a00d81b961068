// Products of many rows (chunks of a prompt) by tiles: see tiles.h. Activations and weights are multiplied in bfloat16.
//
// A product of tiles needs one side in rows, as it lies in memory, and the other in pairs of channels side by side:
//   packed weights   32 rows at a time are dequantized into pairs, in memory of the thread that stays in its cache (64 K
//                    bytes); x is read where it lies. Levels of 8 bits, and numbers of fp8, are exact in bfloat16: scales
//                    of rows come last.
//   bfloat16         the weight is read where it lies; x is put into pairs once per call. The results are transposed.
// No second copy of a weight is kept.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "fp8.h"
#include "ops.h"
#include "parallel.h"
#include "products.h"
#include "records.h"
#include "tiles.h"

#if QWEN3FAST_HAS_AMX
#include <signal.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
#endif

namespace {

constexpr int64_t kTwo = 2 * kTileRows;  // rows of each side that are multiplied at a time: 2 x 2 tiles
// Pairs of neighboring channels, one per row of what they come from: K/2 lines of 16 or 32. A Bits is half a line, or one.
typedef std::vector<Bits> Pairs;

// One or two blocks of 16 rows of a weight, and where their columns of y begin.
struct Panel {
  const Linear* weight;
  int64_t block, blocks;
  BFloat16* y;
};

std::vector<Panel> panels_of(const Linear* weights, int64_t count, BFloat16* y) {
  std::vector<Panel> panels;
  for (int64_t i = 0; i < count; y += weights[i++].N)
    for (int64_t block = 0; block < weights[i].N / kLanes; block += 2)
      panels.push_back({weights + i, block, std::min<int64_t>(2, weights[i].N / kLanes - block), y + block * kLanes});
  return panels;
}

inline Bits pair(Vec even, Vec odd) { return as_bfloat16(even) | as_bfloat16(odd) << 16; }

// Dequantizes block `j` of a panel into pairs; in 8 bits, without the scales of rows.
void dequantize(const Panel& panel, int64_t j, Bits* pairs) {
  const Linear& weight = *panel.weight;
  const int64_t block = panel.block + j, G = weight.K / kGroup;
  const int words = weight.bits == 8 ? 8 : 4, step = weight.bits == 8 ? 8 : 4;  // in a group; bits of a level
  const auto* w = static_cast<const uint8_t*>(weight.weight) + block * G * words * kTileBytes;
  const bool is_uint4 = weight.bits == 4 && weight.span, has_blocks = is_fp8(weight) && !has_row_scales(weight);
  const auto* of_blocks = static_cast<const float*>(weight.scale) + (has_blocks ? block * ((weight.K - 1) / weight.span + 1) : 0);
  Records records;
  if (is_uint4) records.start(weight, block);
  Vec scale = fill(1), minimum = fill(128);
  for (int64_t g = 0; g < G; g++, w += words * kTileBytes) {
    if (has_blocks) scale = fill(of_blocks[g * kGroup / weight.span]);
    if (is_uint4) {
      records.read(scale, minimum);
    } else if (weight.bits == 4) {
      scale = load(static_cast<const BFloat16*>(weight.scale) + (block * G + g) * kLanes);
      minimum = 8 * scale;
    }
    const uint32_t mask = (1u << step) - 1;
    Bits* out = pairs + g * kGroup / 2 * panel.blocks + j;
    for (int i = 0; i < words; i++) {
      const Bits word = load_as<Bits>(w + i * kTileBytes);
      for (int part = 0; part < 8; part += step)
        for (int shift = part; shift < 32; shift += 16) {
          const auto number = [&](int at) {
            const Bits level = word >> at & mask;
            return is_fp8(weight) ? from_fp8(level) * scale : __builtin_convertvector((Ints)level, Vec) * scale - minimum;
          };
          *out = pair(number(shift), number(shift + 8));
          out += panel.blocks;
        }
    }
  }
}

// All rows of x with a panel of packed weights. rest: the rows beyond the last 32, filled up by zeros to 32.
void packed_panel(const Panel& panel, const BFloat16* x, const BFloat16* rest, int64_t M, int64_t width, Bits* pairs) {
  const Linear& weight = *panel.weight;
  const bool has_last_scales = weight.bits == 8 && (!weight.span || has_row_scales(weight));
  for (int64_t j = 0; j < panel.blocks; j++) dequantize(panel, j, pairs);
  alignas(64) float results[kTwo * kTwo];
  for (int64_t m0 = 0; m0 < M; m0 += kTwo) {
    const int64_t rows = std::min(M - m0, kTwo), padded = rows > kTileRows ? kTwo : kTileRows;
    add_by_tiles<false>(rows == kTwo ? x + m0 * weight.K : rest, weight.K, reinterpret_cast<uint32_t*>(pairs),
                             panel.blocks * kLanes, padded, weight.K / 2, panel.blocks * kLanes, results, kTwo);
    for (int64_t m = 0; m < rows; m++)
      for (int64_t j = 0; j < panel.blocks; j++) {
        Vec sums = load(results + m * kTwo + j * kLanes);
        if (has_last_scales) sums *= load(static_cast<const float*>(weight.scale) + (panel.block + j) * kLanes);
        store(panel.y + (m0 + m) * width + j * kLanes, sums);
      }
  }
}

// All rows of x, in pairs, with a panel of bfloat16.
void plain_panel(const Panel& panel, const uint32_t* x, int64_t M, int64_t width) {
  const int64_t K = panel.weight->K, rows = panel.blocks * kLanes;
  const auto* weight = static_cast<const BFloat16*>(panel.weight->weight) + panel.block * kLanes * K;
  alignas(64) float results[kTwo * kTwo];
  for (int64_t m0 = 0; m0 < M; m0 += kTwo) {
    const int64_t columns = M - m0 > kTileRows ? kTwo : kTileRows;
    add_by_tiles<false>(weight, K, x + m0 * K / 2, columns, rows, K / 2, columns, results, kTwo);
    for (int64_t n = 0; n < rows; n += kLanes)
      for (int64_t first = 0; first < columns; first += kLanes) {
        Bits square[kLanes];
        for (int64_t i = 0; i < kLanes; i++) square[i] = load_as<Bits>(results + (n + i) * kTwo + first);
        transpose(square);
        for (int64_t m = first; m < std::min(M - m0, first + kLanes); m++)
          store(panel.y + (m0 + m) * width + n, load_as<Vec>(square + m - first));
      }
  }
}

}  // namespace

void qwen3fast_tile_linear(const BFloat16* x, const Linear* weights, int64_t count, BFloat16* y, int64_t M,
                           int64_t threads) {
  const int64_t K = weights[0].K, whole = M / kTwo * kTwo;
  const bool is_plain = weights[0].bits == 16;
  const std::vector<Panel> panels = panels_of(weights, count, y);
  int64_t width = 0;
  for (int64_t i = 0; i < count; i++) width += weights[i].N;
  std::vector<BFloat16> rest;
  Pairs x_pairs(is_plain ? (M + kTileRows - 1) / kTileRows * K / 2 : 0);
  auto* x_start = reinterpret_cast<uint32_t*>(x_pairs.data());
  if (is_plain) {
    parallel_for((M + kTileRows - 1) / kTileRows, 2, threads, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin * kTileRows; m < std::min(M, end * kTileRows); m += kTileRows) {
        const int64_t first = m / kTwo * kTwo, columns = M - first > kTileRows ? kTwo : kTileRows;
        put_into_pairs(x + m * K, std::min(M - m, kTileRows), K, columns, x_start + first * K / 2 + m - first);
      }
    });
  } else {
    rest.assign(x + whole * K, x + M * K);
    rest.resize(kTwo * K, BFloat16(0.f));
  }
  parallel_for(panels.size(), 1, threads, [&](int64_t begin, int64_t end) {
    const TileUse use;
    Pairs pairs(is_plain ? 0 : K);
    for (int64_t i = begin; i < end; i++)
      if (is_plain)
        plain_panel(panels[i], x_start, M, width);
      else
        packed_panel(panels[i], x, rest.data(), M, width, pairs.data());
  });
}

bool tiles_are_used = false;

void qwen3fast_use_tiles(bool are_used) { tiles_are_used = are_used; }

bool qwen3fast_try_tiles() {
#if QWEN3FAST_HAS_AMX
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl(2): ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) return false;
  const pid_t child = fork();  // which alone dies where the instructions are illegal all the same
  if (child == 0) {
    signal(SIGILL, SIG_DFL);
    constexpr int64_t kRows = 20, kDepth = 64;
    std::vector<BFloat16> x(kRows * kDepth), weight(kTwo * kDepth), y(kRows * kTwo);
    for (size_t i = 0; i < x.size(); i++) x[i] = BFloat16(static_cast<float>(i * 7 % 11) - 5);
    for (size_t i = 0; i < weight.size(); i++) weight[i] = BFloat16(static_cast<float>(i * 5 % 13) - 6);
    const Linear linear{weight.data(), nullptr, kTwo, kDepth, 16, 0, 0};
    qwen3fast_tile_linear(x.data(), &linear, 1, y.data(), kRows, 1);
    for (int64_t m = 0; m < kRows; m++)
      for (int64_t n = 0; n < kTwo; n++) {
        float sum = 0;
        for (int64_t k = 0; k < kDepth; k++) sum += x[m * kDepth + k] * weight[n * kDepth + k];
        if (y[m * kTwo + n].bits != BFloat16(sum).bits) _exit(1);
      }
    _exit(0);
  }
  int status = 1;
  return child > 0 && waitpid(child, &status, 0) == child && status == 0;
#else
  return false;
#endif
}
