// Products of many rows (chunks of a prompt) by tiles: see tiles.h. Activations and weights are multiplied in bfloat16, or
// both in int8.
//
// A product of tiles needs one side in rows, as it lies in memory, and the other in pairs of channels (of int8, in fours)
// side by side. Both sides are put into tiles first, where they do not lie so, since rows of a tile that lie a power of two
// apart drive each other out of the cache: x once per call, the weight 32 rows, a panel, at a time, in memory of the thread
// that stays in its cache.
//   packed weights   a panel is dequantized into pairs. Levels of 8 bits, and numbers of fp8, are exact in bfloat16: scales of
//                    rows come last.
//   bfloat16         a panel's rows are unpacked (lossless.h), or copied for kCopied passes over x and more; x is put into
//                    pairs, which it is cheaper to make once, and results are transposed.
//   int8             the weight is read where it lies: four channels of 16 rows side by side are a line of a tile.
//   4 to 6 bits      the same after a panel has been quantized to int8.
// No second copy of a weight is kept. Several panels meet the same rows of x before the next ones: the results are longer
// pieces of y, and x, which for many channels is larger than the cache, is read less often.
//
// In int8, kSpan channels of x share a scale; in quantized.cpp kGroup, 32, do. By Intel's optimization manual a product of
// tiles takes 16 cycles for 64 channels of int8 as for 32 of bfloat16; the sums of a span are stored, converted and added
// up, which takes 2 x 2 tiles about 128 cycles. So spans of 32 channels take longer than bfloat16, spans of 128 as long, and
// spans of 256 at most three quarters. The error of x's levels is at most sqrt(kSpan / kGroup) = 2.8 times as large as with
// groups of 32, for normally distributed numbers about 1.3 times.

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
constexpr int64_t kTile = kTileRows * kTileBytes;

// A block of 16 rows, in tiles along its K channels; and the one behind it.
Side tiles_of(const void* blocks, int64_t block, int64_t block_bytes) {
  return {static_cast<const uint8_t*>(blocks) + block * block_bytes, kTileBytes, kTile, block_bytes};
}

// Part `part` of `parts` of some lines, to be asked for in so many steps.
Ahead part_of(Ahead lines, int64_t part, int64_t parts, int64_t steps) {
  const int64_t begin = lines.count * part / parts, end = lines.count * (part + 1) / parts;
  return {lines.next + begin * 64, (end - begin + steps - 1) / steps};
}

// Puts up to 16 rows of x into tiles; missing rows are zero. Memory is written in order.
void put_into_tiles(const BFloat16* x, int64_t rows, int64_t K, uint8_t* tiles) {
  for (int64_t k = 0; k < K; k += kTileDepth, tiles += kTile) {
    if (rows == kTileRows)
      for (int64_t m = 0; m < kTileRows; m++) store_as_is(tiles + m * kTileBytes, load_as<Bits>(x + m * K + k));
    else
      for (int64_t m = 0; m < kTileRows; m++)
        store_as_is(tiles + m * kTileBytes, m < rows ? load_as<Bits>(x + m * K + k) : Bits{});
  }
}

// x (M, K) in tiles, in each form that its weights need. Memory is kept from call to call.
struct TiledInput {
  int64_t M, K, spans;
  Lines<uint8_t> rows, pairs, levels;  // bfloat16 as it is; in pairs of neighboring channels; int8
  // Of levels, one per row and kSpan channels: value = scale * level. offset: the amount that the zero point of weights adds.
  Lines<float> scale;
  Lines<int32_t> offset;

