// Attention of one query per slot over the used part of a KV cache, which is read once, at the speed of memory: keys and
// values of the next block are asked for while a block is computed.
//
// Sums are in float32; over an int8 cache, products of a query and a key are summed in integers, exactly: the query has 16
// bits there. Softmax runs online, block by block. The plain PyTorch form is in kernels/attention.py.

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "attend.h"
#include "ops.h"
#include "parallel.h"
#include "products.h"
#include "vec.h"

namespace {

// Positions between two updates of the running maximum, and as many are asked for ahead.
constexpr int64_t kBlock = 32;
// Query heads that share the loads of a key, and of a value. kSums: vectors of sums that fit the registers.
#ifdef __AVX512F__
constexpr int kHeadsOfKeys = 4, kHeadsOfValues = 2, kSums = 16;
#else
constexpr int kHeadsOfKeys = 2, kHeadsOfValues = 2, kSums = 4;
#endif

// Channels of a head in all published Qwen3 models. Sizes D below are this constant, for which loops are unrolled, or int64_t.
using UsualSize = std::integral_constant<int64_t, 128>;

// Positions that a thread must be spared for two more barriers. In bfloat16, their keys and values are 128 KiB.
constexpr int64_t kBarriers = 256;

// How many parts a head's positions have. Merging takes time: at 4,000 positions, attention with 15 parts took 5% longer than
// with one (47a1065). With the square root, parts become longer and more.
int64_t parts_of(int64_t length) { return std::max<int64_t>(1, std::lround(std::sqrt(static_cast<double>(length) / 256))); }

// Numbers that keys of type T are multiplied with.
template <typename T>
using Query = std::conditional_t<std::is_same_v<T, int8_t>, int16_t, BFloat16>;

// Sixteen pairs of neighboring channels.
FORCE_INLINE Bits pairs_of(const BFloat16* p) { return load_as<Bits>(p); }
FORCE_INLINE Bits pairs_of(const int16_t* p) { return load_as<Bits>(p); }
FORCE_INLINE Bits pairs_of(const int8_t* p) {
#if defined(__AVX2__)
  struct Two {
    int8_t numbers[2];
  };
  return load_parts<Bits>(reinterpret_cast<const Two*>(p), [](const Two* p) {
#ifdef __AVX512BW__
    return _mm512_cvtepi8_epi16(load_as<__m256i>(p));
#else
    return _mm256_cvtepi8_epi16(load_as<__m128i>(p));
#endif
  });
#else
  int16_t numbers[2 * kLanes];
  for (int64_t i = 0; i < 2 * kLanes; i++) numbers[i] = p[i];
  return load_as<Bits>(numbers);
#endif
}

// Asks memory for a line of numbers.
template <typename T>
constexpr int64_t kLine = 64 / sizeof(T);

// Returns whether this is a processor of AMD's family 25. On its Zen 4, prefetching into level 2 takes 0.63 to 0.85 of the
// time of level 1; on Zen 5, family 26, level 1 was faster (c7c3efb1).
bool is_family_25() {
#if defined(__x86_64__)
  unsigned a = 0, vendor = 0, c = 0, d = 0, family = 0, unused = 0;
  return __get_cpuid(0, &a, &vendor, &c, &d) && vendor == signature_AMD_ebx && __get_cpuid(1, &family, &unused, &c, &d) &&
         (family >> 8 & 15) + (family >> 20 & 255) == 25;
#else
  return false;
#endif
}

const bool kReadsThroughLevel2 = is_family_25();

inline void prefetch(const void* p) {
  if (kReadsThroughLevel2)
    __builtin_prefetch(p, 0, kIntoL2);
  else
    __builtin_prefetch(p, 0, kIntoL1);
}

// score[h][t] = the product of query h with key t, for kHeads queries and `count` keys, padded to sixteen by the last one.
// Keys are read in the order of memory: with several at a time, one core reads at two thirds of the speed. `ahead`: the
// distance of the keys that are asked for meanwhile, in numbers.
template <int kHeads, typename T, typename Size>
void multiply_keys(const Query<T>* q, const T* k, Size D, int64_t count, int64_t ahead, float* score) {
  using Sum = std::conditional_t<std::is_same_v<T, int8_t>, Ints, Vec>;
  for (int64_t start = 0; start < count; start += kLanes) {
    Vec dots[kHeads][kLanes];
    for (int64_t i = 0; i < kLanes; i++) {
      const T* key = k + std::min(start + i, count - 1) * D;
      Sum total[kHeads] = {};
#pragma GCC unroll 4
      for (int64_t d = 0; d < D; d += 2 * kLanes) {
        if (d % kLine<T> == 0) prefetch(key + d + ahead);
        const Bits pairs = pairs_of(key + d);
#pragma GCC unroll 4
        for (int h = 0; h < kHeads; h++) total[h] = dot2(total[h], pairs, pairs_of(q + h * D + d));
      }
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; h++) dots[h][i] = convert<Vec>(total[h]);
    }
    for (int h = 0; h < kHeads; h++) store(score + h * kBlock + start, sums(dots[h]));
  }
}

