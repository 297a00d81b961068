// Products of many rows (chunks of a prompt) by tiles: see tiles.h. Activations and weights are multiplied in bfloat16, or,
// for weights in int8, both in int8.
//
// A product of tiles needs one side in rows, as it lies in memory, and the other in pairs of channels side by side:
//   packed weights   32 rows at a time are dequantized into pairs, in memory of the thread that stays in its cache (64 K
//                    bytes); x is read where it lies. Levels of 8 bits, and numbers of fp8, are exact in bfloat16: scales
//                    of rows come last.
//   bfloat16         the weight is read where it lies, or 32 rows at a time are unpacked (lossless.h); x is put into
//                    pairs once per call. The results are transposed.
//   int8             the weight is read where it lies: four channels of 16 rows side by side are a line of a tile. x is
//                    quantized once per call, and put into tiles.
// No second copy of a weight is kept.
//
// In int8, kSpan channels of x share a scale; in quantized.cpp kGroup, 32, do. By Intel's optimization manual a product of
// tiles takes 16 cycles for 64 channels of int8 as for 32 of bfloat16; the sums of a span are stored, converted and added
// up, which takes 2 x 2 tiles about 128 cycles. So spans of 32 channels take longer than bfloat16 (of 4-bit weights, too,
// whose scales change there), spans of 128 as long, and spans of 256 at most three quarters. The error of x's levels is
// at most sqrt(kSpan / kGroup) = 2.8 times as large as with groups of 32, for normally distributed numbers about 1.3 times.

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <vector>

#include "ops.h"
#include "parallel.h"
#include "products.h"
#include "tiles.h"

#if QWEN3FAST_HAS_AMX
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
#endif

namespace {

constexpr int64_t kTwo = 2 * kTileRows;  // rows of each side that are multiplied at a time: 2 x 2 tiles
constexpr int64_t kSpan = 256;           // channels of x that share a scale in int8
// Pairs of neighboring channels, one per row of what they come from: K/2 lines of 16 or 32.
typedef Lines<uint32_t> Pairs;

// Rows of x in int8: value = scale * level, one scale per row and kSpan channels. offset: the amount that the zero point of
// weights adds. levels: tiles of 16 rows and 64 channels, 16 rows after 16 rows. K: a multiple of 64.
struct Levels {
  int64_t M, K, spans = (K + kSpan - 1) / kSpan;
  std::vector<Bits> levels;  // a Bits is 64 channels of a row; missing rows are zero
  Lines<float> scale;
  Lines<int32_t> offset;

  Levels(int64_t M, int64_t K)
      : M(M), K(K), levels((M + kTileRows - 1) / kTileRows * K / 4), scale(M * spans), offset(M * spans) {}

