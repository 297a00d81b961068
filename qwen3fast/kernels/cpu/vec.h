// bfloat16, and vectors of sixteen numbers, most of it written with the compilers' vector extensions, not with one
// processor's intrinsics: a Vec is one AVX-512 register, two AVX2 or four NEON registers.

#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
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

// A std::vector that begins with a cache line: reading a vector that lies in two takes twice as long.
template <typename T>
struct LineAllocator {
  using value_type = T;
  static constexpr std::align_val_t kLine{64};

  LineAllocator() = default;
  template <typename Other>
  LineAllocator(const LineAllocator<Other>&) {}
  T* allocate(std::size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), kLine)); }
  void deallocate(T* numbers, std::size_t) { ::operator delete(numbers, kLine); }
  friend bool operator==(const LineAllocator&, const LineAllocator&) { return true; }
};
template <typename T>
using Lines = std::vector<T, LineAllocator<T>>;

namespace {

// Vectors that are passed to a function go through memory. Compilers would call some functions that are used often.
#define FORCE_INLINE inline __attribute__((always_inline))

// Bytes of a register.
#if defined(__AVX512F__)
constexpr int64_t kRegister = 64;
#elif defined(__AVX__)
constexpr int64_t kRegister = 32;
#else
constexpr int64_t kRegister = 16;
#endif

// A vector of 64 bytes in as many registers as it takes: GCC keeps its own vectors in memory if they are longer than one.
template <typename T>
struct Wide {
  typedef T Part __attribute__((vector_size(kRegister)));
  static constexpr int64_t kParts = 64 / kRegister, kInPart = kRegister / sizeof(T);
  Part part[kParts];

  Wide() = default;  // Wide{} is zero
  FORCE_INLINE Wide(T number) {
    for (Part& p : part) p = number - Part{};
  }

  FORCE_INLINE T operator[](int64_t lane) const { return part[lane / kInPart][lane % kInPart]; }
  FORCE_INLINE void set(int64_t lane, T number) { part[lane / kInPart][lane % kInPart] = number; }
};

// The bits of a vector as numbers of another type; its numbers, converted.
template <typename To, typename From>
FORCE_INLINE To as(Wide<From> from) {
  To to;
  for (int64_t i = 0; i < To::kParts; i++) to.part[i] = (typename To::Part)from.part[i];
  return to;
}

template <typename To, typename From>
FORCE_INLINE To convert(Wide<From> from) {
  To to;
  for (int64_t i = 0; i < To::kParts; i++) to.part[i] = __builtin_convertvector(from.part[i], typename To::Part);
  return to;
}

// A scalar operand stands for as many equal numbers. Comparisons give 0 or -1.
#define QWEN3FAST_OPERATOR(op, Result)                                                                              \
  template <typename T>                                                                                             \
  FORCE_INLINE Result operator op(Wide<T> a, Wide<T> b) {                                                           \
    Result result;                                                                                                  \
    for (int64_t i = 0; i < Wide<T>::kParts; i++) result.part[i] = (typename Result::Part)(a.part[i] op b.part[i]); \
    return result;                                                                                                  \
  }                                                                                                                 \
  template <typename T>                                                                                             \
  FORCE_INLINE Result operator op(Wide<T> a, std::type_identity_t<T> b) {                                           \
    return a op Wide<T>(b);                                                                                         \
  }                                                                                                                 \
  template <typename T>                                                                                             \
  FORCE_INLINE Result operator op(std::type_identity_t<T> a, Wide<T> b) {                                           \
    return Wide<T>(a) op b;                                                                                         \
  }
#define QWEN3FAST_ARITHMETIC(op)                                                                                    \
  QWEN3FAST_OPERATOR(op, Wide<T>)                                                                                   \
  template <typename T, typename Other>                                                                             \
  FORCE_INLINE Wide<T>& operator op##=(Wide<T>& a, const Other& b) {                                                \
    return a = a op b;                                                                                              \
  }