// out[h] += sum_t weight[h][t] v[t] over kVectors * 16 channels of kHeads query heads: all sums stay in registers. `ahead`:
// as above.
template <int kHeads, int kVectors, typename T, typename Size>
void add_values(const float* weight, const T* v, Size D, int64_t count, int64_t ahead, float* out) {
  Vec total[kHeads][kVectors];
  for (int h = 0; h < kHeads; h++)
    for (int c = 0; c < kVectors; c++) total[h][c] = load(out + h * D + c * kLanes);
  for (int64_t t = 0; t < count; t++) {
    Vec weights[kHeads];
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; h++) weights[h] = fill(weight[h * kBlock + t]);
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; c += 2) {
      if (c * kLanes % kLine<T> == 0) prefetch(v + t * D + c * kLanes + ahead);
      Vec value[2];
      load_two(v + t * D + c * kLanes, value);
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; h++) {
        total[h][c] += weights[h] * value[0];
        total[h][c + 1] += weights[h] * value[1];
      }
    }
  }
  for (int h = 0; h < kHeads; h++)
    for (int c = 0; c < kVectors; c++) store(out + h * D + c * kLanes, total[h][c]);
}

// One block for kHeads heads.
template <int kHeads, typename T, typename Size>
void add_block(const float* weight, const T* v, Size D, int64_t count, int64_t ahead, float* out) {
  constexpr int kVectors = std::min(8, kSums / kHeads);
  int64_t d = 0;
  for (; d + kVectors * kLanes <= D; d += kVectors * kLanes)
    add_values<kHeads, kVectors>(weight, v + d, D, count, ahead, out + d);
  for (; d < D; d += 2 * kLanes)
    add_values<kHeads, 2>(weight, v + d, D, count, ahead, out + d);
}

// Calls work.template operator()<count>(first head) for groups of up to kMax of G heads.
template <int kMax, typename Work>
void for_heads(int64_t G, const Work& work) {
  int64_t g = 0;
  for (; g + kMax <= G; g += kMax) work.template operator()<kMax>(g);
  for (; g + 2 <= G; g += 2) work.template operator()<2>(g);
  if (g < G) work.template operator()<1>(g);
}

// Writes a query as keys of its type are multiplied with. Returns the scale of the result.
float write_query(const BFloat16* from, int64_t D, BFloat16* to) {
  std::copy_n(from, D, to);
  return 1;
}

float write_query(const BFloat16* from, int64_t D, int16_t* to) {
  constexpr float kMost = 32767, kLeast = 1e-30f;
  const float size = largest_size(from, D), to_ints = size > kLeast ? kMost / size : 0.f;
  for (int64_t d = 0; d < D; d += kLanes) {
    const Ints ints = round_to_ints(load(from + d) * to_ints);
    for (int64_t i = 0; i < kLanes; i++) to[d + i] = static_cast<int16_t>(ints[i]);
  }
  return size / kMost;
}

