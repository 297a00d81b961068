// bfloat16, and vectors of sixteen numbers, written with the compilers' vector extensions, not with one processor's
// intrinsics: a Vec is one AVX-512 register, two AVX2 or four NEON registers.

#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>
#ifdef __AVX2__
#include <immintrin.h>
#endif

// The upper half of a float32, rounded to the nearest, halves to even. NaN stays NaN if it came from a bfloat16 or from
// arithmetic: its lower half is zero then.
struct BFloat16 {
  uint16_t bits;

  BFloat16() = default;
  explicit BFloat16(float x) {
    const uint32_t whole = std::bit_cast<uint32_t>(x);
    bits = static_cast<uint16_t>((whole + 0x7fffu + (whole >> 16 & 1u)) >> 16);
  }
  operator float() const { return std::bit_cast<float>(uint32_t{bits} << 16); }
};

namespace {

constexpr int64_t kLanes = 16;
typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Ints __attribute__((vector_size(kLanes * sizeof(int32_t))));
typedef uint32_t Bits __attribute__((vector_size(kLanes * sizeof(uint32_t))));
typedef uint16_t Half __attribute__((vector_size(kLanes * sizeof(uint16_t))));
typedef int8_t Bytes __attribute__((vector_size(kLanes)));

// The bits of an IEEE float16.
struct Float16 {
  uint16_t bits;
};

template <typename V, typename T>
inline V load_as(const T* p) {
  V vec;
  std::memcpy(&vec, p, sizeof vec);
  return vec;
}

inline Vec load(const float* p) { return load_as<Vec>(p); }

// Sixteen bfloat16 numbers as float32: their bits are the upper halves.
inline Vec load(const BFloat16* p) {
  const Bits bits = __builtin_convertvector(load_as<Half>(p), Bits) << 16;
  return load_as<Vec>(&bits);
}

// Signed or unsigned bytes. With intrinsics, since GCC 12 makes __builtin_convertvector convert each byte by itself.
template <typename Byte, typename = std::enable_if_t<sizeof(Byte) == 1>>
inline Vec load(const Byte* p) {
  constexpr bool kIsSigned = std::is_signed_v<Byte>;
#if defined(__AVX512F__)
  const __m128i bytes = load_as<__m128i>(p);
  return (Vec)_mm512_cvtepi32_ps(kIsSigned ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes));
#elif defined(__AVX2__)
  __m256 halves[2];
  for (int i = 0; i < 2; i++) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8 * i));
    halves[i] = _mm256_cvtepi32_ps(kIsSigned ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
  }
  return load_as<Vec>(halves);
#else
  float numbers[kLanes];
  for (int64_t i = 0; i < kLanes; i++) numbers[i] = p[i];
  return load_as<Vec>(numbers);
#endif
}

inline Vec fill(float value) { return value - Vec{}; }

// Sixteen float16 numbers as float32, exactly; without instructions for it, by moving the bits and scaling by 2^112.
// NaN loses its payload, whose lower half BFloat16 could not round.
inline Vec load(const Float16* p) {
#if defined(__AVX512F__)
  const Vec result = (Vec)_mm512_cvtph_ps(load_as<__m256i>(p));
#elif defined(__F16C__)
  __m256 halves[2];
  for (int i = 0; i < 2; i++) halves[i] = _mm256_cvtph_ps(load_as<__m128i>(p + 8 * i));
  const Vec result = load_as<Vec>(halves);
#else
  const Bits bits = __builtin_convertvector(load_as<Half>(p), Bits), size = (bits & 0x7fffu) << 13;
  const Vec scaled = load_as<Vec>(&size) * 0x1p112f;
  const Bits is_special = (Bits)(size >= 0x0f800000u);  // infinity and NaN have the largest exponent in both
  const Bits whole = (is_special & (size | 0x7f800000u)) | (~is_special & load_as<Bits>(&scaled)) | (bits & 0x8000u) << 16;
  const Vec result = load_as<Vec>(&whole);
#endif
  return result == result ? result : fill(__builtin_nanf(""));
}

inline void store(float* p, Vec vec) { std::memcpy(p, &vec, sizeof vec); }

// The bits of the nearest bfloat16 numbers in the lower half of each lane; see BFloat16.
inline Bits as_bfloat16(Vec vec) {
  const Bits bits = load_as<Bits>(&vec);
  return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

inline void store(BFloat16* p, Vec vec) {
  const Half half = __builtin_convertvector(as_bfloat16(vec), Half);
  std::memcpy(p, &half, sizeof half);
}

// The lowest bytes of sixteen numbers.
inline void store(int8_t* p, Ints vec) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm512_cvtepi32_epi8((__m512i)vec);
#else
  const Bytes bytes = __builtin_convertvector(vec, Bytes);
#endif
  std::memcpy(p, &bytes, sizeof bytes);
}

// In every lane: total + the dot product of two pairs of bfloat16 numbers.
inline Vec dot2(Vec total, Bits a, Bits b) {
#ifdef __AVX512BF16__
  return (Vec)_mm512_dpbf16_ps((__m512)total, (__m512bh)a, (__m512bh)b);
#else
  const Bits a_low = a << 16, a_high = a & 0xffff0000u, b_low = b << 16, b_high = b & 0xffff0000u;
  return total + load_as<Vec>(&a_low) * load_as<Vec>(&b_low) + load_as<Vec>(&a_high) * load_as<Vec>(&b_high);
#endif
}