QWEN3FAST_ARITHMETIC(+)
QWEN3FAST_ARITHMETIC(-)
QWEN3FAST_ARITHMETIC(*)
QWEN3FAST_ARITHMETIC(/)
QWEN3FAST_ARITHMETIC(&)
QWEN3FAST_ARITHMETIC(|)
QWEN3FAST_ARITHMETIC(^)
QWEN3FAST_ARITHMETIC(<<)
QWEN3FAST_ARITHMETIC(>>)
template <typename T>
using Mask = Wide<std::conditional_t<sizeof(T) == 4, int32_t, int16_t>>;
QWEN3FAST_OPERATOR(<, Mask<T>)
QWEN3FAST_OPERATOR(>, Mask<T>)
QWEN3FAST_OPERATOR(<=, Mask<T>)
QWEN3FAST_OPERATOR(>=, Mask<T>)
QWEN3FAST_OPERATOR(==, Mask<T>)
QWEN3FAST_OPERATOR(!=, Mask<T>)

template <typename T>
FORCE_INLINE Wide<T> select(Mask<T> condition, Wide<T> a, Wide<T> b) {
  for (int64_t i = 0; i < Wide<T>::kParts; i++) a.part[i] = condition.part[i] ? a.part[i] : b.part[i];
  return a;
}

// Part `part` of the numbers kIndex... of a and b side by side, as __builtin_shufflevector has them: they come from at most
// two parts.
template <int64_t part, int... kIndex, typename T, int64_t... kLane>
FORCE_INLINE typename Wide<T>::Part shuffled(const Wide<T>& a, const Wide<T>& b, std::integer_sequence<int64_t, kLane...>) {
  constexpr int64_t all[] = {kIndex...}, kIn = Wide<T>::kInPart, kParts = Wide<T>::kParts;
  constexpr int64_t index[] = {all[part * kIn + kLane]...};  // of this part
  constexpr int64_t first = index[0] / kIn, second = std::max({index[kLane] / kIn == first ? -1 : index[kLane] / kIn...});
  constexpr int64_t other = second < 0 ? first : second;
  static_assert(((index[kLane] / kIn == first || index[kLane] / kIn == other) && ...));
  const auto source = [&](int64_t i) { return i < kParts ? a.part[i] : b.part[i - kParts]; };
  return __builtin_shufflevector(source(first), source(other),
                                 (index[kLane] / kIn == first ? 0 : kIn) + index[kLane] % kIn...);
}

template <int... kIndex, typename T>
FORCE_INLINE Wide<T> shuffle(Wide<T> a, Wide<T> b) {
  Wide<T> result;
  [&]<int64_t... kPart>(std::integer_sequence<int64_t, kPart...>) {
    ((result.part[kPart] = shuffled<kPart, kIndex...>(a, b, std::make_integer_sequence<int64_t, Wide<T>::kInPart>{})), ...);
  }(std::make_integer_sequence<int64_t, Wide<T>::kParts>{});
  return result;
}

// Calls body(0), ..., body(kCount - 1), each with a constant: compilers keep arrays in registers only if no index varies.
// A body that is a lambda needs INLINE_BODY behind its parameters.
#define INLINE_BODY __attribute__((always_inline))
template <int kCount, typename Body>
FORCE_INLINE void unrolled(const Body& body) {
  [&]<int... kIndex>(std::integer_sequence<int, kIndex...>) INLINE_BODY {
    (body(std::integral_constant<int, kIndex>{}), ...);
  }(std::make_integer_sequence<int, kCount>{});
}

constexpr int64_t kLanes = 16;
typedef Wide<float> Vec;
typedef Wide<int32_t> Ints;
typedef Wide<uint32_t> Bits;

// The bits of an IEEE float16.
struct Float16 {
  uint16_t bits;
};

// What lies at p, in the order of memory: one of the types above, in whole registers, or any other.
template <typename V, typename T>
FORCE_INLINE V load_as(const T* p) {
  V vec;
  if constexpr (requires { V::kParts; })
    for (int64_t i = 0; i < V::kParts; i++)
      std::memcpy(&vec.part[i], reinterpret_cast<const char*>(p) + i * kRegister, kRegister);
  else
    std::memcpy(&vec, p, sizeof vec);
  return vec;
}

