// Products of a few rows with a bfloat16 weight, which is read from memory once. Sums are in float32, in the same order for
// any number of rows.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <iterator>

#include "products.h"

namespace {

// Rows of x and of the weight whose sums fit the registers. With kFewRows of x at most, whose numbers stay in level 1,
// products are bound by memory even with one row of the weight at a time. Otherwise they are also bound by arithmetic and
// by reading x, which several rows of the weight share.
constexpr int64_t kTileRows = 4, kFewNumbers = 1 << 14;
#ifdef __AVX512F__
constexpr int64_t kTileWeights = 4, kFewRows = 6;
#else
constexpr int64_t kTileWeights = 1, kFewRows = 1;
#endif
static_assert(kTileRows * kTileWeights <= kLanes);

constexpr int64_t kManyTiles = 3;     // of rows of x, from which larger blocks of the weight are faster
constexpr int64_t kBlock = 8;         // rows of a larger block; the others have half as many
constexpr int64_t kPart = 1024;       // channels of a block that stay in level 1 beside those of a tile's rows
constexpr int64_t kWorthACopy = 128;  // rows of the weight, from which rows of x are copied into parts
constexpr int64_t kSummed = 8;        // tiles whose sums are kept from part to part

// Sums of kM rows of x with kN rows of the weight.
template <int kM, int kN>
using Totals = Vec[kM][kN];

// Adds the products of 32 channels. Rows of x are `stride` apart, of the weight K.
template <int kM, int kN>
FORCE_INLINE void add_products(const BFloat16* x, int64_t stride, const BFloat16* w, int64_t K, Totals<kM, kN>& total) {
  Bits ws[kN];
#pragma GCC unroll 4
  for (int j = 0; j < kN; j++) {
    ws[j] = load_as<Bits>(w + j * K);
#ifdef __AVX512F__
    asm("" : "+v"(ws[j].part[0]));  // or GCC reads it again for each row of x, if there are three
#endif
  }
#pragma GCC unroll 6
  for (int m = 0; m < kM; m++) {
    const Bits xs = load_as<Bits>(x + m * stride);
#pragma GCC unroll 4
    for (int j = 0; j < kN; j++) total[m][j] = dot2(total[m][j], ws[j], xs);
  }
}

// The same of 16 channels.
template <int kM, int kN>
FORCE_INLINE void add_last_products(const BFloat16* x, int64_t stride, const BFloat16* w, int64_t K,
                                    Totals<kM, kN>& total) {
  for (int m = 0; m < kM; m++)
    for (int j = 0; j < kN; j++) total[m][j] += load(w + j * K) * load(x + m * stride);
}

// Writes sums: y (kM, kN), rows N apart.
template <int kM, int kN>
FORCE_INLINE void write(const Totals<kM, kN>& total, BFloat16* y, int64_t N) {
  BFloat16 numbers[kLanes];
  if (kM * kN == 1) {
    store(numbers, fill(sum(total[0][0])));
  } else {
    Vec all[kLanes] = {};
    for (int i = 0; i < kM * kN; i++) all[i] = total[i / kN][i % kN];
    store(numbers, sums(all));
  }
  for (int m = 0; m < kM; m++) std::memcpy(y + m * N, numbers + m * kN, kN * sizeof *y);
}

// Some channels of kM rows of x with kTileWeights rows of the weight. Sums begin with zero or go on from `sums`, and are
// kept there if y is null. Lines are asked for per 64 channels.
template <int kM>
__attribute__((noinline)) void run_tile(const BFloat16* x, int64_t stride, const BFloat16* w, int64_t K, int64_t channels,
                                        bool goes_on, Vec* sums, BFloat16* y, int64_t N, Ahead ahead) {
  Totals<kM, kTileWeights> total = {};
  if (goes_on)
#pragma GCC unroll 16
    for (int i = 0; i < kM * kTileWeights; i++) total[i / kTileWeights][i % kTileWeights] = sums[i];
  int64_t k = 0;
  for (; k + 4 * kLanes <= channels; k += 4 * kLanes) {
    ahead.ask<kIntoL1>();
    add_products<kM, kTileWeights>(x + k, stride, w + k, K, total);
    add_products<kM, kTileWeights>(x + k + 2 * kLanes, stride, w + k + 2 * kLanes, K, total);
  }
  for (; k + 2 * kLanes <= channels; k += 2 * kLanes) add_products<kM, kTileWeights>(x + k, stride, w + k, K, total);
  if (k < channels) add_last_products<kM, kTileWeights>(x + k, stride, w + k, K, total);
  if (y) return write<kM, kTileWeights>(total, y, N);
#pragma GCC unroll 16
  for (int i = 0; i < kM * kTileWeights; i++) sums[i] = total[i / kTileWeights][i % kTileWeights];
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

// A block of the weight's rows with M rows of x, which are read from level 2 once per block. With AVX-512, a part of the
// channels comes after the other, each with up to 32 rows of x. Meanwhile, the block that follows is asked for line by line,
// and memory never rests: into level 1, whose latency arithmetic hides.
void run_block(const Rows& x, int64_t M, const BFloat16* w, int64_t weights, bool is_last_block, BFloat16* y, int64_t N,
               int64_t K) {
  constexpr decltype(&run_tile<1>) kForms[] = {run_tile<1>, run_tile<2>, run_tile<3>, run_tile<4>};
  Vec sums[kSummed * kTileRows * kBlock];
  const int64_t tiles = (M + kTileRows - 1) / kTileRows, most = tiles > 1 && kTileWeights > 1 ? kPart : K;
  const int64_t lines = (2 * kTileWeights - 1) / tiles + 1;  // to ask for per 64 channels
  const char* next = reinterpret_cast<const char*>(w + weights * K);
  const char* const end = next + (is_last_block ? 0 : weights * K * sizeof *w);
  for (int64_t first = 0; first < tiles; first += kSummed)
    for (int64_t k = 0; k < K; k += most) {
      const int64_t channels = std::min(most, K - k), asked = channels / (4 * kLanes) * lines * 64;
      const bool is_last = k + channels == K;
      for (int64_t tile = first; tile < std::min(tiles, first + kSummed); tile++) {
        const int64_t m = M * tile / tiles, rows = M * (tile + 1) / tiles - m;
        Vec* const kept = sums + (tile - first) * kTileRows * weights;
        for (int64_t n = 0; n < weights; n += kTileWeights, next += asked)
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
  const bool is_few = M <= kSummed * kTileRows, is_many = n1 - n0 >= kWorthACopy;
  const bool has_parts = M > kTileRows && is_few && is_many && kTileWeights > 1 && K > kPart;
  const Rows rows = has_parts ? in_parts(x, M, K) : Rows{x, K, kPart};
  const auto run_blocks = [&](int64_t weights) {
    for (; n + weights <= n1; n += weights)
      run_block(rows, M, weight + n * K, weights, n + 2 * weights > n1, y + n, N, K);
  };
  if (M > (kManyTiles - 1) * kTileRows) run_blocks(kBlock);
  const bool is_one_block = n1 - n0 == kBlock / 2;  // as lossless.cpp unpacks it: in the cache
  const bool is_stream = M == 1 || (M <= kFewRows && M * K <= kFewNumbers && !is_one_block);
  if (!is_stream) run_blocks(kBlock / 2);
  constexpr decltype(&multiply_rows<1>) kForms[] = {multiply_rows<1>, multiply_rows<2>, multiply_rows<3>,
                                                    multiply_rows<4>, multiply_rows<5>, multiply_rows<6>};
  constexpr int64_t kMost = std::size(kForms);
  for (int64_t m = 0; n < n1 && m < M; m += kMost)
    kForms[std::min(M - m, kMost) - 1](x + m * K, weight, y + m * N, n, n1, N, K);
}
