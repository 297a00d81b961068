// Products of many rows (chunks of a prompt) by tiles: see tiles.h. Activations and weights are multiplied in bfloat16.
//
// A product of tiles needs one side in rows, as it lies in memory, and the other in pairs of channels side by side:
//   packed weights   32 rows at a time are dequantized into pairs, in memory of the thread that stays in its cache (64 K
//                    bytes); x is read where it lies. Levels of 8 bits are exact in bfloat16: their scales come last.
//   bfloat16         the weight is read where it lies; x is put into pairs once per call. The results are transposed.
// No second copy of a weight is kept.

#include <algorithm>
#include <cstdint>
#include <vector>

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

constexpr int64_t kResult = kTileRows * kTileRows;  // numbers in a tile of results
constexpr int64_t kTwo = 2 * kTileRows;             // rows of each side that are multiplied at a time: 2 x 2 tiles
typedef std::vector<Bits> Pairs;                    // a Bits is a row of a tile: a pair of channels of 16 rows

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

// c = a @ b.T in kA x kB tiles of results, one after the other. a: 16 kA rows of K numbers. b: for every 32 channels, kB
// tiles of pairs.
template <int kA, int kB>
void multiply(const BFloat16* a, const Bits* b, int64_t K, float* c) {
  TILE_BARRIER();
  TILE_ZERO(0);
  TILE_ZERO(1);
  TILE_ZERO(2);
  TILE_ZERO(3);
  const int64_t stride = K * sizeof(BFloat16);
  for (int64_t k = 0; k < K; k += kTileDepth, b += kB * kTileRows) {
    TILE_LOAD(4, a + k, stride);
    TILE_LOAD(6, b, kTileBytes);
    TILE_MULTIPLY(0, 4, 6);
    if constexpr (kB == 2) {
      TILE_LOAD(7, b + kTileRows, kTileBytes);
      TILE_MULTIPLY(1, 4, 7);
    }
    if constexpr (kA == 2) {
      TILE_LOAD(5, a + kTileRows * K + k, stride);
      TILE_MULTIPLY(2, 5, 6);
      if constexpr (kB == 2) TILE_MULTIPLY(3, 5, 7);
    }
  }
  TILE_STORE(0, c, kTileBytes);
  if constexpr (kB == 2) TILE_STORE(1, c + kResult, kTileBytes);
  if constexpr (kA == 2) TILE_STORE(2, c + kB * kResult, kTileBytes);
  if constexpr (kA == 2 && kB == 2) TILE_STORE(3, c + 3 * kResult, kTileBytes);
  TILE_BARRIER();
}

void multiply(const BFloat16* a, int64_t a_tiles, const Bits* b, int64_t b_tiles, int64_t K, float* c) {
  if (a_tiles == 2)
    (b_tiles == 2 ? multiply<2, 2> : multiply<2, 1>)(a, b, K, c);
  else
    (b_tiles == 2 ? multiply<1, 2> : multiply<1, 1>)(a, b, K, c);
}

inline Bits pair(Vec even, Vec odd) { return as_bfloat16(even) | as_bfloat16(odd) << 16; }

// Dequantizes block `j` of a panel into its tiles of pairs; those of 8 bits without their scales.
void dequantize(const Panel& panel, int64_t j, Bits* pairs) {
  const Linear& weight = *panel.weight;
  const int64_t block = panel.block + j, G = weight.K / kGroup;
  const int words = weight.bits == 8 ? 8 : 4, step = weight.bits == 8 ? 8 : 4;  // in a group; bits of a level
  const auto* w = static_cast<const uint8_t*>(weight.weight) + block * G * words * kTileBytes;
  Records records;
  if (weight.span) records.start(weight, block);
  Vec scale = fill(1), minimum = fill(128);
  for (int64_t g = 0; g < G; g++, w += words * kTileBytes) {
    if (weight.span) {
      records.read(scale, minimum);
    } else if (weight.bits == 4) {
      scale = load(static_cast<const BFloat16*>(weight.scale) + (block * G + g) * kLanes);
      minimum = 8 * scale;
    }
    const uint32_t mask = (1u << step) - 1;
    Bits* out = pairs + (g * panel.blocks + j) * kTileRows;
    for (int i = 0; i < words; i++) {
      const Bits word = load_as<Bits>(w + i * kTileBytes);
      for (int part = 0; part < 8; part += step)
        for (int shift = part; shift < 32; shift += 16) {
          const auto number = [&](int at) { return __builtin_convertvector((Ints)(word >> at & mask), Vec) * scale - minimum; };
          *out++ = pair(number(shift), number(shift + 8));
        }
    }
  }
}