  void make(const BFloat16* x, int64_t num_rows, int64_t channels, bool has_rows, bool has_pairs, bool has_levels,
            int64_t threads) {
    M = num_rows, K = channels, spans = (K + kSpan - 1) / kSpan;
    const int64_t blocks = (M + kTileRows - 1) / kTileRows;
    const auto grow = [](auto& numbers, int64_t size) {
      if (static_cast<int64_t>(numbers.size()) < size) numbers.clear(), numbers.resize(size);
    };
    if (has_rows) grow(rows, blocks * bfloat16_bytes());
    if (has_pairs) grow(pairs, blocks * bfloat16_bytes());
    if (has_levels) grow(levels, blocks * kTileRows * K), grow(scale, M * spans), grow(offset, M * spans);
    parallel_for(blocks, 1, threads, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; block++) {
        const int64_t m = block * kTileRows, count = std::min(M - m, kTileRows), at = block * bfloat16_bytes();
        if (has_rows) put_into_tiles(x + m * K, count, K, &rows[at]);
        if (has_pairs) put_into_pairs(x + m * K, count, K, kLanes, reinterpret_cast<uint32_t*>(&pairs[at]));
        for (int64_t i = 0; has_levels && i < count; i++) quantize_row(x + (m + i) * K, m + i);
      }
    });
  }

  int64_t bfloat16_bytes() const { return kTileRows * K * sizeof(BFloat16); }  // of a block

 private:
  void quantize_row(const BFloat16* x, int64_t m) {
    for (int64_t i = m * spans, k = 0; k < K; i++, k += kSpan) {
      const int64_t count = std::min(kSpan, K - k);
      int8_t span[kSpan];
      int32_t totals[2];
      scale[i] = quantize_group(x + k, count, span, totals);
      offset[i] = -128 * (totals[0] + totals[1]);
      uint8_t* tile = &levels[m / kTileRows * kTileRows * K + k * kTileRows + m % kTileRows * kTileBytes];
      for (int64_t c = 0; c < count; c += kTileBytes, tile += kTile) store_as_is(tile, load_as<Bits>(span + c));
    }
  }
};

// How a weight is multiplied: see above.
enum Way { kPacked, kPlain, kInt8, kInt8Again };

Way way_of(const Linear& weight, Tiles tiles) {
  if (is_bfloat16(weight)) return kPlain;
  if (tiles != kInt8Tiles || is_fp8(weight) || weight.K % kTileBytes) return kPacked;
  return weight.bits == 8 ? kInt8 : kInt8Again;
}

// The tiles of a panel. scale: of int8, one per row of the weight, for spans of x that are `span_scales` numbers apart.
struct Tiled {
  Side side;
  const float* scale = nullptr;
  int64_t span_scales = 0;
};

// One or two blocks of 16 rows of a weight, whose results are columns of y from `column` on.
struct Panel {
  const Linear* weight;
  Way way;
  int64_t block, blocks, column;

  // Of the memory that its tiles may take.
  int64_t bytes() const { return kTwo * weight->K * int64_t{sizeof(BFloat16)}; }

  // Returns its tiles, which may lie in `room`, of bytes(). unpacked: room of all panels. is_copied: whether rows are: those of
  // a tile often lie a power of two apart, and drive each other out of the cache where they are read again.
  Tiled tiles(uint8_t* room, Lines<BFloat16>& unpacked, bool is_copied) const {
    const int64_t K = weight->K, columns = blocks * kLanes, row_bytes = K * sizeof(BFloat16);
    const auto* const scales = static_cast<const float*>(weight->scale) + (has_last_scales(*weight) ? block * kLanes : 0);
    if (way == kInt8) return {tiles_of(weight->weight, block, kTileRows * K), scales, 0};
    if (way == kPlain) {
      const BFloat16* const rows = plain_rows(*weight, block * kLanes, columns, unpacked);
      if (!is_copied && weight->bits == 16) return {{rows, row_bytes, kTileBytes, kTileRows * row_bytes}};
      for (int64_t i = 0; i < blocks; i++)
        put_into_tiles(rows + i * kTileRows * K, kTileRows, K, room + i * kTileRows * row_bytes);
      return {tiles_of(room, 0, kTileRows * row_bytes)};
    }
    if (way == kInt8Again) {
      auto* const spans = reinterpret_cast<float*>(room + columns * K);
      for (int64_t i = 0; i < blocks; i++)
        quantize_again(*weight, block + i, kSpan, room + i * kTileRows * K, spans + i * kLanes, kTwo);
      return {tiles_of(room, 0, kTileRows * K), spans, kTwo};
    }
    auto* const pairs = reinterpret_cast<uint32_t*>(room);
    for (int64_t i = 0; i < blocks; i++) dequantize(*weight, block + i, pairs + i * kLanes, columns);
    const int64_t line = columns * sizeof(uint32_t);
    return {{pairs, line, kTileRows * line, kTileBytes}, scales, 0};
  }