  void quantize_row(const BFloat16* x, int64_t m) {
    for (int64_t i = m * spans, k = 0; k < K; i++, k += kSpan) {
      const int64_t count = std::min(kSpan, K - k);
      int8_t span[kSpan];
      int32_t totals[2];
      scale[i] = quantize_group(x + k, count, span, totals);
      offset[i] = -128 * (totals[0] + totals[1]);
      Bits* tile = &levels[m / kTileRows * K / 4 + k / 4 + m % kTileRows];
      for (int64_t c = 0; c < count; c += kTileBytes, tile += kTileRows) *tile = load_as<Bits>(span + c);
    }
  }
};

inline bool is_int8(const Linear& weight) { return weight.bits == 8 && !weight.span && weight.K % kTileBytes == 0; }

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

// All rows of x with a panel of packed weights. rest: the rows beyond the last 32, filled up by zeros to 32.
void packed_panel(const Panel& panel, const BFloat16* x, const BFloat16* rest, int64_t M, int64_t width, uint32_t* pairs) {
  const Linear& weight = *panel.weight;
  const int64_t columns = panel.blocks * kLanes;
  for (int64_t j = 0; j < panel.blocks; j++) dequantize(weight, panel.block + j, pairs + j * kLanes, columns);
  alignas(64) float results[kTwo * kTwo];
  for (int64_t m0 = 0; m0 < M; m0 += kTwo) {
    const int64_t rows = std::min(M - m0, kTwo), padded = rows > kTileRows ? kTwo : kTileRows;
    add_by_tiles<false>(rows == kTwo ? x + m0 * weight.K : rest, weight.K, pairs, columns, padded,
                        weight.K / 2, columns, results, kTwo);
    for (int64_t m = 0; m < rows; m++)
      for (int64_t j = 0; j < panel.blocks; j++) {
        Vec sums = load(results + m * kTwo + j * kLanes);
        if (has_last_scales(weight)) sums *= load(static_cast<const float*>(weight.scale) + (panel.block + j) * kLanes);
        store(panel.y + (m0 + m) * width + j * kLanes, sums);
      }
  }
}

// All rows of x in int8 with a panel in int8.
template <int kBlocks>
void int8_panel(const Panel& panel, const Levels& x, int64_t width) {
  const Linear& weight = *panel.weight;
  const int64_t block_bytes = kTileRows * weight.K;  // of 16 rows, of x as of the weight
  const auto side = [&](const void* first, int64_t block, int64_t k) {
    return Side{static_cast<const uint8_t*>(first) + block * block_bytes + k * kTileRows, kTileBytes,
                kTileRows * kTileBytes, block_bytes};
  };
  alignas(64) int32_t results[kTwo * kTwo];
  for (int64_t m0 = 0; m0 < x.M; m0 += kTwo) {
    const int64_t rows = std::min(x.M - m0, kTwo);
    Vec totals[kTwo][kBlocks] = {};
    for (int64_t s = 0, k = 0; s < x.spans; s++, k += kSpan) {
      multiply_sides<false>(rows > kTileRows, kBlocks == 2, side(x.levels.data(), m0 / kTileRows, k),
                            side(weight.weight, panel.block, k), std::min(kSpan, weight.K - k) / kTileBytes, results, kTwo);
      for (int64_t m = 0; m < rows; m++)
        for (int j = 0; j < kBlocks; j++) {
          const int64_t i = (m0 + m) * x.spans + s;
          const Ints sums = load_as<Ints>(results + m * kTwo + j * kLanes) + x.offset[i];
          totals[m][j] += convert<Vec>(sums) * x.scale[i];
        }
    }
    for (int64_t m = 0; m < rows; m++)
      for (int j = 0; j < kBlocks; j++)
        store(panel.y + (m0 + m) * width + j * kLanes,
              totals[m][j] * load(static_cast<const float*>(weight.scale) + (panel.block + j) * kLanes));
  }
}

// All rows of x, in pairs, with a panel of bfloat16. room: for the panel where it must be unpacked.
void plain_panel(const Panel& panel, const uint32_t* x, int64_t M, int64_t width, Lines<BFloat16>& room) {
  const int64_t K = panel.weight->K, rows = panel.blocks * kLanes;
  const BFloat16* weight = plain_rows(*panel.weight, panel.block * kLanes, rows, room);
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
          store(panel.y + (m0 + m) * width + n, as<Vec>(square[m - first]));
      }
  }
}

}  // namespace

