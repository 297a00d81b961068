// The experts that a router chose, with weights in 8 or 4 bits; see quantized.cpp for the products.
//
// Pairs of a token and an expert are sorted by expert: the weights of an active expert are read once, other weights not
// at all. Threads start once and meet at barriers. A token's result does not depend on the tokens beside it.
//
//   N tokens   C experts per token   P = N * C pairs   X experts   E hidden size   I intermediate size

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "ops.h"
#include "parallel.h"
#include "products.h"

namespace {

constexpr int64_t kReading = 2;      // rows that a block of weights could be multiplied with while it is read
constexpr int64_t kGrain = 1 << 15;  // multiplications that a thread is woken for

// The pairs of one expert, from `first` on in the sorted order; their rows, quantized.
struct Group {
  int64_t expert, first, count;
  Activations x, inner;
};

// Pairs sorted by expert. Returns an empty order if there is a number that is no expert's.
std::vector<int64_t> sorted_pairs(const int64_t* expert, int64_t P, int64_t X, std::vector<int64_t>& counts) {
  for (int64_t p = 0; p < P; p++) {
    if (expert[p] < 0 || expert[p] >= X) return {};
    counts[expert[p]]++;
  }
  std::vector<int64_t> next(X), order(P);
  for (int64_t e = 1; e < X; e++) next[e] = next[e - 1] + counts[e - 1];
  for (int64_t p = 0; p < P; p++) order[next[expert[p]]++] = p;
  return order;
}

// Calls work(group, row of the group, pair in the sorted order) for this thread's share of the pairs.
template <typename Work>
void share_pairs(std::vector<Group>& groups, int64_t P, int thread, int threads, const Work& work) {
  const int64_t begin = P * thread / threads, end = P * (thread + 1) / threads;
  for (Group& group : groups)
    for (int64_t p = std::max(begin, group.first); p < std::min(end, group.first + group.count); p++)
      work(group, p - group.first, p);
}

// Multiplies this thread's share of the blocks of all groups: y (P, N) = rows of the groups times their experts' weights,
// (N, K) each. Calls done(group, first column, column after the last) for each part of the result.
template <typename Done>
void share_blocks(const std::vector<Group>& groups, Activations Group::*rows, const Linear& all, int64_t X, BFloat16* y,
                  int thread, int threads, const Done& done) {
  const int64_t N = all.N / X, blocks = N / kLanes;
  const int64_t bytes = N * all.K * all.bits / 8, scales = scale_bytes(all, N);  // an expert's
  int64_t total = 0, before = 0;
  for (const Group& group : groups) total += (group.count + kReading) * blocks;
  for (const Group& group : groups) {
    const int64_t cost = group.count + kReading;
    const auto block = [&](int64_t work) {
      return std::clamp<int64_t>((work - before + cost - 1) / cost, 0, blocks);
    };
    const int64_t begin = block(total * thread / threads), end = block(total * (thread + 1) / threads);
    Linear weight = all;
    weight.weight = static_cast<const uint8_t*>(all.weight) + group.expert * bytes;
    weight.scale = static_cast<const uint8_t*>(all.scale) + group.expert * scales;
    if (begin < end) {
      packed_blocks(group.*rows, group.count, weight, y + group.first * N, begin, end, N);
      done(group, begin * kLanes, end * kLanes);
    }
    before += cost * blocks;
  }
}

}  // namespace

bool qwen3fast_quantized_experts(const BFloat16* x, const int64_t* expert, const Linear* gate_up, const Linear* down,
                                 BFloat16* y, int64_t N, int64_t C, int64_t X, int64_t threads) {
  const int64_t P = N * C, E = gate_up->K, I = down->K;
  std::vector<int64_t> counts(X);
  const std::vector<int64_t> order = sorted_pairs(expert, P, X, counts);
  if (order.empty()) return P == 0;
  std::vector<Group> groups;
  for (int64_t e = 0, first = 0; e < X; first += counts[e++])
    if (counts[e] > 0) groups.push_back({e, first, counts[e], Activations(counts[e], E), Activations(counts[e], I)});
  const auto inner = std::make_unique_for_overwrite<BFloat16[]>(P * 2 * I);  // gate, then up, of each pair
  const auto sorted = std::make_unique_for_overwrite<BFloat16[]>(P * E);
  threads = std::clamp<int64_t>(P * I * E / kGrain, 1, threads);
  Barrier barrier;
#pragma omp parallel num_threads(threads)
  {
#pragma omp single
    barrier.threads = omp_get_num_threads();  // OpenMP may give fewer than asked for
    const int thread = omp_get_thread_num(), given = omp_get_num_threads();
    share_pairs(groups, P, thread, given, [&](Group& group, int64_t row, int64_t p) {
      group.x.quantize_row(x + order[p] / C * E, row, E);
    });
    barrier.wait();
    share_blocks(groups, &Group::x, *gate_up, X, inner.get(), thread, given, [](const Group&, int64_t, int64_t) {});
    barrier.wait();
    share_pairs(groups, P, thread, given, [&](Group& group, int64_t row, int64_t p) {
      BFloat16* gate = inner.get() + p * 2 * I;
      gate_values(gate, gate + I, I);
      group.inner.quantize_row(gate, row, I);
    });
    barrier.wait();
    share_blocks(groups, &Group::inner, *down, X, sorted.get(), thread, given,
                 [&](const Group& group, int64_t begin, int64_t end) {
                   for (int64_t p = group.first; p < group.first + group.count; p++)
                     std::copy_n(sorted.get() + p * E + begin, end - begin, y + order[p] * E + begin);
                 });
  }
  return true;
}