  // Where it lies, to be asked for before `tiles` reads it.
  Ahead lines() const {
    const int64_t bytes = weight_bytes(*weight, kLanes);
    return {static_cast<const char*>(weight->weight) + block * bytes, (blocks * bytes + 63) / 64};
  }
};

constexpr int64_t kPanels = 8;  // that are multiplied by the same rows of x, to write y in longer pieces
constexpr int64_t kResultStride = kPanels * kTwo;  // numbers from one row of their results to the next
constexpr int64_t kCopied = 3;  // passes of 32 rows of x from which copying rows of bfloat16 pays
constexpr int64_t kPanelBytes = 1 << 20;  // of their tiles, which stay in a core's cache

// The functions below multiply up to 32 rows of x, from m0 on, by `count` panels. out: a row of kResultStride numbers for
// each, where each panel writes 32 columns, also if it has 16; the next panel's, which come later, replace the rest.

void multiply_packed(const Panel* panels, const Tiled* tiled, int64_t count, const TiledInput& x, int64_t m0, Ahead* ahead,
                     BFloat16* out) {
  alignas(64) float sums[kTwo * kTwo];
  for (int64_t p = 0; p < count; p++) {
    BFloat16* const to = out + panels[p].column - panels[0].column;
    const bool has_two = panels[p].blocks == 2, has_scales = has_last_scales(*panels[p].weight);
    multiply_sides<false>(x.M - m0 > kTileRows, has_two, tiles_of(x.rows.data(), m0 / kTileRows, x.bfloat16_bytes()),
                          tiled[p].side, x.K / kTileDepth, sums, kTwo, &ahead[p]);
    const Vec first = has_scales ? load(tiled[p].scale) : fill(1);
    const Vec second = has_scales && has_two ? load(tiled[p].scale + kLanes) : first;
    for (int64_t m = 0; m < std::min(x.M - m0, kTwo); m++)
      store_two_in_order(to + m * kResultStride, load(sums + m * kTwo) * first, load(sums + m * kTwo + kLanes) * second);
  }
}

// The weight's rows are those of the product here, which is transposed: two rows of it at a time are pairs of numbers.
void multiply_plain(const Panel* panels, const Tiled* tiled, int64_t count, const TiledInput& x, int64_t m0, Ahead* ahead,
                    BFloat16* out) {
  alignas(64) float sums[kTwo * kTwo];
  const bool has_two = x.M - m0 > kTileRows;
  for (int64_t p = 0; p < count; p++) {
    BFloat16* const to = out + panels[p].column - panels[0].column;
    multiply_sides<false>(panels[p].blocks == 2, has_two, tiled[p].side,
                          tiles_of(x.pairs.data(), m0 / kTileRows, x.bfloat16_bytes()), x.K / kTileDepth, sums, kTwo, &ahead[p]);
    for (int64_t first = 0; first < (has_two ? kTwo : kTileRows); first += kLanes) {
      Bits square[kLanes];
      for (int64_t i = 0; i < kLanes; i++)
        square[i] = as_bfloat16(load(sums + 2 * i * kTwo + first), load(sums + (2 * i + 1) * kTwo + first));
      transpose(square);
      for (int64_t m = 0; m < kLanes; m++) store_as_is(to + (first + m) * kResultStride, square[m]);
    }
  }
}

