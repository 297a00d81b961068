// Products with weights in 12 bits (see lossless.h), unpacked on the way, and the packing of such weights.

#include "lossless.h"

#include <array>
#include <atomic>

#include "parallel.h"
#include "products.h"

namespace {

// Of bfloat16; of 12 bits; codes of exponents other than 0.
constexpr int kFractionBits = 7, kCodeBits = 4, kCodes = 15;

typedef Wide<uint16_t> Words;
constexpr int64_t kWords = 32;

// Turns the codes of a row into numbers.
class Codes {
 public:
#ifdef __AVX512BW__
  explicit Codes(uint16_t base) {
    const auto table = load_as<Words>(kEntries.data()), codes = table & (kCodes << kFractionBits);
    table_ = (table & 0x8000) | ((codes + base) & as<Words>(codes != 0));
  }

  // Of the lowest 12 bits of each word.
  FORCE_INLINE Words numbers(Words words) const {
    const auto index = (__m512i)words.part[0];  // the lowest five bits count
    Words high;
    high.part[0] = (Words::Part)_mm512_permutexvar_epi16(index, (__m512i)table_.part[0]);
    return high | (words >> 5 & 0x7f);
  }

 private:
  static constexpr auto kEntries = [] {
    std::array<uint16_t, kWords> entries{};
    for (int i = 0; i < kWords; i++) entries[i] = static_cast<uint16_t>(i << kFractionBits | (i >> kCodeBits) << 15);
    return entries;
  }();
  Words table_;  // sign and exponent for each sign and code
#else
  explicit Codes(uint16_t base) : base_(base) {}

  // Of the lowest 12 bits of each word.
  FORCE_INLINE Words numbers(Words words) const {
    const Words codes = words & kCodes;
    return ((codes << kFractionBits) + (base_ & as<Words>(codes != 0))) | (words & 16) << 11 | (words >> 5 & 0x7f);
  }

 private:
  Words base_;
#endif

 public:
  // 128 channels.
  FORCE_INLINE void unpack(const uint8_t* packed, Words* four) const {
    const Words a = load_as<Words>(packed), b = load_as<Words>(packed + 64), c = load_as<Words>(packed + 128);
    four[0] = numbers(a), four[1] = numbers(b), four[2] = numbers(c);
    four[3] = numbers(a >> 12 | (b >> 8 & 0xf0) | (c >> 4 & 0xf00));
  }
};

// Reads a row, 128 channels at a time.
class Row {
 public:
  Row(const Linear& weight, int64_t n)
      : record_(static_cast<const RowRecord*>(weight.scale)[n]),
        packed_(stored_row(weight, n)),
        codes_(record_.base),
        exception_(reinterpret_cast<const Exception*>(&record_) + record_.first),
        end_(exception_ + record_.count) {}

  // The next 128 channels, from k on.
  void take(int64_t k, Words* four) {
    for (int64_t i = 0; i < kCodedBytes; i += 64) __builtin_prefetch(packed_ + 2 * kAhead + i, 0, kIntoL2);
    codes_.unpack(packed_, four);
    packed_ += kCodedBytes;
    if (exception_ < end_ && exception_->channel < k + kCoded) [[unlikely]] {
      BFloat16 numbers[kCoded];
      std::memcpy(numbers, four, sizeof numbers);
      for (; exception_ < end_ && exception_->channel < k + kCoded; exception_++)
        numbers[exception_->channel - k] = exception_->number;
      std::memcpy(four, numbers, sizeof numbers);
    }
  }

  // What follows the last 128 channels: numbers as they are.
  const uint8_t* rest() const { return packed_; }

