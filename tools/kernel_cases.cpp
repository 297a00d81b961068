// Runs the C++ operations on inputs from a file and compares them with expected results: for processors that Python and
// PyTorch are not at hand for, under emulation. tools/check_cpu_levels.py writes the file and starts this program.
//
//   case:  operation (8 bytes, padded by zeros), count of integers, the integers, count of arrays, the arrays, expected
//   array: size in bytes, bytes. All counts, sizes and integers are int64. Results and expected are bfloat16.

#include <cmath>
#include <cstdio>
#include <fstream>
#include <string>
#include <vector>

#include "../qwen3fast/kernels/cpu/ops.h"

namespace {

std::ifstream file;

int64_t read_int() {
  int64_t value = 0;
  file.read(reinterpret_cast<char*>(&value), sizeof value);
  return value;
}

std::vector<char> read_array() {
  std::vector<char> bytes(read_int());
  file.read(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  return bytes;
}

template <typename T>
T* as(std::vector<char>& bytes) {
  return bytes.empty() ? nullptr : reinterpret_cast<T*>(bytes.data());
}

// Integers are the last arguments of each operation: M, N, K, bits, span and record for a quantized product.
bool run(const std::string& name, const std::vector<int64_t>& n, std::vector<std::vector<char>>& a, BFloat16* y) {
  if (name == "plain") {
    qwen3fast_linear(as<BFloat16>(a[0]), as<BFloat16>(a[1]), y, n[0], n[1], n[2], 1);
  } else if (name == "gated") {
    qwen3fast_gated_linear(as<BFloat16>(a[0]), as<BFloat16>(a[1]), as<BFloat16>(a[2]), y, n[0], n[1], n[2], 1);
  } else if (name == "linear" || name == "tiles" || name == "tiles8") {
    const Linear weight{as<void>(a[1]), as<void>(a[2]), n[1], n[2], n[3], n[4], n[5]};
    const BFloat16* x = as<BFloat16>(a[0]);
    if (name == "linear")
      qwen3fast_quantized_linear(x, &weight, 1, y, n[0], 1);
    else
      qwen3fast_tile_linear(x, &weight, 1, y, n[0], name == "tiles" ? kBFloat16Tiles : kInt8Tiles, 1);
  } else if (name == "decode" || name == "prefill" || name == "tiledpre") {
    const Cache cache{as<void>(a[1]), as<void>(a[2]), as<float>(a[3]), as<float>(a[4])};
    const BFloat16* q = as<BFloat16>(a[0]);
    const int64_t* position = as<int64_t>(a[5]);
    qwen3fast_use_tiles(name == "tiledpre");
    if (name == "decode")
      qwen3fast_decode_attention(q, &cache, position, y, n[0], n[1], n[2], n[3], n[4], 1);
    else
      qwen3fast_prefill_attention(q, &cache, position, as<int64_t>(a[6]), y, n[0], n[1], n[2], n[3], n[4], n[5], 1);
  } else {
    return false;
  }
  return true;
}

}  // namespace

int main(int, char** arguments) {
  file.open(arguments[1], std::ios::binary);
  int failed = 0, cases = 0;
  for (char name[9] = {}; file.read(name, 8); cases++) {
    std::vector<int64_t> integers(read_int());
    for (int64_t& integer : integers) integer = read_int();
    std::vector<std::vector<char>> arrays(read_int());
    for (auto& array : arrays) array = read_array();
    std::vector<char> expected_bytes = read_array();
    const auto* expected = as<BFloat16>(expected_bytes);
    std::vector<BFloat16> y(expected_bytes.size() / sizeof(BFloat16));
    if (!run(name, integers, arrays, y.data())) return std::printf("no operation %s\n", name), 2;
    float largest = 0, error = 0;
    bool is_finite = true;
    for (size_t i = 0; i < y.size(); i++) {
      largest = std::fmax(largest, std::fabs(float(expected[i])));
      error = std::fmax(error, std::fabs(float(y[i]) - float(expected[i])));
      is_finite = is_finite && std::isfinite(float(y[i]));
    }
    const bool is_right = is_finite && error <= 2e-2f * largest;
    std::printf("%-8s case %d: largest error %.2g of %.3g, %s\n", name, cases, error, largest, is_right ? "ok" : "WRONG");
    failed += !is_right;
  }
  std::printf("%d cases, %d wrong\n", cases, failed);
  return failed || cases == 0;
}