// A span of x meets all panels before the next one: it stays in level 1. Sums are added up while the next ones are made.
template <bool kHasSpans>  // whether each span of the weight has its own scales
void multiply_int8(const Panel* panels, const Tiled* tiled, int64_t count, const TiledInput& x, int64_t m0, Ahead* ahead,
                   BFloat16* out) {
  alignas(64) int32_t sums[2][kTwo * kTwo];
  alignas(64) float totals[kPanels][kTwo * kTwo];
  const int64_t rows = std::min(x.M - m0, kTwo);
  const Side levels = tiles_of(x.levels.data(), m0 / kTileRows, kTileRows * x.K);
  const auto add = [&](int64_t number) {
    const int64_t span = number / count, p = number % count;
    const int32_t* const from = sums[number % 2];
    float* const to = totals[p];
    const float* const scales = tiled[p].scale + span * tiled[p].span_scales;
    const Vec weight_scale[] = {load(scales), load(panels[p].blocks == 2 ? scales + kLanes : scales)};
    for (int64_t m = 0; m < rows; m++) {
      const int64_t i = (m0 + m) * x.spans + span;
      for (int64_t j = 0; j < 2; j++) {
        const int64_t n = m * kTwo + j * kLanes;
        Vec more = convert<Vec>(load_as<Ints>(from + n) + x.offset[i]) * x.scale[i];
        if (kHasSpans) more *= weight_scale[j];
        store(to + n, span ? load(to + n) + more : more);
      }
    }
  };
  for (int64_t number = 0; number < x.spans * count; number++) {
    const int64_t span = number / count, p = number % count, k = span * kSpan, steps = std::min(kSpan, x.K - k) / kTileBytes;
    const auto from = [&](Side side) { return Side{side.at(k / kTileBytes), side.row, side.next, side.beside}; };
    multiply_sides<false>(rows > kTileRows, panels[p].blocks == 2, from(levels), from(tiled[p].side), steps, sums[number % 2],
                          kTwo, &ahead[p]);
    if (number) add(number - 1);
  }
  add(x.spans * count - 1);
  for (int64_t p = 0; p < count; p++) {
    BFloat16* const to = out + panels[p].column - panels[0].column;
    const Vec first = kHasSpans ? fill(1) : load(tiled[p].scale);
    const Vec second = !kHasSpans && panels[p].blocks == 2 ? load(tiled[p].scale + kLanes) : first;
    for (int64_t m = 0; m < rows; m++)
      store_two_in_order(to + m * kResultStride, load(totals[p] + m * kTwo) * first,
                         load(totals[p] + m * kTwo + kLanes) * second);
  }
}

constexpr decltype(&multiply_packed) kMultiply[] = {multiply_packed, multiply_plain, multiply_int8<false>, multiply_int8<true>};

}  // namespace

void qwen3fast_tile_linear(const BFloat16* x, const Linear* weights, int64_t count, BFloat16* y, int64_t M, Tiles tiles,
                           int64_t threads) {
  tile_products(x, weights, count, y, M, tiles, kReplace, threads);
}