template <typename T>
FORCE_INLINE void store_as_is(void* p, Wide<T> vec) {
  for (int64_t i = 0; i < Wide<T>::kParts; i++) std::memcpy(static_cast<char*>(p) + i * kRegister, &vec.part[i], kRegister);
}

FORCE_INLINE Vec load(const float* p) { return load_as<Vec>(p); }
FORCE_INLINE void store(float* p, Vec vec) { store_as_is(p, vec); }

// Makes a vector from what `convert_part(p)` returns for each register's numbers.
template <typename V, typename T, typename Convert>
FORCE_INLINE V load_parts(const T* p, const Convert& convert_part) {
  V vec;
  for (int64_t i = 0; i < V::kParts; i++) vec.part[i] = (typename V::Part)convert_part(p + i * V::kInPart);
  return vec;
}

// Sixteen numbers of 16 bits. With intrinsics, as those below: GCC 12 converts vectors of other sizes in pieces.
FORCE_INLINE Bits load_halves(const void* p) {
  return load_parts<Bits>(static_cast<const uint16_t*>(p), [](const uint16_t* p) {
#if defined(__AVX512F__)
    return _mm512_cvtepu16_epi32(load_as<__m256i>(p));
#elif defined(__AVX2__)
    return _mm256_cvtepu16_epi32(load_as<__m128i>(p));
#else
    typedef uint16_t Half __attribute__((vector_size(kRegister / 2)));
    return __builtin_convertvector(load_as<Half>(p), Bits::Part);
#endif
  });
}

// Sixteen bfloat16 numbers as float32: their bits are the upper halves.
FORCE_INLINE Vec load(const BFloat16* p) { return as<Vec>(load_halves(p) << 16); }

// Signed or unsigned bytes.
template <typename Byte, typename = std::enable_if_t<sizeof(Byte) == 1>>
FORCE_INLINE Ints load_ints(const Byte* p) {
  [[maybe_unused]] constexpr bool kIsSigned = std::is_signed_v<Byte>;
  return load_parts<Ints>(p, [](const Byte* p) {
#if defined(__AVX512F__)
    const __m128i bytes = load_as<__m128i>(p);
    return kIsSigned ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes);
#elif defined(__AVX2__)
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return kIsSigned ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes);
#else
    Ints::Part numbers;
    for (int64_t i = 0; i < Ints::kInPart; i++) numbers[i] = p[i];
    return numbers;
#endif
  });
}

template <typename Byte, typename = std::enable_if_t<sizeof(Byte) == 1>>
FORCE_INLINE Vec load(const Byte* p) {
  return convert<Vec>(load_ints(p));
}

FORCE_INLINE Vec fill(float value) { return value; }

// Sixteen float16 numbers as float32, exactly; without instructions for it, by moving the bits and scaling by 2^112.
// NaN loses its payload, whose lower half BFloat16 could not round.
FORCE_INLINE Vec load(const Float16* p) {
#if defined(__AVX512F__)
  const Vec result = load_parts<Vec>(p, [](const Float16* p) { return _mm512_cvtph_ps(load_as<__m256i>(p)); });
#elif defined(__F16C__)
  const Vec result = load_parts<Vec>(p, [](const Float16* p) { return _mm256_cvtph_ps(load_as<__m128i>(p)); });
#else
  const Bits bits = load_halves(p), size = (bits & 0x7fffu) << 13;
  const Vec scaled = as<Vec>(size) * 0x1p112f;
  const Bits is_special = as<Bits>(size >= 0x0f800000u);  // infinity and NaN have the largest exponent in both
  const Bits whole = (is_special & (size | 0x7f800000u)) | ((~0u ^ is_special) & as<Bits>(scaled)) | (bits & 0x8000u) << 16;
  const Vec result = as<Vec>(whole);
#endif
  return select(result == result, result, fill(__builtin_nanf("")));
}