// The same for pairs of 16-bit integers.
inline Ints dot2(Ints total, Bits a, Bits b) {
#if defined(__AVX512VNNI__)
  return (Ints)_mm512_dpwssd_epi32((__m512i)total, (__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  __m256i x[2], y[2];
  std::memcpy(x, &a, sizeof a);
  std::memcpy(y, &b, sizeof b);
  for (int i = 0; i < 2; i++) x[i] = _mm256_madd_epi16(x[i], y[i]);
  return total + load_as<Ints>(x);
#else
  const Ints first = (Ints)a, second = (Ints)b;
  return total + (first << 16 >> 16) * (second << 16 >> 16) + (first >> 16) * (second >> 16);
#endif
}

// In every lane: total + the dot product of four unsigned bytes of `weight` with four signed bytes of `x`.
inline Ints dot4(Ints total, Bits weight, int32_t x) {
#if defined(__AVX512VNNI__)
  return (Ints)_mm512_dpbusd_epi32((__m512i)total, (__m512i)weight, _mm512_set1_epi32(x));
#elif defined(__AVX2__)
  // Even and odd bytes apart, as 16-bit numbers: the byte instruction of AVX2 saturates.
  const Bits even = weight & 0x00ff00ffu, odd = (weight >> 8) & 0x00ff00ffu;
  const auto byte = [x](int i) { return static_cast<uint16_t>(static_cast<int8_t>(x >> (8 * i))); };
  const __m256i x_even = _mm256_set1_epi32(byte(0) | byte(2) << 16), x_odd = _mm256_set1_epi32(byte(1) | byte(3) << 16);
  __m256i halves[2], e[2], o[2];
  std::memcpy(halves, &total, sizeof total);
  std::memcpy(e, &even, sizeof even);
  std::memcpy(o, &odd, sizeof odd);
  for (int i = 0; i < 2; i++)
    halves[i] = _mm256_add_epi32(
        halves[i], _mm256_add_epi32(_mm256_madd_epi16(e[i], x_even), _mm256_madd_epi16(o[i], x_odd)));
  return load_as<Ints>(halves);
#else
  for (int i = 0; i < 4; i++) total += (Ints)((weight >> (8 * i)) & 255u) * static_cast<int8_t>(x >> (8 * i));
  return total;
#endif
}

inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// All lanes taken together by an operation, in halves: the order does not depend on compiler or flags.
#define QWEN3FAST_FOLD(combine)                                                                             \
  v = combine(v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));      \
  v = combine(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));      \
  v = combine(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));      \
  v = combine(v, __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));      \
  return v[0];

inline float sum(Vec v) {
  const auto add = [](Vec a, Vec b) { return a + b; };
  QWEN3FAST_FOLD(add)
}

inline int32_t sum(Ints v) {
  const auto add = [](Ints a, Ints b) { return a + b; };
  QWEN3FAST_FOLD(add)
}

inline float largest(Vec v) { QWEN3FAST_FOLD(larger) }

// Each of sixteen vectors taken together by an operation, as one vector: each step takes halves of two vectors side by
// side.
template <typename Combine>
inline Vec fold(Vec* v, const Combine& combine) {
#define HALVES(a, b, lo, hi) combine(__builtin_shufflevector(a, b, lo), __builtin_shufflevector(a, b, hi))
#define LO8 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define HI8 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
#define LO4 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27
#define HI4 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31
#define LO2 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define HI2 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#define LO1 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30
#define HI1 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31
  for (int i = 0; i < 8; i++) v[i] = HALVES(v[i], v[i + 8], LO8, HI8);
  for (int i = 0; i < 4; i++) v[i] = HALVES(v[i], v[i + 4], LO4, HI4);
  for (int i = 0; i < 2; i++) v[i] = HALVES(v[i], v[i + 2], LO2, HI2);
  return HALVES(v[0], v[1], LO1, HI1);
}

// A 16 x 16 square of 32-bit numbers, rows and columns exchanged: each step does so with the halves of ever smaller squares.
inline void transpose(Bits* v) {
#define EXCHANGE(step, lo, hi)                               \
  for (int i = 0; i < kLanes; i++)                           \
    if (!(i & step)) {                                       \
      const Bits a = v[i], b = v[i + step];                  \
      v[i] = __builtin_shufflevector(a, b, lo);              \
      v[i + step] = __builtin_shufflevector(a, b, hi);       \
    }
  EXCHANGE(8, LO8, HI8)
  EXCHANGE(4, LO4, HI4)
  EXCHANGE(2, LO2, HI2)
  EXCHANGE(1, LO1, HI1)
}

// The sum of each of sixteen vectors, with the same additions as in `sum`.
inline Vec sums(Vec* v) {
  return fold(v, [](Vec a, Vec b) { return a + b; });
}

// exp(x) for x <= 0, to about 2e-7 relative: 2^n from the exponent's bits, 2^f for |f| <= 0.5 from the series of exp.
// At least exp(-87); NaN stays NaN.
inline Vec exp_of_negative(Vec x) {
  const Vec y = (x < -87.f ? fill(-87.f) : x) * 1.44269504f;
  const Ints n = __builtin_convertvector(y - 0.5f, Ints);  // rounds towards zero, so to the nearest for y <= 0
  const Vec f = (y - __builtin_convertvector(n, Vec)) * 0.693147181f;
  Vec series = fill(1.f / 720);
  for (const float term : {1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f}) series = series * f + term;
  const Ints power = (n + 127) << 23;
  Vec scale;
  std::memcpy(&scale, &power, sizeof scale);
  return series * scale;
}

// The nearest integers, halves to even: adding and subtracting 1.5 * 2^23 leaves no room for a fraction.
inline Ints round_to_ints(Vec x) { return __builtin_convertvector(x + 12582912.f - 12582912.f, Ints); }

}  // namespace
