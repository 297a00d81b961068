// Products of a few rows with a bfloat16 weight: streams the weight once. Sums are in float32, in the same order for any
// number of rows.

#include <algorithm>
#include <cstdint>

#include "products.h"

namespace {

// Rows of x and of the weight whose sums fit the registers. With more than one row of x, products are also bound by
// arithmetic and by reading x, which several rows of the weight share.
#ifdef __AVX512F__
constexpr int64_t kTileRows = 4, kTileWeights = 4;
#else
constexpr int64_t kTileRows = 4, kTileWeights = 1;
#endif
static_assert(kTileRows * kTileWeights <= kLanes);

// Where following rows are, which are asked for meanwhile: bytes ahead, for rows begin..end-1 of those that are multiplied.
struct Next {
  int64_t distance, begin, end;
};

// Rows n..n+kN-1 of the weight times kM rows of x. kAll: all of them are followed by rows to ask for.
template <int kM, int kN, bool kAll>
void tile(const BFloat16* x, const BFloat16* weight, BFloat16* y, int64_t n, int64_t N, int64_t K, Next next) {
  const BFloat16* w = weight + n * K;
  Vec total[kM][kN] = {};
  int64_t k = 0, ahead[kN];  // 0, which asks for nothing new, costs less than to decide in the loop
  for (int j = 0; j < kN; j++) ahead[j] = j >= next.begin && j < next.end ? next.distance : 0;
  for (; k + 2 * kLanes <= K; k += 2 * kLanes) {
    Bits ws[kN];
#pragma GCC unroll 4
    for (int j = 0; j < kN; j++) {
      __builtin_prefetch(reinterpret_cast<const char*>(w + j * K + k) + (kAll ? next.distance : ahead[j]), 0, kIntoL2);
      ws[j] = load_as<Bits>(w + j * K + k);
    }
#pragma GCC unroll 4
    for (int m = 0; m < kM; m++) {
      const Bits xs = load_as<Bits>(x + m * K + k);
#pragma GCC unroll 4
      for (int j = 0; j < kN; j++) total[m][j] = dot2(total[m][j], ws[j], xs);
    }
  }
  for (; k < K; k += kLanes)
    for (int m = 0; m < kM; m++)
      for (int j = 0; j < kN; j++) total[m][j] += load(w + j * K + k) * load(x + m * K + k);
  if (kM * kN == 1) {
    y[n] = BFloat16(sum(total[0][0]));
    return;
  }
  Vec all[kLanes] = {};
  for (int i = 0; i < kM * kN; i++) all[i] = total[i / kN][i % kN];
  const Vec sum_of = sums(all);
  for (int i = 0; i < kM * kN; i++) y[i / kN * N + n + i % kN] = BFloat16(sum_of[i]);
}

// Up to kTileRows rows of x.
template <int kN, bool kAll>
void few_rows(const BFloat16* x, int64_t M, const BFloat16* weight, BFloat16* y, int64_t n, int64_t N, int64_t K,
              Next next) {
  switch (M) {
    case 1: return tile<1, kN, kAll>(x, weight, y, n, N, K, next);
    case 2: return tile<2, kN, kAll>(x, weight, y, n, N, K, next);
    case 3: return tile<3, kN, kAll>(x, weight, y, n, N, K, next);
    case 4: return tile<4, kN, kAll>(x, weight, y, n, N, K, next);
  }
}

// All rows of x, in parts of similar size. Each part asks for its share of the following rows: memory never rests.
template <int kN>
void all_rows(const BFloat16* x, int64_t M, const BFloat16* weight, BFloat16* y, int64_t n, int64_t N, int64_t K,
              int64_t distance) {
  const int64_t parts = (M + kTileRows - 1) / kTileRows;
  if (parts == 1) return few_rows<kN, true>(x, M, weight, y, n, N, K, {distance, 0, kN});
  for (int64_t part = 0; part < parts; part++) {
    const int64_t m = M * part / parts, end = M * (part + 1) / parts;
    few_rows<kN, false>(x + m * K, end - m, weight, y + m * N, n, N, K, {distance, kN * part / parts, kN * (part + 1) / parts});
  }
}

}  // namespace

// With one row of x, the weight's rows follow one another: each thread reads memory in one stream, which some
// processors need for their full speed.
void matvec_rows(const BFloat16* x, int64_t M, const BFloat16* weight, BFloat16* y, int64_t n0, int64_t n1, int64_t N,
                 int64_t K) {
  int64_t n = n0;
  if (M > 1)
    for (; n + kTileWeights <= n1; n += kTileWeights)
      all_rows<kTileWeights>(x, M, weight, y, n, N, K, kTileWeights * K * int64_t{sizeof(BFloat16)});
  for (; n < n1; n++) all_rows<1>(x, M, weight, y, n, N, K, kAhead);
}
