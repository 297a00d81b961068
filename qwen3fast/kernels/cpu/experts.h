// The experts that a router chooses, with packed weights; see quantized.cpp, fp8.cpp and lossless.cpp for the products.
// Shared by experts.cpp, decode_layers.cpp and prefill_layers.cpp.
//
// Pairs of a token and an expert are sorted by expert: the weights of an active expert are read once, other weights not
// at all. A token's result does not depend on the tokens beside it.
//
//   N tokens   C experts per token   P = N * C pairs   X experts   E hidden size   I intermediate size

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include "ops.h"
#include "parallel.h"
#include "products.h"

namespace {

constexpr int64_t kReading = 2;      // rows that a block of weights could be multiplied with while it is read

// Chooses the C experts of a token by the router's logits (X,): the largest probabilities, the first of equal ones; and their
// shares in the output. C at most X.
inline void choose_experts(const BFloat16* logits, int64_t X, int64_t C, bool renormalizes, int64_t* expert, float* share) {
  constexpr float kTaken = -1;
  Lines<float> chance(X);
  float most = -INFINITY, total = 0, chosen = 0;
  for (int64_t e = 0; e < X; e++) most = std::max(most, float(logits[e]));
  for (int64_t e = 0; e < X; e++) total += chance[e] = std::exp(float(logits[e]) - most);
  for (int64_t c = 0; c < C; c++) {
    int64_t best = -1;  // where all are NaN, any that is left
    for (int64_t e = 0; e < X; e++)
      if (chance[e] != kTaken && (best < 0 || chance[e] > chance[best])) best = e;
    expert[c] = best;
    chosen += share[c] = chance[best] / total;
    chance[best] = kTaken;
  }
  for (int64_t c = 0; renormalizes && c < C; c++) share[c] /= chosen;
}

// Columns begin..end of one token: x += the sum of its experts' outputs, y (C, E), each times its share.
inline void add_chosen(const BFloat16* y, const float* share, int64_t C, int64_t E, int64_t begin, int64_t end, BFloat16* x) {
  for (int64_t i = begin; i < end; i += kLanes) {
    Vec total = {};
    for (int64_t c = 0; c < C; c++) total += load(y + c * E + i) * share[c];
    store(x + i, load(x + i) + round_to_bfloat16(total));
  }
}

// The pairs of one expert, from `first` on in the sorted order; their rows, as weights take them: x for gate and, where up reads its
// input in another order, up's; inner for down. order: of gate's, then of up's input channels; null for none.
struct Group {
  int64_t expert, first, count;
  const int32_t* order;
  bool has_two;  // orders that differ
  Activations x, up, inner;
};

// M rows of K channels, which a weight multiplies.
inline Activations room_for(const Linear& weight, int64_t M, int64_t K) {
  return takes_bfloat16(weight) ? Activations(Lines<BFloat16>(M * K)) : Activations(M, K);
}

// Takes over row m. order: see quantize_row.
inline void take_row(Activations& to, const BFloat16* x, int64_t m, int64_t K, const int32_t* order = nullptr) {
  to.copies.empty() ? to.quantize_row(x, m, K, order) : to.copy_row(x, m, K, order);
}

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
// (N, K) each. rows_of(group, 0 or 1): the rows for the first and for the second half of N. Calls done(group, first column,
// column after the last) for each part of the result.
template <typename RowsOf, typename Done>
void share_blocks(const std::vector<Group>& groups, const RowsOf& rows_of, const Linear& all, int64_t X, BFloat16* y,
                  int thread, int threads, const Done& done) {
  const int64_t N = all.N / X, blocks = N / kLanes;
  const int64_t bytes = weight_bytes(all, N), scales = scale_bytes(all, N);  // an expert's
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
    const int64_t middle = std::clamp(blocks / 2, begin, end);
    packed_blocks(rows_of(group, 0), group.count, weight, y + group.first * N, begin, middle, N);
    packed_blocks(rows_of(group, 1), group.count, weight, y + group.first * N, middle, end, N);
    if (begin < end) done(group, begin * kLanes, end * kLanes);
    before += cost * blocks;
  }
}

