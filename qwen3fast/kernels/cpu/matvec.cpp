// Products of a few rows with a bfloat16 weight, which is read from memory once. Sums are in float32, in the same order for
// any number of rows.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <iterator>

#include "products.h"

namespace {

// With few rows of x, whose numbers stay in level 1 (of 48 KB, as in Zen 5), products are bound by memory even with one row of
// the weight at a time. Otherwise they are also bound by arithmetic and by reading x, which several rows of the weight share:
// sooner with 5 rows and more.
constexpr int64_t kFewRows = kRegister == 64 ? 6 : 1;
constexpr bool is_few(int64_t M, int64_t K) { return M == 1 || (M <= kFewRows && M * K <= (M > 4 ? 10 << 10 : 20 << 10)); }

// Rows of x and of the weight whose sums fit the registers: a tile.
constexpr int64_t kTileRows = kRegister == 64 ? 8 : 4;
constexpr int tile_weights(int64_t rows) { return kRegister < 64 ? 1 : rows > 4 ? 2 : 4; }
constexpr int64_t kStep = tile_weights(1);  // a multiple of the others

// The most rows of x in a tile, and rows of the weight in a block, which all tiles pass in turn.
struct Shape {
  int64_t rows, weights;
};
constexpr int64_t kMostWeights = kRegister == 64 ? 64 : 8;
constexpr Shape shape_for(int64_t M) {
  if (kRegister == 64 && M > 24) return {4, 8};
  return {kTileRows, M > 8 ? kMostWeights : kMostWeights / 2};
}

// With AVX-512, a block's channels are taken part by part: those of a tile's rows stay in level 1.
constexpr int64_t kPart = 1024;
constexpr bool has_parts(int64_t M) { return kRegister == 64 && M > 4; }
constexpr int64_t kWorthACopy = 128;  // rows of the weight, from which rows of x are copied into parts
constexpr int64_t kSummedRows = 32;   // rows of x whose sums are kept from part to part

// Sums of kM rows of x with kN rows of the weight.
template <int kM, int kN>
using Totals = Vec[kM][kN];

// Adds the products of 32 channels. Rows of x are `stride` apart, of the weight K.
template <int kM, int kN>
FORCE_INLINE void add_products(const BFloat16* x, int64_t stride, const BFloat16* w, int64_t K, Totals<kM, kN>& total) {
  Bits ws[kN];
  unrolled<kN>([&](auto j) INLINE_BODY {
    ws[j] = load_as<Bits>(w + j * K);
#ifdef __AVX512F__
    asm("" : "+v"(ws[j].part[0]));  // or GCC reads it again for each row of x, if there are three
#endif
  });
  unrolled<kM>([&](auto m) INLINE_BODY {
    const Bits xs = load_as<Bits>(x + m * stride);
    unrolled<kN>([&](auto j) INLINE_BODY { total[m][j] = dot2(total[m][j], ws[j], xs); });
  });
}

// The same of 16 channels.
template <int kM, int kN>
FORCE_INLINE void add_last_products(const BFloat16* x, int64_t stride, const BFloat16* w, int64_t K,
                                    Totals<kM, kN>& total) {
  unrolled<kM * kN>([&](auto i) INLINE_BODY {
    total[i / kN][i % kN] += load(w + i % kN * K) * load(x + i / kN * stride);
  });
}

// Writes sums: y (kM, kN), rows N apart.
template <int kM, int kN>
FORCE_INLINE void write(const Totals<kM, kN>& total, BFloat16* y, int64_t N) {
  BFloat16 numbers[kLanes];
  if constexpr (kM * kN == 1) {
    store(numbers, fill(sum(total[0][0])));
  } else {
    Vec all[kLanes];
    unrolled<kLanes>([&](auto i) INLINE_BODY { all[i] = i < kM * kN ? total[i / kN % kM][i % kN] : Vec{}; });
    store(numbers, sums(all));
  }
  for (int m = 0; m < kM; m++) std::memcpy(y + m * N, numbers + m * kN, kN * sizeof *y);
}

// Some channels of kM rows of x with a tile's rows of the weight. Sums begin with zero or go on from `sums`, and are kept
// there if y is null. Lines are asked for per 64 channels.
template <int kM>
__attribute__((noinline)) void run_tile(const BFloat16* x, int64_t stride, const BFloat16* w, int64_t K, int64_t channels,
                                        bool goes_on, Vec* sums, BFloat16* y, int64_t N, Ahead ahead) {
  constexpr int kN = tile_weights(kM);
  static_assert(kM * kN <= kLanes);
  Totals<kM, kN> total;
  if (goes_on)
    unrolled<kM * kN>([&](auto i) INLINE_BODY { total[i / kN][i % kN] = sums[i]; });
  else
    unrolled<kM * kN>([&](auto i) INLINE_BODY { total[i / kN][i % kN] = Vec{}; });
  int64_t k = 0;
  for (; k + 4 * kLanes <= channels; k += 4 * kLanes) {
    ahead.ask<kIntoL1>();
    add_products<kM, kN>(x + k, stride, w + k, K, total);
    add_products<kM, kN>(x + k + 2 * kLanes, stride, w + k + 2 * kLanes, K, total);
  }
  for (; k + 2 * kLanes <= channels; k += 2 * kLanes) add_products<kM, kN>(x + k, stride, w + k, K, total);
  if (k < channels) add_last_products<kM, kN>(x + k, stride, w + k, K, total);
  if (y) return write<kM, kN>(total, y, N);
  unrolled<kM * kN>([&](auto i) INLINE_BODY { sums[i] = total[i / kN][i % kN]; });
}

// Rows of x, how far apart they are, and their parts of kPart channels.
struct Rows {
  const BFloat16* first;
  int64_t stride, part;
};

// Copies rows into parts that lie together, with a line between two rows: rows that are a multiple of 4096 bytes apart
// would push each other out of level 1. Kept until the next call.
Rows in_parts(const BFloat16* x, int64_t M, int64_t K) {
  static thread_local Lines<BFloat16> room;
  constexpr int64_t kStride = kPart + 2 * kLanes;
  room.resize(std::max<size_t>(room.size(), (K + kPart - 1) / kPart * M * kStride));
  for (int64_t k = 0; k < K; k += kPart)
    for (int64_t m = 0; m < M; m++)
      std::memcpy(&room[(k / kPart * M + m) * kStride], x + m * K + k, std::min(kPart, K - k) * sizeof *x);
  return {room.data(), kStride, M * kStride};
}

// A block of the weight's rows with M rows of x, in tiles. Meanwhile, the `following` rows are asked for line by line, and
// memory never rests: into level 1, whose latency arithmetic hides.
void run_block(const Rows& x, int64_t M, const BFloat16* w, int64_t weights, int64_t following, BFloat16* y, int64_t N,
               int64_t K) {
  constexpr decltype(&run_tile<1>) kForms[] = {run_tile<1>, run_tile<2>, run_tile<3>, run_tile<4>,
#ifdef __AVX512F__
                                               run_tile<5>, run_tile<6>, run_tile<7>, run_tile<8>
#endif
  };
  static_assert(std::size(kForms) == kTileRows);
  static thread_local Lines<Vec> sums(kSummedRows * kMostWeights);
  const int64_t most = shape_for(M).rows, tiles = (M + most - 1) / most, summed = kSummedRows / most;
  const int64_t part = has_parts(M) ? kPart : K;
  const int64_t lines = (2 * tile_weights((M + tiles - 1) / tiles) - 1) / tiles + 1;  // to ask for per 64 channels
  const char* next = reinterpret_cast<const char*>(w + weights * K);
  const char* const end = next + following * K * int64_t{sizeof *w};
  for (int64_t first = 0; first < tiles; first += summed)
    for (int64_t k = 0; k < K; k += part) {
      const int64_t channels = std::min(part, K - k), asked = channels / (4 * kLanes) * lines * 64;
      const bool is_last = k + channels == K;
      for (int64_t tile = first; tile < std::min(tiles, first + summed); tile++) {
        const int64_t m = M * tile / tiles, rows = M * (tile + 1) / tiles - m;
        Vec* const kept = sums.data() + (tile - first) * most * weights;
        for (int64_t n = 0; n < weights; n += tile_weights(rows), next += asked)
          kForms[rows - 1](x.first + k / kPart * x.part + m * x.stride, x.stride, w + n * K + k, K, channels, k > 0,
                           kept + n * rows, is_last ? y + m * N + n : nullptr, N, {next, next < end ? lines : 0});
      }
    }
}

// Rows n..end of the weight, one after the other, with kM rows of x.
template <int kM>
void multiply_rows(const BFloat16* x, const BFloat16* weight, BFloat16* y, int64_t n, int64_t end, int64_t N, int64_t K) {
  for (; n < end; n++) {
    const BFloat16* const w = weight + n * K;
    Totals<kM, 1> total = {};
    int64_t k = 0;
    for (; k + 2 * kLanes <= K; k += 2 * kLanes) {
      __builtin_prefetch(reinterpret_cast<const char*>(w + k) + kAhead, 0, kM > 2 ? kIntoL1 : kIntoL2);
      add_products<kM, 1>(x + k, K, w + k, K, total);
    }
    if (k < K) add_last_products<kM, 1>(x + k, K, w + k, K, total);
    write<kM, 1>(total, y + n, N);
  }
}

}  // namespace