// The bits of the nearest bfloat16 numbers in the lower half of each lane, as BFloat16 rounds them. Where there is an
// instruction for it, subnormal ones, below 1.2e-38, become zero.
FORCE_INLINE Bits as_bfloat16(Vec vec) {
#ifdef __AVX512BF16__
  Bits bits;
  bits.part[0] = (Bits::Part)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)vec.part[0]));
  return bits;
#else
  const Bits bits = as<Bits>(vec);
  return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
#endif
}

// The same of two vectors, in the lower and the upper halves.
FORCE_INLINE Bits as_bfloat16(Vec low, Vec high) {
#ifdef __AVX512BF16__
  alignas(64) static constexpr uint16_t kInTurns[] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)high.part[0], (__m512)low.part[0]);
  Bits bits;
  bits.part[0] = (Bits::Part)_mm512_permutexvar_epi16(load_as<__m512i>(kInTurns), halves);
  return bits;
#else
  return as_bfloat16(low) | as_bfloat16(high) << 16;
#endif
}

// The nearest bfloat16 numbers.
FORCE_INLINE Vec round_to_bfloat16(Vec vec) { return as<Vec>(as_bfloat16(vec) << 16); }

// The lower halves of sixteen numbers, whose upper ones are zero.
FORCE_INLINE void store_halves(void* p, Bits vec) {
#if defined(__AVX512F__)
  const __m256i halves = _mm512_cvtepi32_epi16((__m512i)vec.part[0]);
  std::memcpy(p, &halves, sizeof halves);
#elif defined(__AVX2__)
  const __m256i mixed = _mm256_packus_epi32((__m256i)vec.part[0], (__m256i)vec.part[1]);
  const __m256i halves = _mm256_permute4x64_epi64(mixed, 0b11011000);
  std::memcpy(p, &halves, sizeof halves);
#else
  typedef uint16_t Half __attribute__((vector_size(kRegister / 2)));
  for (int64_t i = 0; i < Bits::kParts; i++) {
    const Half half = __builtin_convertvector(vec.part[i], Half);
    std::memcpy(static_cast<char*>(p) + i * sizeof half, &half, sizeof half);
  }
#endif
}

FORCE_INLINE void store(BFloat16* p, Vec vec) {
#ifdef __AVX512BF16__
  const __m256bh halves = _mm512_cvtneps_pbh((__m512)vec.part[0]);
  std::memcpy(p, &halves, sizeof halves);
#else
  store_halves(p, as_bfloat16(vec));
#endif
}

// Two vectors, one behind the other.
FORCE_INLINE void store_two_in_order(BFloat16* p, Vec first, Vec second) {
#ifdef __AVX512BF16__
  const __m512bh both = _mm512_cvtne2ps_pbh((__m512)second.part[0], (__m512)first.part[0]);
  std::memcpy(p, &both, sizeof both);
#else
  store(p, first), store(p + kLanes, second);
#endif
}

// The lowest bytes of sixteen numbers.
FORCE_INLINE void store(int8_t* p, Ints vec) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm512_cvtepi32_epi8((__m512i)vec.part[0]);
  std::memcpy(p, &bytes, sizeof bytes);
#elif defined(__AVX2__)
  const Ints low = vec & 255;
  const __m256i mixed = _mm256_packus_epi32((__m256i)low.part[0], (__m256i)low.part[1]);
  const __m256i halves = _mm256_permute4x64_epi64(mixed, 0b11011000);
  const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
  std::memcpy(p, &bytes, sizeof bytes);
#else
  for (int64_t i = 0; i < kLanes; i++) p[i] = static_cast<int8_t>(vec[i]);
#endif
}

// For each byte of `index`, below 16, the byte of a table that stands there.
FORCE_INLINE Bits look_up(const uint8_t* table, Bits index) {
#if defined(__AVX512BW__)
  index.part[0] = (Bits::Part)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(load_as<__m128i>(table)), (__m512i)index.part[0]);
#elif defined(__AVX2__) && !defined(__AVX512F__)
  for (auto& part : index.part)
    part = (Bits::Part)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load_as<__m128i>(table)), (__m256i)part);