 private:
  const RowRecord& record_;
  const uint8_t* packed_;
  const Codes codes_;
  const Exception *exception_, *end_;
};

// A row times a row of x, by the same additions as in matvec.cpp.
BFloat16 dot(const Linear& weight, int64_t n, const BFloat16* x) {
  Row row(weight, n);
  Vec total = {};
  int64_t k = 0;
  for (; k + kCoded <= weight.K; k += kCoded) {
    Words four[4];
    row.take(k, four);
    for (int i = 0; i < 4; i++) total = dot2(total, as<Bits>(four[i]), load_as<Bits>(x + k + i * kWords));
  }
  for (const uint8_t* rest = row.rest(); k < weight.K; k += kWords, rest += sizeof(Bits))
    total = dot2(total, load_as<Bits>(rest), load_as<Bits>(x + k));
  return BFloat16(sum(total));
}

int exponent(BFloat16 number) { return number.bits >> kFractionBits & 0xff; }

// The exponent before the window in which most numbers of a row have theirs; of equal ones the first.
int best_base(const BFloat16* row, int64_t K) {
  std::array<int32_t, 256> counts{};
  for (int64_t k = 0; k < K; k++) counts[exponent(row[k])]++;
  int32_t inside = 0, most = 0;
  for (int e = 1; e <= kCodes; e++) inside += counts[e];
  most = inside;
  int best = 0;
  for (int base = 1; base + kCodes < 256; base++) {
    inside += counts[base + kCodes] - counts[base];
    if (inside > most) most = inside, best = base;
  }
  return best;
}

// The code of a number's exponent: -1 if it has none.
int code_of(BFloat16 number, int base) {
  const int code = exponent(number) - base;
  return exponent(number) == 0 ? 0 : code >= 1 && code <= kCodes ? code : -1;
}

}  // namespace

void unpack_row(const Linear& weight, int64_t n, BFloat16* y) {
  Row row(weight, n);
  int64_t k = 0;
  for (; k + kCoded <= weight.K; k += kCoded) {
    Words four[4];
    row.take(k, four);
    std::memcpy(y + k, four, sizeof four);
  }
  std::memcpy(y + k, row.rest(), (weight.K - k) * sizeof(BFloat16));
}

void lossless_rows(const BFloat16* x, int64_t M, const Linear& weight, BFloat16* y, int64_t begin, int64_t end,
                   int64_t width) {
  if (M == 1) {
    for (int64_t n = begin; n < end; n++) y[n] = dot(weight, n, x);
    return;
  }
  static thread_local Lines<BFloat16> room;
  for (int64_t n = begin; n < end; n += kUnpackedRows) {
    const int64_t count = std::min(kUnpackedRows, end - n);
    matvec_rows(x, M, plain_rows(weight, n, count, room), y + n, 0, count, width, weight.K);
  }
}

int64_t qwen3fast_plan_lossless(const BFloat16* weight, int64_t N, int64_t K, void* records, int64_t threads) {
  auto* const record = static_cast<RowRecord*>(records);
  parallel_for(N, std::max<int64_t>(1, 65536 / K), threads, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; n++) {
      const BFloat16* row = weight + n * K;
      const int64_t coded = K / kCoded * kCoded;
      const int base = best_base(row, coded);
      const auto is_exception = [base](BFloat16 number) { return code_of(number, base) < 0; };
      const auto exceptions = std::count_if(row, row + coded, is_exception);
      record[n] = {0, static_cast<uint16_t>(exceptions), static_cast<uint16_t>(base << kFractionBits)};
    }
  });
  int64_t total = 0;
  for (int64_t n = 0; n < N; total += record[n++].count)
    record[n].first = static_cast<int32_t>((N - n) * int64_t{sizeof(RowRecord) / sizeof(Exception)} + total);
  return total;
}

void qwen3fast_pack_lossless(const BFloat16* weight, int64_t N, int64_t K, void* records, uint8_t* packed,
                             int64_t threads) {
  const int64_t coded = K / kCoded * kCoded;
  parallel_for(N, std::max<int64_t>(1, 65536 / K), threads, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; n++) {
      const BFloat16* row = weight + n * K;
      auto* const record = static_cast<RowRecord*>(records) + n;
      auto* exception = reinterpret_cast<Exception*>(record) + record->first;
      uint8_t* to = packed + n * lossless_bytes(K);
      for (int64_t k = 0; k < coded; k += kCoded, to += kCodedBytes) {
        uint16_t words[4][kWords];
        for (int64_t i = 0; i < kCoded; i++) {
          const BFloat16 number = row[k + i];
          const int code = code_of(number, record->base >> kFractionBits);
          if (code < 0) *exception++ = {static_cast<uint16_t>(k + i), number};
          words[i / kWords][i % kWords] =
              static_cast<uint16_t>(std::max(code, 0) | number.bits >> 15 << kCodeBits | (number.bits & 0x7f) << 5);
        }
        for (int64_t i = 0; i < kWords; i++)
          for (int j = 0; j < 3; j++) words[j][i] |= static_cast<uint16_t>((words[3][i] >> 4 * j & 15) << 12);
        std::memcpy(to, words, kCodedBytes);
      }
      std::memcpy(to, row + coded, (K - coded) * sizeof(BFloat16));
    }
  });
}