// With few rows of x, the weight's rows follow one another: each thread reads memory in one stream, which some processors
// need for their full speed.
void matvec_rows(const BFloat16* x, int64_t M, const BFloat16* weight, BFloat16* y, int64_t n0, int64_t n1, int64_t N,
                 int64_t K) {
  int64_t n = n0;
  if (!is_few(M, K) || (M > 1 && n1 - n0 == kUnpackedRows)) {  // lossless.cpp's lie in the cache
    const bool is_copied = has_parts(M) && M <= kSummedRows && K > kPart && n1 - n0 >= kWorthACopy;
    const Rows rows = is_copied ? in_parts(x, M, K) : Rows{x, K, kPart};
    const auto block = [&](int64_t begin) { return std::min(shape_for(M).weights, n1 - begin) / kStep * kStep; };
    for (int64_t weights; (weights = block(n)) > 0; n += weights)
      run_block(rows, M, weight + n * K, weights, block(n + weights), y + n, N, K);
  }
  constexpr decltype(&multiply_rows<1>) kForms[] = {multiply_rows<1>, multiply_rows<2>, multiply_rows<3>,
                                                    multiply_rows<4>, multiply_rows<5>, multiply_rows<6>};
  constexpr int64_t kMost = std::size(kForms);
  for (int64_t m = 0; n < n1 && m < M; m += kMost)
    kForms[std::min(M - m, kMost) - 1](x + m * K, weight, y + m * N, n, n1, N, K);
}