#elif defined(__ARM_FEATURE_DOTPROD)
  for (auto& part : index.part) part = (Bits::Part)vqtbl1q_u8(vld1q_u8(table), (uint8x16_t)part);
#else
  auto bytes = as<Wide<uint8_t>>(index);
  for (int64_t i = 0; i < 64; i++) bytes.set(i, table[bytes[i]]);
  index = as<Bits>(bytes);
#endif
  return index;
}

// Products of 16-bit integers, the nearest to a * b / 2^15; halves are rounded up.
FORCE_INLINE Wide<int16_t> multiply_high(Wide<int16_t> a, Wide<int16_t> b) {
#if defined(__AVX512BW__)
  a.part[0] = (Wide<int16_t>::Part)_mm512_mulhrs_epi16((__m512i)a.part[0], (__m512i)b.part[0]);
  return a;
#else
  const Ints x = as<Ints>(a), y = as<Ints>(b);
  const Ints low = ((x << 16 >> 16) * (y << 16 >> 16) + 0x4000) >> 15, high = ((x >> 16) * (y >> 16) + 0x4000) >> 15;
  return as<Wide<int16_t>>((low & 0xffff) | high << 16);
#endif
}

// In every lane: total + the dot product of two pairs of bfloat16 numbers.
FORCE_INLINE Vec dot2(Vec total, Bits a, Bits b) {
#ifdef __AVX512BF16__
  total.part[0] = (Vec::Part)_mm512_dpbf16_ps((__m512)total.part[0], (__m512bh)a.part[0], (__m512bh)b.part[0]);
  return total;
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  for (int64_t i = 0; i < Vec::kParts; i++)
    total.part[i] = (Vec::Part)vbfdotq_f32((float32x4_t)total.part[i], (bfloat16x8_t)a.part[i], (bfloat16x8_t)b.part[i]);
  return total;
#else
  const Vec a_low = as<Vec>(a << 16), a_high = as<Vec>(a & 0xffff0000u);
  const Vec b_low = as<Vec>(b << 16), b_high = as<Vec>(b & 0xffff0000u);
  return total + a_low * b_low + a_high * b_high;
#endif
}

// The same for pairs of 16-bit integers.
FORCE_INLINE Ints dot2(Ints total, Bits a, Bits b) {
#if defined(__AVX512VNNI__)
  total.part[0] = (Ints::Part)_mm512_dpwssd_epi32((__m512i)total.part[0], (__m512i)a.part[0], (__m512i)b.part[0]);
  return total;
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
  for (int64_t i = 0; i < Ints::kParts; i++)
    total.part[i] = (Ints::Part)_mm256_dpwssd_avx_epi32((__m256i)total.part[i], (__m256i)a.part[i], (__m256i)b.part[i]);
  return total;
#elif defined(__AVX512BW__)
  total.part[0] += (Ints::Part)_mm512_madd_epi16((__m512i)a.part[0], (__m512i)b.part[0]);
  return total;
#elif defined(__AVX2__) && !defined(__AVX512F__)
  for (int64_t i = 0; i < Ints::kParts; i++)
    total.part[i] += (Ints::Part)_mm256_madd_epi16((__m256i)a.part[i], (__m256i)b.part[i]);
  return total;
#else
  const Ints first = as<Ints>(a), second = as<Ints>(b);
  return total + (first << 16 >> 16) * (second << 16 >> 16) + (first >> 16) * (second >> 16);
#endif
}

// In every lane: total + the dot product of four unsigned bytes of `weight` with four signed bytes of `x`.
FORCE_INLINE Ints dot4(Ints total, Bits weight, int32_t x) {
#if defined(__AVX512VNNI__)
  total.part[0] = (Ints::Part)_mm512_dpbusd_epi32((__m512i)total.part[0], (__m512i)weight.part[0], _mm512_set1_epi32(x));
  return total;
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
  for (int64_t i = 0; i < Ints::kParts; i++)
    total.part[i] =
        (Ints::Part)_mm256_dpbusd_avx_epi32((__m256i)total.part[i], (__m256i)weight.part[i], _mm256_set1_epi32(x));
  return total;
#else
  // Even and odd bytes apart, as 16-bit numbers: the byte instruction of AVX2 saturates.
  const auto byte = [x](int i) { return static_cast<uint16_t>(static_cast<int8_t>(x >> (8 * i))); };
  const Bits x_even = byte(0) | uint32_t{byte(2)} << 16, x_odd = byte(1) | uint32_t{byte(3)} << 16;
  return dot2(dot2(total, weight & 0x00ff00ffu, x_even), weight >> 8 & 0x00ff00ffu, x_odd);
#endif
}