// The pairs of some tokens, and the memory that their results need.
class RoutedExperts {
 public:
  // Sorts the pairs. expert: (N, C). Returns false for a number that is no expert's, or in an order no channel's.
  bool plan(const int64_t* expert, int64_t N, int64_t C, const Linear& gate_up, const Linear& down) {
    P_ = N * C, C_ = C, E_ = gate_up.K, I_ = down.K, X_ = down.N / E_;
    std::vector<int64_t> counts(X_);
    groups_.clear();
    order_ = sorted_pairs(expert, P_, X_, counts);
    if (order_.empty()) return P_ == 0;
    for (int64_t e = 0, first = 0; e < X_; first += counts[e++]) {
      if (counts[e] == 0) continue;
      const int32_t* order = gate_up.order ? gate_up.order + 2 * e * E_ : nullptr;
      uint32_t most = 0;  // negative numbers are large ones here
      for (int64_t k = 0; order && k < 2 * E_; k++) most = std::max<uint32_t>(most, order[k]);
      if (most >= E_) return false;
      const bool has_two = order && !std::equal(order, order + E_, order + E_);
      groups_.push_back({e, first, counts[e], order, has_two, room_for(gate_up, counts[e], E_),
                         room_for(gate_up, has_two ? counts[e] : 0, E_), room_for(down, counts[e], I_)});
    }
    inner_ = std::make_unique_for_overwrite<BFloat16[]>(P_ * 2 * I_);
    sorted_ = std::make_unique_for_overwrite<BFloat16[]>(P_ * E_);
    return true;
  }

  // y (N, C, E) = down(silu(gate(x)) * up(x)). All threads call it, and it ends with some results unfinished: they are
  // there when all threads have ended. row_of(n): the address of token n's x, (E,).
  template <typename RowOf>
  void run(const RowOf& row_of, const Linear& gate_up, const Linear& down, BFloat16* y, Barrier& barrier, int thread,
           int threads) {
    share_pairs(groups_, P_, thread, threads, [&](Group& group, int64_t row, int64_t p) {
      take_row(group.x, row_of(order_[p] / C_), row, E_, group.order);
      if (group.has_two) take_row(group.up, row_of(order_[p] / C_), row, E_, group.order + E_);
    });
    barrier.wait();
    const auto inputs = [](const Group& g, int half) -> const Activations& { return half && g.has_two ? g.up : g.x; };
    share_blocks(groups_, inputs, gate_up, X_, inner_.get(), thread, threads, [](const Group&, int64_t, int64_t) {});
    barrier.wait();
    share_pairs(groups_, P_, thread, threads, [&](Group& group, int64_t row, int64_t p) {
      BFloat16* gate = inner_.get() + p * 2 * I_;
      gate_values(gate, gate + I_, I_, gate);
      take_row(group.inner, gate, row, I_);
    });
    barrier.wait();
    const auto inner = [](const Group& g, int) -> const Activations& { return g.inner; };
    share_blocks(groups_, inner, down, X_, sorted_.get(), thread, threads,
                 [&](const Group& group, int64_t begin, int64_t end) {
                   for (int64_t p = group.first; p < group.first + group.count; p++)
                     std::copy_n(sorted_.get() + p * E_ + begin, end - begin, y + order_[p] * E_ + begin);
                 });
  }

 private:
  int64_t P_ = 0, C_ = 0, E_ = 0, I_ = 0, X_ = 0;
  std::vector<int64_t> order_;  // the pair at each place of the sorted order
  std::vector<Group> groups_;
  std::unique_ptr<BFloat16[]> inner_, sorted_;  // (P, 2I), gate, then up; (P, E)
};

}  // namespace