// All rows of x with a panel of packed weights. rest: the rows beyond the last 32, filled up by zeros to 32.
void packed_panel(const Panel& panel, const BFloat16* x, const BFloat16* rest, int64_t M, int64_t width, Bits* pairs) {
  const Linear& weight = *panel.weight;
  for (int64_t j = 0; j < panel.blocks; j++) dequantize(panel, j, pairs);
  alignas(64) float results[4 * kResult];
  for (int64_t m0 = 0; m0 < M; m0 += kTwo) {
    const int64_t rows = std::min(M - m0, kTwo);
    multiply(rows == kTwo ? x + m0 * weight.K : rest, rows > kTileRows ? 2 : 1, pairs, panel.blocks, weight.K, results);
    for (int64_t m = 0; m < rows; m++)
      for (int64_t j = 0; j < panel.blocks; j++) {
        Vec sums = load(results + (m / kTileRows * panel.blocks + j) * kResult + m % kTileRows * kLanes);
        if (weight.bits == 8) sums *= load(static_cast<const float*>(weight.scale) + (panel.block + j) * kLanes);
        store(panel.y + (m0 + m) * width + j * kLanes, sums);
      }
  }
}

// Puts rows m0.. of x, up to 32, into pairs for `tiles` tiles side by side.
void put_into_pairs(const BFloat16* x, int64_t m0, int64_t M, int64_t K, int64_t tiles, Bits* pairs) {
  for (int64_t m = m0; m < std::min(M, m0 + kTwo); m++) {
    const int64_t tile = (m - m0) / kTileRows, lane = (m - m0) % kTileRows;
    for (int64_t k = 0; k < K; k += 2)
      pairs[(k / kTileDepth * tiles + tile) * kTileRows + k % kTileDepth / 2][lane] = load_as<uint32_t>(x + m * K + k);
  }
}

// All rows of x, in pairs, with a panel of bfloat16.
void plain_panel(const Panel& panel, const Bits* x, int64_t M, int64_t width) {
  const int64_t K = panel.weight->K;
  const auto* weight = static_cast<const BFloat16*>(panel.weight->weight) + panel.block * kLanes * K;
  alignas(64) float results[4 * kResult];
  for (int64_t m0 = 0; m0 < M; m0 += kTwo) {
    const int64_t tiles = M - m0 > kTileRows ? 2 : 1;
    multiply(weight, panel.blocks, x + m0 * K / kTileDepth, tiles, K, results);
    for (int64_t j = 0; j < panel.blocks; j++)
      for (int64_t tile = 0; tile < tiles; tile++) {
        Bits columns[kLanes];
        for (int i = 0; i < kLanes; i++) columns[i] = load_as<Bits>(results + (j * tiles + tile) * kResult + i * kLanes);
        transpose(columns);
        const int64_t first = m0 + tile * kTileRows, rows = std::min(M - first, kTileRows);
        for (int64_t m = 0; m < rows; m++) store(panel.y + (first + m) * width + j * kLanes, load_as<Vec>(&columns[m]));
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
  Pairs x_pairs;
  if (is_plain) {
    x_pairs.resize((M + kTileRows - 1) / kTileRows * K / 2);
    parallel_for((M + kTwo - 1) / kTwo, 1, threads, [&](int64_t begin, int64_t end) {
      for (int64_t m0 = begin * kTwo; m0 < end * kTwo; m0 += kTwo)
        put_into_pairs(x, m0, M, K, M - m0 > kTileRows ? 2 : 1, x_pairs.data() + m0 * K / kTileDepth);
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
        plain_panel(panels[i], x_pairs.data(), M, width);
      else
        packed_panel(panels[i], x, rest.data(), M, width, pairs.data());
  });
}

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