// Sums over 32 channels in each lane (16, of weights in 6 bits). start: with the amount that the weights' zero point adds.
template <int kBits>
struct ByteSums {
  Ints sums;

  FORCE_INLINE void start(int32_t offset) { sums = offset; }
  FORCE_INLINE void add(Bits weight, int32_t x) { sums = dot4(sums, weight, x); }
  FORCE_INLINE Ints total(int32_t) const { return sums; }
};

#if defined(__ARM_FEATURE_DOTPROD)
// Its dot product takes signed bytes: 8 bits without their zero point, 128; 4 to 6 bits are never negative.
template <>
FORCE_INLINE void ByteSums<4>::add(Bits weight, int32_t x) {
  for (int64_t i = 0; i < Bits::kParts; i++)
    sums.part[i] = vdotq_s32(sums.part[i], (int8x16_t)weight.part[i], vreinterpretq_s8_s32(vdupq_n_s32(x)));
}

template <>
struct ByteSums<5> : ByteSums<4> {};
template <>
struct ByteSums<6> : ByteSums<4> {};

template <>
struct ByteSums<8> {
  ByteSums<4> signed_sums;

  FORCE_INLINE void start(int32_t) { signed_sums.start(0); }
  FORCE_INLINE void add(Bits weight, int32_t x) { signed_sums.add(weight ^ 0x80808080u, x); }
  FORCE_INLINE Ints total(int32_t) const { return signed_sums.sums; }
};
#elif (defined(__AVX512BW__) && !defined(__AVX512VNNI__)) || \
    (defined(__AVX2__) && !defined(__AVX512F__) && !defined(__AVXVNNI__))
#ifdef __AVX512BW__
#define OF_REGISTER(name) _mm512_##name
FORCE_INLINE __m512i with_signs_of(__m512i level, __m512i x) {
  return _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(level), __m512i{}, x);
}
#else
#define OF_REGISTER(name) _mm256_##name
FORCE_INLINE __m256i with_signs_of(__m256i level, __m256i x) { return _mm256_sign_epi8(x, level); }
#endif
typedef decltype(OF_REGISTER(set1_epi32)(0)) Register;
FORCE_INLINE Register sum_pairs(Register numbers) { return OF_REGISTER(madd_epi16)(numbers, OF_REGISTER(set1_epi16)(1)); }

// 4 bits, up to 15: pairs of products, 8 per lane, sum up to 30,480 at most.
template <>
struct ByteSums<4> {
  Wide<int16_t> sums;

  FORCE_INLINE void start(int32_t) { sums = 0; }
  FORCE_INLINE void add(Bits weight, int32_t x) {
    for (int64_t i = 0; i < Bits::kParts; i++)
      sums.part[i] +=
          (Wide<int16_t>::Part)OF_REGISTER(maddubs_epi16)((Register)weight.part[i], OF_REGISTER(set1_epi32)(x));
  }
  FORCE_INLINE Ints total(int32_t offset) const {
    Ints total = offset;
    for (int64_t i = 0; i < Ints::kParts; i++) total.part[i] += (Ints::Part)sum_pairs((Register)sums.part[i]);
    return total;
  }
};

// 5 and 6 bits, up to 63: a pair of products sums up to 16,002 at most.
template <>
struct ByteSums<6> {
  Ints sums;