// Turns scores of a block into weights, exp(score - maximum), and makes the part ready for them.
void weigh(float* score, int64_t count, int64_t g, int64_t D, Part& part) {
  for (int64_t t = count; t % kLanes; t++) score[t] = -1e30f;
  Vec most = load(score), total = {};
  for (int64_t t = kLanes; t < count; t += kLanes) most = larger(most, load(score + t));
  const float maximum = part.raise(g, D, largest(most));
  for (int64_t t = 0; t < count; t += kLanes) {
    const Vec weight = exp_of_negative(load(score + t) - maximum);
    store(score + t, weight);
    total += weight;
  }
  part.total[g] += sum(total);  // the padding adds exp(-87) at most, 1e-38
}

template <typename T, typename Size>
void attend_blocks(const BFloat16* q, const Cached<T>& cached, int64_t G, Size D, int64_t begin, int64_t end, float scale,
                   const Cached<T>& following, Part& part) {
  const T *k = cached.keys, *v = cached.values;
  const float *k_scale = cached.key_scale, *v_scale = cached.value_scale;
  thread_local std::vector<Query<T>> query;  // kept from call to call: with few positions, allocation takes as long as they do
  thread_local Lines<float> score, query_scale;
  query.resize(G * D), score.resize(G * kBlock), query_scale.resize(G);
  for (int64_t g = 0; g < G; g++) query_scale[g] = scale * write_query(q + g * D, D, &query[g * D]);
  part.clear(G, D);
  for (int64_t start = begin; start < end; start += kBlock) {
    const int64_t count = std::min(kBlock, end - start);
    const bool is_last = start + kBlock >= end;
    const int64_t ahead = !is_last ? kBlock * D : following.keys ? following.keys - (k + start * D) : 0;
    for_heads<kHeadsOfKeys>(G, [&]<int kHeads>(int64_t g) {
      multiply_keys<kHeads>(&query[g * D], k + start * D, D, count, g ? 0 : ahead, &score[g * kBlock]);
    });
    for (int64_t g = 0; g < G; g++) {
      float* s = &score[g * kBlock];
      for (int64_t t = 0; t < count; t++) s[t] *= query_scale[g] * (k_scale ? k_scale[start + t] : 1.f);
      weigh(s, count, g, D, part);
      for (int64_t t = 0; v_scale && t < count; t++) s[t] *= v_scale[start + t];
    }
    for_heads<kHeadsOfValues>(G, [&]<int kHeads>(int64_t g) {
      add_block<kHeads>(&score[g * kBlock], v + start * D, D, count, g ? 0 : ahead, &part.out[g * D]);
    });
  }
}

// Positions begin..end of one key/value head, into `part`; each key and value is read once for all G query heads.
// `following`: what the caller reads next, which is asked for ahead; or nothing.
template <typename T>
void attend(const BFloat16* q, const Cached<T>& cached, int64_t G, int64_t D, int64_t begin, int64_t end, float scale,
            const Cached<T>& following, Part& part) {
  if (D == UsualSize::value) return attend_blocks(q, cached, G, UsualSize{}, begin, end, scale, following, part);
  attend_blocks(q, cached, G, D, begin, end, scale, following, part);
}

}  // namespace

DecodeAttention::DecodeAttention(const int64_t* position, int64_t M, int64_t K, int64_t G, int64_t S, int64_t D)
    : M_(M), K_(K), G_(G), S_(S), D_(D) {
  int64_t before = 0;
  for (int64_t head = 0; head < K; head++)
    for (int64_t row = 0; row < M; row++) {
      const int64_t length = std::clamp<int64_t>(position[row] + 1, 1, S);
      const int64_t count = parts_of(length);
      const auto border = [&](int64_t i) { return i == count ? length : length * i / count / kBlock * kBlock; };
      first_.push_back(parts_.size());
      for (int64_t i = 0; i < count; i++) {
        parts_.push_back({head, row, border(i), border(i + 1), before});
        before += border(i + 1) - border(i);
      }
    }
  first_.push_back(parts_.size());
  results_.resize(parts_.size());
  parts_.push_back({0, 0, 0, 0, before});
}

