// Runs the C++ operations on inputs from a file, with 1, 2 and 3 threads, and compares them with expected results: for
// processors that Python and PyTorch are not at hand for, under emulation. tools/check_cpu_levels.py writes the file and
// starts this program.
//
//   case:  operation (8 bytes, padded by zeros), count of integers, the integers, count of arrays, the arrays, expected
//   array: size in bytes, a mark, bytes. Marked 1, it is a structure of ops.h, of words of 64 bits: one with kAddress in its
//          upper half stands for the address of the array of this number.
//   expected: an array of bfloat16, marked by the largest error in thousandths of the largest number; marked 0, of any type,
//          and results must be the same bytes.
//   All counts, sizes and integers are int64.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <string>
#include <vector>

#include "../qwen3fast/kernels/cpu/ops.h"

namespace {

constexpr int64_t kAddress = 0x51a7e001;
#ifdef __AMX_TILE__
constexpr bool kHasTiles = true;
#else
constexpr bool kHasTiles = false;
#endif

struct Array {
  std::vector<char> bytes;
  int64_t mark;

  template <typename T>
  T* as() {
    return bytes.empty() ? nullptr : reinterpret_cast<T*>(bytes.data());
  }
  template <typename T>
  int64_t count() const {
    return static_cast<int64_t>(bytes.size() / sizeof(T));
  }
};

struct Case {
  std::vector<int64_t> n;
  std::vector<Array> a;
  int64_t threads;
};

std::ifstream file;

int64_t read_int() {
  int64_t value = 0;
  file.read(reinterpret_cast<char*>(&value), sizeof value);
  return value;
}

Array read_array() {
  Array array{std::vector<char>(read_int()), read_int()};
  file.read(array.bytes.data(), array.count<char>());
  return array;
}

Case read_case() {
  Case c{std::vector<int64_t>(read_int()), {}, 0};
  for (int64_t& integer : c.n) integer = read_int();
  c.a.resize(read_int());
  for (Array& array : c.a) array = read_array();
  for (Array& array : c.a)
    for (int64_t i = 0; array.mark && i < array.count<int64_t>(); i++)
      if (int64_t& word = array.as<int64_t>()[i]; word >> 32 == kAddress)
        word = reinterpret_cast<int64_t>(c.a[word & 0xffffffff].bytes.data());
  return c;
}

// Arrays of all cases of whole blocks, in this order: layers, sizes, cosines, sines, x (B, T, E).
// Runs x in place: `chunk` tokens of each row at a time by prefill_layers, the rest one by one by decode_layers.
// last: see prefill_layers.
void run_blocks(Case& c, int64_t B, int64_t T, int64_t chunk, Tiles tiles, const int64_t* last) {
  Sizes sizes = *c.a[1].as<Sizes>();
  const int64_t E = sizes.E, count = c.a[0].count<Layer>();
  const auto *layers = c.a[0].as<Layer>();
  const float *cos = c.a[2].as<float>(), *sin = c.a[3].as<float>();
  auto* const x = c.a[4].as<BFloat16>();
  const int64_t tiles_from = tiles ? 0 : INT64_MAX;
  for (int64_t first = 0, length; first < T; first += length) {
    length = T - first < chunk ? 1 : chunk;
    sizes.M = B * length;
    std::vector<BFloat16> part(sizes.M * E);
    std::vector<int64_t> position(sizes.M), row(sizes.M);
    const auto token = [&](int64_t m) { return x + (row[m] * T + position[m]) * E; };
    for (int64_t m = 0; m < sizes.M; m++) {
      row[m] = m / length, position[m] = first + m % length;
      std::copy_n(token(m), E, &part[m * E]);
    }
    std::vector<int64_t> rows(B);
    for (int64_t b = 0; b < B; b++) rows[b] = b;
    if (length > 1)
      qwen3fast_prefill_layers(layers, count, &sizes, cos, sin, position.data(), rows.data(), length, last, part.data(), tiles,
                               tiles_from, c.threads);
    else
      qwen3fast_decode_layers(layers, count, &sizes, cos, sin, position.data(), part.data(), nullptr, tiles, c.threads);
    for (int64_t m = 0; m < sizes.M; m++) std::copy_n(&part[m * E], E, token(m));
  }
}

// Runs a whole step at the last position of each row, for its logits, and for tokens, greedy and sampled, which must be
// the ones that qwen3fast_sample chooses from these logits. Returns whether they are.
bool run_step(Case& c, int64_t B, Tiles tiles, BFloat16* y) {
  Sizes sizes = *c.a[1].as<Sizes>();
  sizes.M = B;
  const auto* ends = c.a[5].as<Ends>();
  const int64_t V = ends->head.N;
  std::vector<float> logits(B * V);
  const auto step = [&](const Sampling* sampling, float* logits) {
    return qwen3fast_decode_step(c.a[0].as<Layer>(), c.a[0].count<Layer>(), &sizes, c.a[2].as<float>(), c.a[3].as<float>(),
                                 ends, nullptr, sampling, logits, tiles, c.threads) >= 0;
  };
  bool is_right = step(nullptr, logits.data());
  for (int64_t i = 0; i < B * V; i++) y[i] = BFloat16(logits[i]);
  for (const auto* sampling : {static_cast<const Sampling*>(nullptr), static_cast<const Sampling*>(c.a[6].as<Sampling>())}) {
    std::vector<int64_t> token(B), input(ends->input, ends->input + B);
    qwen3fast_sample(logits.data(), sampling, token.data(), B, V, c.threads);
    is_right = step(sampling, nullptr) && std::equal(token.begin(), token.end(), ends->output) && is_right;
    std::copy(input.begin(), input.end(), ends->input);
  }
  return is_right;
}

// Returns false where there is no such operation, or it says that something is wrong.
bool run(const std::string& name, Case& c, void* result) {
  const auto& n = c.n;
  auto& a = c.a;
  const int64_t threads = c.threads;
  auto* const y = static_cast<BFloat16*>(result);
  const auto* x = a[0].as<BFloat16>();
  const auto* linear = a.size() > 1 ? a[1].as<Linear>() : nullptr;
  if (name == "plain") {
    qwen3fast_linear(x, a[1].as<BFloat16>(), y, n[0], n[1], n[2], threads);
  } else if (name == "linear") {
    qwen3fast_quantized_linear(x, linear, 1, y, n[0], threads);
  } else if (name == "tiles" || name == "tiles8") {
    qwen3fast_tile_linear(x, linear, 1, y, n[0], name == "tiles" ? kBFloat16Tiles : kInt8Tiles, threads);
  } else if (name == "rows") {
    return qwen3fast_quantized_rows(linear, a[0].as<int64_t>(), y, n[0], threads);
  } else if (name == "decode") {
    qwen3fast_decode_attention(x, a[1].as<Cache>(), a[2].as<int64_t>(), y, n[0], n[1], n[2], n[3], n[4], threads);
  } else if (name == "prefill" || name == "tiledpre") {
    qwen3fast_prefill_attention(x, a[1].as<Cache>(), a[2].as<int64_t>(), a[3].as<int64_t>(), y, n[0], n[1], n[2], n[3], n[4],
                                n[5], name == "tiledpre" ? 0 : INT64_MAX, threads);
  } else if (name == "blocks" || name == "last" || name == "step") {
    const int64_t B = n[0], T = n[1], E = a[1].as<Sizes>()->E;
    const std::vector<int64_t> last(B, T - 1);
    run_blocks(c, B, T, n[2], static_cast<Tiles>(n[3]), name == "last" ? last.data() : nullptr);
    if (name == "step") return run_step(c, B, static_cast<Tiles>(n[3]), y);
    const int64_t count = name == "last" ? 1 : T;  // tokens of a row that are compared
    for (int64_t b = 0; b < B; b++) std::copy_n(a[4].as<BFloat16>() + ((b + 1) * T - count) * E, count * E, y + b * count * E);
  } else if (name == "sample") {
    qwen3fast_sample(a[0].as<float>(), a[1].as<Sampling>(), static_cast<int64_t*>(result), n[0], n[1], threads);
  } else if (name == "process") {
    qwen3fast_process_logits(a[0].as<float>(), a[1].as<Processing>(), static_cast<float*>(result), n[0], n[1], threads);
  } else if (name == "quantize") {  // n: N, K, bits; the result is packed, and behind it scales
    auto* const packed = static_cast<uint8_t*>(result);
    qwen3fast_quantize_weight(x, n[0], n[1], n[2], packed, packed + n[0] * n[1] * n[2] / 8, threads);
  } else if (name == "scales") {
    return qwen3fast_pack_scales(x, n[0], n[1], static_cast<int8_t*>(result), threads);
  } else if (name == "lossless") {  // the result is records, and behind them packed
    auto* const records = static_cast<uint8_t*>(result);
    const int64_t exceptions = qwen3fast_plan_lossless(x, n[0], n[1], records, threads);
    qwen3fast_pack_lossless(x, n[0], n[1], records, records + 8 * n[0] + 4 * exceptions, threads);
  } else {
    return false;
  }
  return true;
}

// Returns whether a result is right. error, largest: of bfloat16.
bool compare(const Array& expected, const std::vector<BFloat16>& y, float& error, float& largest) {
  const char* const bytes = reinterpret_cast<const char*>(y.data());
  if (!expected.mark) return std::equal(expected.bytes.begin(), expected.bytes.end(), bytes);
  const auto* numbers = reinterpret_cast<const BFloat16*>(expected.bytes.data());
  bool is_finite = true;
  for (size_t i = 0; i < y.size(); i++) {
    largest = std::fmax(largest, std::fabs(float(numbers[i])));
    error = std::fmax(error, std::fabs(float(y[i]) - float(numbers[i])));
    is_finite = is_finite && std::isfinite(float(y[i]));
  }
  return is_finite && error <= 1e-3f * float(expected.mark) * largest;
}

}  // namespace

int main(int, char** arguments) {
  file.open(arguments[1], std::ios::binary);
  int failed = qwen3fast_try_tiles() != kHasTiles, cases = 0;
  for (char name[9] = {}; file.read(name, 8); cases++) {
    Case c = read_case();
    const Array expected = read_array();
    const std::vector<Array> fresh = c.a;
    for (c.threads = 1; c.threads <= 3; c.threads++) {
      for (size_t i = 0; i < fresh.size(); i++) std::copy(fresh[i].bytes.begin(), fresh[i].bytes.end(), c.a[i].bytes.begin());
      std::vector<BFloat16> y((expected.bytes.size() + 1) / sizeof(BFloat16));
      float error = 0, largest = 0;
      const bool is_right = run(name, c, y.data()) && compare(expected, y, error, largest);
      if (!is_right || c.threads == 3)
        std::printf("%-8s case %d, %d threads: largest error %.2g of %.3g, %s\n", name, cases, int(c.threads), error, largest,
                    is_right ? "ok" : "WRONG");
      failed += !is_right;
    }
  }
  failed += qwen3fast_try_tiles() != kHasTiles;  // also where threads have been started
  std::printf("%d cases, %d wrong\n", cases, failed);
  return failed || cases == 0;
}