  FORCE_INLINE void start(int32_t offset) { sums = offset; }
  FORCE_INLINE void add(Bits weight, int32_t x) {
    for (int64_t i = 0; i < Bits::kParts; i++)
      sums.part[i] += (Ints::Part)sum_pairs(
          OF_REGISTER(maddubs_epi16)((Register)weight.part[i], OF_REGISTER(set1_epi32)(x)));
  }
  FORCE_INLINE Ints total(int32_t) const { return sums; }
};

template <>
struct ByteSums<5> : ByteSums<6> {};

// 8 bits, zero 128: their sizes times x with their signs, since pairs of products of larger numbers exceed 16 bits.
template <>
struct ByteSums<8> {
  Ints sums;

  FORCE_INLINE void start(int32_t) { sums = 0; }
  FORCE_INLINE void add(Bits weight, int32_t x) {
    const Bits level = weight ^ 0x80808080u;
    for (int64_t i = 0; i < Bits::kParts; i++) {
      const Register signed_level = (Register)level.part[i];
      const Register signed_x = with_signs_of(signed_level, OF_REGISTER(set1_epi32)(x));
      sums.part[i] += (Ints::Part)sum_pairs(OF_REGISTER(maddubs_epi16)(OF_REGISTER(abs_epi8)(signed_level), signed_x));
    }
  }
  FORCE_INLINE Ints total(int32_t) const { return sums; }
};
#endif

// Sums of two rows of x with 16 rows of a weight: the same integers as ByteSums, where an instruction multiplies two rows of
// 8 bytes with two others.
#if defined(__ARM_FEATURE_MATMUL_INT8)
constexpr bool kHasPairSums = true;

template <int kBits>
struct PairSums {
  int32x4_t sums[kLanes / 2] = {};  // of two rows of the weight with the first row of x, then with the second

  // Channels 0 to 3, and 4 to 7, of the weight and of two rows of x.
  FORCE_INLINE void add(Bits first, Bits second, const int8_t* x, const int8_t* next_x) {
    const int8x16_t both = vcombine_s8(vld1_s8(x), vld1_s8(next_x));
    if (kBits == 8) first ^= 0x80808080u, second ^= 0x80808080u;  // without their zero point
    for (int64_t i = 0; i < Bits::kParts; i++) {
      const auto a = (uint32x4_t)first.part[i], b = (uint32x4_t)second.part[i];
      sums[2 * i] = vmmlaq_s32(sums[2 * i], both, vreinterpretq_s8_u32(vzip1q_u32(a, b)));
      sums[2 * i + 1] = vmmlaq_s32(sums[2 * i + 1], both, vreinterpretq_s8_u32(vzip2q_u32(a, b)));
    }
  }

  // Of row 0 or 1.
  FORCE_INLINE Ints total(int row, int32_t offset) const {
    Ints total = kBits == 8 ? 0 : offset;
    for (int64_t i = 0; i < Ints::kParts; i++) {
      const auto a = vreinterpretq_s64_s32(sums[2 * i]), b = vreinterpretq_s64_s32(sums[2 * i + 1]);
      total.part[i] += vreinterpretq_s32_s64(row ? vzip2q_s64(a, b) : vzip1q_s64(a, b));
    }
    return total;
  }
};
#else
constexpr bool kHasPairSums = false;

template <int kBits>
struct PairSums {
  FORCE_INLINE void add(Bits, Bits, const int8_t*, const int8_t*) {}
  FORCE_INLINE Ints total(int, int32_t) const { return {}; }
};
#endif

FORCE_INLINE Vec size_of(Vec x) { return as<Vec>(as<Bits>(x) & 0x7fffffffu); }

FORCE_INLINE Vec larger(Vec a, Vec b) {
  for (int64_t i = 0; i < Vec::kParts; i++) a.part[i] = a.part[i] > b.part[i] ? a.part[i] : b.part[i];
  return a;
}

// All lanes taken together by an operation, in halves: the order does not depend on compiler or flags.
#define QWEN3FAST_FOLD(combine)                                                            \
  v = combine(v, shuffle<8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7>(v, v));     \
  v = combine(v, shuffle<4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11>(v, v));     \
  v = combine(v, shuffle<2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13>(v, v));     \
  v = combine(v, shuffle<1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14>(v, v));     \
  return v[0];