void tile_products(const BFloat16* x, const Linear* weights, int64_t count, BFloat16* y, int64_t M, Tiles tiles,
                   Purpose purpose, int64_t threads) {
  const int64_t K = weights[0].K, sides = purpose == kGate ? 2 : 1;
  std::vector<Panel> panels[2];  // of gate and up apart
  bool has[std::size(kMultiply)] = {};
  int64_t width = 0;
  for (int64_t i = 0; i < count; i++) {
    const Way way = way_of(weights[i], tiles);
    has[way] = true;
    const int64_t blocks = weights[i].N / kLanes, first = purpose == kGate ? 0 : width;
    for (int64_t block = 0; block < blocks; block += 2)
      panels[i % sides].push_back({weights + i, way, block, std::min<int64_t>(2, blocks - block), first + block * kLanes});
    width = first + weights[i].N;
  }
  for (; M > kKeptRows; M -= kKeptRows, x += kKeptRows * K, y += kKeptRows * width)
    tile_products(x, weights, count, y, kKeptRows, tiles, purpose, threads);
  if (panels[0].empty()) return;
  static thread_local TiledInput kept;
  TiledInput& input = kept;  // the same one in all threads
  input.make(x, M, K, has[kPacked], has[kPlain], has[kInt8] || has[kInt8Again], threads);
  const int64_t total = panels[0].size(), passes = (M + kTwo - 1) / kTwo, panel_bytes = panels[0][0].bytes();
  const int64_t group = std::clamp<int64_t>(std::min(kPanelBytes / (sides * panel_bytes), total / (4 * threads)), 1, kPanels);
  parallel_for((total + group - 1) / group, 1, threads, [&](int64_t begin, int64_t end) {
    const TileUse use;
    static thread_local Lines<uint8_t> room;  // fresh memory would cost a page fault per 4 KiB in each part
    static thread_local Lines<BFloat16> unpacked;
    if (static_cast<int64_t>(room.size()) < sides * group * panel_bytes) room.resize(sides * group * panel_bytes);
    alignas(64) BFloat16 results[2][kTwo * kResultStride];
    const int64_t last = std::min(end * group, total);
    for (int64_t i = begin * group; i < last; i += group) {
      const int64_t number = std::min(group, last - i);
      const Panel& first_panel = panels[0][i];
      const Panel& last_panel = panels[0][i + number - 1];
      const int64_t columns = last_panel.column + last_panel.blocks * kLanes - first_panel.column;
      Tiled tiled[2][kPanels];
      for (int64_t s = 0; s < sides; s++)
        for (int64_t j = 0; j < number; j++)
          tiled[s][j] = panels[s][i + j].tiles(&room[(s * group + j) * panel_bytes], unpacked, passes >= kCopied);
      for (int64_t pass = 0; pass < passes; pass++) {
        const int64_t m0 = pass * kTwo, rows = std::min(M - m0, kTwo);
        BFloat16* const to = y + m0 * width + first_panel.column;
        for (int64_t m = 0; m < rows; m++)
          for (int64_t n = 0; n < columns; n += kTwo) __builtin_prefetch(to + m * width + n, 1);
        for (int64_t s = 0; s < sides; s++) {
          Ahead ahead[kPanels] = {};
          for (int64_t j = 0; j < number && i + group + j < last; j++) {
            const Panel& next = panels[s][i + group + j];
            ahead[j] = part_of(next.lines(), pass, passes, K / (next.way < kInt8 ? kTileDepth : kTileBytes));
          }
          for (int64_t j = 0, same; j < number; j += same) {  // as many as are multiplied in the same way
            const Way way = panels[s][i + j].way;
            for (same = 1; j + same < number && panels[s][i + j + same].way == way;) same++;
            kMultiply[way](&panels[s][i + j], tiled[s] + j, same, input, m0, ahead + j,
                           results[s] + panels[s][i + j].column - first_panel.column);
          }
        }
        for (int64_t m = 0; m < rows; m++) {
          BFloat16* const from = results[0] + m * kResultStride;
          if (purpose == kGate) gate_values(from, results[1] + m * kResultStride, columns, from);
          for (int64_t n = 0; n < columns; n += kLanes)
            if (purpose == kAdd)
              store(to + m * width + n, load(to + m * width + n) + load(from + n));
            else
              std::memcpy(to + m * width + n, from + n, kLanes * sizeof(BFloat16));
        }
      }
    }
  }, parts_for(M));
}

void tile_rows(const uint32_t* pairs, int64_t M, const BFloat16* weight, BFloat16* y, int64_t n0, int64_t n1, int64_t N,
               int64_t K) {
  const int64_t row_bytes = K * sizeof(BFloat16), steps = K / kTileDepth;
  const Side b = tiles_of(pairs, 0, kTileRows * row_bytes);
  alignas(64) float sums[kTwo * kTwo];
  for (int64_t n = n0, rows; n < n1; n += rows) {
    rows = std::min(n1 - n, kTwo);
    const Side a{weight + n * K, row_bytes, kTileBytes, kTileRows * row_bytes};
    const auto* const next = reinterpret_cast<const char*>(weight + (n + rows) * K);
    Ahead ahead = part_of({next, std::min(n1 - n - rows, kTwo) * row_bytes / 64}, 0, 1, steps);
    multiply_sides<false>(rows == kTwo, M > kTileRows, a, b, steps, sums, kTwo, &ahead);
    for (int64_t m = 0; m < M; m += kLanes) {
      Bits square[kLanes] = {};  // two rows of the weight at a time are pairs of numbers
      for (int64_t i = 0; i < rows; i += 2)
        square[i / 2] = as_bfloat16(load(sums + i * kTwo + m), load(sums + (i + 1) * kTwo + m));
      transpose(square);
      for (int64_t i = 0; i < std::min(M - m, kLanes); i++) std::memcpy(y + (m + i) * N + n, &square[i], rows * sizeof *y);
    }
  }
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
  multiply_tiles<Sum, 2, 2, false>(side(a), side(b), 1, c[0], kTwo, nullptr);
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