void qwen3fast_tile_linear(const BFloat16* x, const Linear* weights, int64_t count, BFloat16* y, int64_t M, Tiles tiles,
                           int64_t threads) {
  const int64_t K = weights[0].K, whole = M / kTwo * kTwo;
  const int64_t num_plain = std::count_if(weights, weights + count, is_bfloat16);
  // Lossless weights beside quantized ones, whose x is in another order; weights in bfloat16 whose rows end within a tile.
  if ((num_plain != 0 && num_plain != count) || K % kTileDepth)
    return qwen3fast_quantized_linear(x, weights, count, y, M, threads);
  const bool is_plain = num_plain != 0;
  const auto uses_int8 = [&](const Linear& weight) { return tiles == kInt8Tiles && is_int8(weight); };
  const std::vector<Panel> panels = panels_of(weights, count, y);
  int64_t width = 0;
  for (int64_t i = 0; i < count; i++) width += weights[i].N;
  Lines<BFloat16> rest;
  Levels levels(std::any_of(weights, weights + count, uses_int8) ? M : 0, K);
  Pairs x_pairs(is_plain ? (M + kTileRows - 1) / kTileRows * kTileRows * K / 2 : 0);
  if (is_plain) {
    parallel_for((M + kTileRows - 1) / kTileRows, 2, threads, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin * kTileRows; m < std::min(M, end * kTileRows); m += kTileRows) {
        const int64_t first = m / kTwo * kTwo, columns = M - first > kTileRows ? kTwo : kTileRows;
        put_into_pairs(x + m * K, std::min(M - m, kTileRows), K, columns, &x_pairs[first * K / 2 + m - first]);
      }
    });
  } else {
    rest.assign(x + whole * K, x + M * K);
    rest.resize(kTwo * K, BFloat16(0.f));
  }
  parallel_for(levels.M, kTileRows, threads, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; m++) levels.quantize_row(x + m * K, m);
  });
  parallel_for(panels.size(), 1, threads, [&](int64_t begin, int64_t end) {
    const TileUse use;
    static thread_local Pairs pairs;  // fresh memory would cost a page fault per 4 KiB in each part
    static thread_local Lines<BFloat16> room;
    for (int64_t i = begin; i < end; i++) {
      if (is_plain) {
        plain_panel(panels[i], x_pairs.data(), M, width, room);
      } else if (uses_int8(*panels[i].weight)) {
        (panels[i].blocks == 2 ? int8_panel<2> : int8_panel<1>)(panels[i], levels, width);
      } else {
        pairs.resize(K * kLanes);
        packed_panel(panels[i], x, rest.data(), M, width, pairs.data());
      }
    }
  }, parts_for(M));
}

#if QWEN3FAST_HAS_AMX
namespace {

// Whether a product of two by two tiles is right. Allocates nothing: see below.
template <typename Sum, typename A, typename B>
bool is_product_right() {
  constexpr int64_t kDepth = kTileBytes / sizeof(A), kTogether = 4 / sizeof(B);
  alignas(64) A a[kTwo][kDepth];
  alignas(64) B b[kTwo][kDepth];
  alignas(64) Sum c[kTwo][kTwo];
  for (int64_t i = 0; i < kTwo; i++)
    for (int64_t k = 0; k < kDepth; k++) a[i][k] = A((i * 3 + k * 7) % 11 - 5), b[i][k] = B((i * 3 + k * 5) % 13 * 19);
  const auto side = [](const void* first) { return Side{first, kTileBytes, 0, kTileRows * kTileBytes}; };
  const TileUse use;
  multiply_tiles<Sum, 2, 2, false>(side(a), side(b), 1, c[0], kTwo);
  for (int64_t m = 0; m < kTwo; m++)
    for (int64_t n = 0; n < kTwo; n++) {
      float sum = 0;  // exact
      for (int64_t k = 0; k < kDepth; k++)
        sum += float(a[m][k]) * float(b[n / kTileRows * kTileRows + k / kTogether][n % kTileRows * kTogether + k % kTogether]);
      if (sum != float(c[m][n])) return false;
    }
  return true;
}

}  // namespace
#endif

bool qwen3fast_try_tiles() {
#if QWEN3FAST_HAS_AMX
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl(2): ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) return false;
  int ends[2];  // of a pipe: the child's exit status is lost where the process ignores SIGCHLD, or waits for all children
  if (pipe2(ends, O_CLOEXEC) != 0) return false;
  const pid_t child = fork();  // which alone dies where the instructions are illegal all the same
  if (child == 0) {            // other threads may have held any lock, of malloc's as well: none is taken here
    prctl(PR_SET_DUMPABLE, 0);  // no core file, which would hold the weights
    signal(SIGILL, SIG_DFL);
    const bool is_right = is_product_right<float, BFloat16, BFloat16>() && is_product_right<int32_t, int8_t, uint8_t>();
    _exit(is_right && write(ends[1], "", 1) == 1 ? 0 : 1);
  }
  close(ends[1]);
  pollfd answer{ends[0], POLLIN, 0};
  int count = 0;
  for (int i = 0; child > 0 && count <= 0 && i < 1000; i++) count = poll(&answer, 1, 10);  // 10 s, less if interrupted
  char byte;
  const bool is_right = count == 1 && read(ends[0], &byte, 1) == 1;
  close(ends[0]);
  if (child > 0) {
    if (count <= 0) kill(child, SIGKILL);
    while (waitpid(child, nullptr, 0) == -1 && errno == EINTR) continue;
  }
  return is_right;
#else
  return false;
#endif
}
