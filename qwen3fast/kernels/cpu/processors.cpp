// Logits processors. Source of their rules: `process_logits` in sampling/processors.py. Compiled without fused multiplication
// and addition: the same bits.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "ops.h"
#include "parallel.h"
#include "vec.h"

namespace {

constexpr int64_t kBlock = 8192;  // tokens that are worth a thread's turn, a multiple of 32

// The numbers of a row from some token on.
struct Tokens {
  const float* logits;
  const uint8_t* in_prompt;
  const int32_t* count;
  const float* bias;
};

// Sixteen tokens; allowed: a bit per token.
inline Vec process(const Tokens& at, uint32_t allowed, float repetition, float presence, float frequency) {
  Vec x = load(at.logits);
  const Ints count = load_as<Ints>(at.count), is_seen = count > 0;
  const Vec penalized = select(x < 0, x * repetition, x / repetition), bias = load(at.bias);
  const Ints is_penalized = (load(at.in_prompt) != 0) | is_seen;
  if (repetition != 1) x = select(is_penalized, penalized, x);
  x = x - (presence * select(is_seen, fill(1.f), Vec{}) + frequency * convert<Vec>(count));
  x = select(bias == 0, x, x + bias);  // adding 0 would turn -0 into +0
  constexpr uint32_t kLane[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return select((allowed >> load_as<Bits>(kLane) & 1u) != 0, x, x - INFINITY);  // NaN stays
}

}  // namespace

void qwen3fast_process_logits(const float* logits, const Processing* rows, float* y, int64_t M, int64_t V,
                              int64_t threads) {
  const int64_t blocks = (V + kBlock - 1) / kBlock, words = (V + 31) / 32;
  parallel_for(M * blocks, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t m = i / blocks, first = i % blocks * kBlock;
      for (int64_t n = first; n < std::min(first + kBlock, V); n += kLanes) {
        const int64_t at = m * V + n, left = std::min(kLanes, V - n);
        Tokens tokens{logits + at, rows->in_prompt + at, rows->count + at, rows->bias + at};
        float padded_logits[kLanes] = {}, padded_bias[kLanes] = {}, processed[kLanes];
        uint8_t padded_prompt[kLanes] = {};
        int32_t padded_count[kLanes] = {};
        if (left < kLanes) {
          std::copy_n(tokens.logits, left, padded_logits), std::copy_n(tokens.in_prompt, left, padded_prompt);
          std::copy_n(tokens.count, left, padded_count), std::copy_n(tokens.bias, left, padded_bias);
          tokens = {padded_logits, padded_prompt, padded_count, padded_bias};
        }
        const uint32_t allowed = static_cast<uint32_t>(rows->allowed[m * words + n / 32]) >> n % 32;
        const Vec x = process(tokens, allowed, rows->repetition[m], rows->presence[m], rows->frequency[m]);
        if (left == kLanes) {
          store(y + at, x);
        } else {
          store(processed, x);
          std::copy_n(processed, left, y + at);
        }
      }
    }
  });
}