FORCE_INLINE float sum(Vec v) {
  const auto add = [](Vec a, Vec b) { return a + b; };
  QWEN3FAST_FOLD(add)
}

FORCE_INLINE int32_t sum(Ints v) {
  const auto add = [](Ints a, Ints b) { return a + b; };
  QWEN3FAST_FOLD(add)
}

FORCE_INLINE float largest(Vec v) { QWEN3FAST_FOLD(larger) }

// The largest size of `count` numbers, a multiple of 16; NaN if one of them is NaN or infinite.
FORCE_INLINE float largest_size(const BFloat16* x, int64_t count) {
  Vec most = {}, poison = {};  // NaN where x is NaN or infinite, which a maximum may lose
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec numbers = load(x + i);
    most = larger(size_of(numbers), most);
    poison += numbers * 0;
  }
  return largest(most) + sum(poison);
}

// Each of sixteen vectors taken together by an operation, as one vector: each step takes halves of two vectors side by
// side.
template <typename Combine>
FORCE_INLINE Vec fold(Vec* v, const Combine& combine) {
#define HALVES(a, b, lo, hi) combine(shuffle<lo>(a, b), shuffle<hi>(a, b))
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
FORCE_INLINE void transpose(Bits* v) {
#define EXCHANGE(step, lo, hi)                               \
  for (int i = 0; i < kLanes; i++)                           \
    if (!(i & step)) {                                       \
      const Bits a = v[i], b = v[i + step];                  \
      v[i] = shuffle<lo>(a, b);              \
      v[i + step] = shuffle<hi>(a, b);       \
    }
  EXCHANGE(8, LO8, HI8)
  EXCHANGE(4, LO4, HI4)
  EXCHANGE(2, LO2, HI2)
  EXCHANGE(1, LO1, HI1)
}

// The sum of each of sixteen vectors, with the same additions as in `sum`.
FORCE_INLINE Vec sums(Vec* v) {
  return fold(v, [](Vec a, Vec b) { return a + b; });
}

// exp(x) for x <= 0, to about 4e-7 relative from x = -10 on, 4e-6 at -87; at least exp(-87). It is 2^n 2^f, |f| <= 0.5: the
// series of 2^f, n added to its exponent. Adding 1.5 * 2^23 rounds to n, and leaves n in the lowest bits. NaN stays NaN if its
// lower half is zero, see BFloat16: `larger` returns its second argument then.
FORCE_INLINE Vec exp_of_negative(Vec x) {
  const Vec y = larger(fill(-87.f), x) * 1.44269504f, n = y + 12582912.f;
  const Vec f = y - (n - 12582912.f);
  Vec series = fill(1.54035304e-4f);  // ln(2)^k / k!, k = 6 to 0
  for (const float term : {1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 0.240226507f, 0.693147181f, 1.f})
    series = series * f + term;
  return as<Vec>(as<Bits>(series) + (as<Bits>(n) << 23));
}

// The nearest integers, halves to even: adding and subtracting 1.5 * 2^23 leaves no room for a fraction.
FORCE_INLINE Ints round_to_ints(Vec x) { return convert<Ints>(x + 12582912.f - 12582912.f); }

// The cache level to prefetch to. Level 1 allows few reads at a time, which costs nothing where much is computed per line:
// with 4 to 6 bits, with 3 rows of bfloat16 and more, 8 of int8. One row in 8 bits, and up to two in bfloat16, read fast
// memory through level 2. Attention depends on the processor, see decode_attention.cpp.
constexpr int kIntoL1 = 3, kIntoL2 = 2;

// Cache lines that will be read soon, and are asked for meanwhile, `count` at a time.
struct Ahead {
  const char* next;
  int64_t count;

  template <int kLevel = kIntoL2>
  FORCE_INLINE void ask() {
    for (int64_t i = 0; i < count; i++, next += 64) __builtin_prefetch(next, 0, kLevel);
  }
};

}  // namespace