namespace {

struct Division {
  Range own;
  int64_t largest;  // positions of a thread
};

// Divides items, each of which has the positions begin(i)..begin(i + 1): a thread has those whose middles lie in its share.
template <typename Begin>
Division divide(int64_t count, const Begin& begin, int thread, int threads) {
  Division result{};
  for (int64_t i = 0, load = 0, previous = 0; i < count; i++) {
    const int64_t owner = (begin(i) + begin(i + 1)) * threads / (2 * begin(count));
    load = (owner == previous ? load : 0) + begin(i + 1) - begin(i);
    previous = owner;
    result.largest = std::max(result.largest, load);
    result.own.begin += owner < thread, result.own.end += owner <= thread;
  }
  return result;
}

}  // namespace

DecodeAttention::Share DecodeAttention::share(int thread, int threads) const {
  const int64_t count = K_ * M_;
  const Division heads = divide(count, [&](int64_t i) { return parts_[first_[i]].before; }, thread, threads);
  const Division parts = divide(first_[count], [&](int64_t i) { return parts_[i].before; }, thread, threads);
  if (heads.largest <= parts.largest + kBarriers) return {heads.own, {0, 0}, false};
  return {::share(count, thread, threads), parts.own, true};
}

template <typename T>
void DecodeAttention::run(const Share& own, const BFloat16* q, int64_t stride, const Cached<T>& cached, BFloat16* y,
                          Barrier& barrier) {
  const float scale = 1.f / std::sqrt(static_cast<float>(D_));
  const auto attend_part = [&](int64_t i, bool is_last, Part& result) {
    const Positions &now = parts_[i], &next = parts_[i + 1];
    const Cached<T> following = is_last ? Cached<T>{} : cached.head(next.row * K_ + next.head, S_, D_).from(next.begin, D_);
    attend(q + now.row * stride + now.head * G_ * D_, cached.head(now.row * K_ + now.head, S_, D_), G_, D_, now.begin, now.end,
           scale, following, result);
  };
  if (own.has_parts) {
    barrier.wait();
    for (int64_t i = own.parts.begin; i < own.parts.end; i++) attend_part(i, i + 1 == own.parts.end, results_[i]);
    barrier.wait();
  }
  thread_local Part room[2];
  for (int64_t head = own.heads.begin; head < own.heads.end; head++) {
    const int64_t first = first_[head];
    Part& whole = own.has_parts ? results_[first] : room[0];
    for (int64_t i = first; i < first_[head + 1]; i++) {
      Part& part = own.has_parts ? results_[i] : room[i > first];
      if (!own.has_parts) attend_part(i, i + 1 == first_[own.heads.end], part);
      if (i > first) whole.merge(part, G_, D_);
    }
    whole.write<T>(G_, D_, y + (row_of(head) * K_ + head_of(head)) * G_ * D_);
  }
}

template void DecodeAttention::run(const Share&, const BFloat16*, int64_t, const Cached<BFloat16>&, BFloat16*, Barrier&);
template void DecodeAttention::run(const Share&, const BFloat16*, int64_t, const Cached<int8_t>&, BFloat16*, Barrier&);

void qwen3fast_decode_attention(const BFloat16* q, const Cache* cache, const int64_t* position, BFloat16* y, int64_t B,
                                int64_t H, int64_t K, int64_t S, int64_t D, int64_t threads) {
  DecodeAttention attention(position, B, K, H / K, S, D);
  in_threads(threads, [&](int thread, Barrier& barrier) {
    const auto own = attention.share(thread, barrier.threads);
    if (cache->key_scale)
      attention.run(own, q, H * D, Cached<int8_t>(*cache), y, barrier);
    else
      attention.run(own, q, H * D, Cached<BFloat16>(*cache), y, barrier);
  });
}
