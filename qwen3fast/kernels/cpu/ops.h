// The functions that Python calls by ctypes (ops.py, decode_layers.py, decode_step.py, sampler.py). PyTorch's C++ headers are
// not needed: they would take longer to compile than all of this. Shapes, types and layouts are checked in Python; every
// array is contiguous.
// `threads`: the number of threads that may be used.
//
//   B batch   T tokens   H query heads   K key/value heads   G = H/K   D head_dim   R cache rows   S cache positions
//   X experts   C active experts per token

#pragma once

#include <cstdint>

#include "vec.h"

#define QWEN3FAST_API extern "C" __attribute__((visibility("default")))

// Weights (N, K): bits 16, bfloat16; 12, the same packed as lossless.h describes; 8 or 4 to 6, as quantized.cpp or
// fp8.cpp describes. span: of weights whose scales are in records, and of fp8, the channels of one, otherwise 0.
// record: its bytes, for 16 rows; of int4 with scales in bytes, 16. order (K,): the input's channel that each column is for,
// or null for the same; only decode_layers.cpp and experts.h read it. Of experts' gate and up: (X, 2, K).
struct Linear {
  const void *weight, *scale;
  int64_t N, K, bits, span, record;
  const int32_t* order;
};

// The cache of keys and values: (R, K, S, D) bfloat16, or int8 with scales (R, K, S) float32 (null for bfloat16).
struct Cache {
  void *keys, *values;
  float *key_scale, *value_scale;
};

// One transformer block. Norms: bfloat16. With experts, `router` (X, E) is bfloat16, `gate` holds X weights (2I, E), gate
// before up, one below the other, `down` X weights (E, I), both packed, and there is no `up`; without, router.weight is null.
struct Layer {
  const BFloat16 *input_norm, *q_norm, *k_norm, *post_norm;
  Linear q, k, v, o, gate, up, down, router;
  int64_t chosen, renormalizes;  // C; whether their shares are made to sum to one
  Cache cache;
};

// The matrices of all adapter slots beside a weight (N, K): a (slots, rank, K), b (slots, rank, N).
struct LowRank {
  const BFloat16 *a, *b;
};

// Adapters beside the weights of all layers, seven per layer in the order of Layer. slot (M,): of each row; 0 for none.
struct Adapters {
  const LowRank* weights;
  const int64_t* slot;
  int64_t rank;
};

// Sampling parameters of rows, (M,): SamplerRows of sampling/samplers.py.
struct Sampling {
  const float* temperature;
  const int64_t* top_k;
  const float *top_p, *min_p;
  const int64_t *seed, *step;
};

// Parameters and counts of logits processors: ProcessorRows of sampling/processors.py.
struct Processing {
  const float *repetition, *presence, *frequency;  // (M,)
  const uint8_t* in_prompt;                        // (M, V)
  const int32_t* count;                            // the same
  const float* bias;                               // the same
  const int32_t* allowed;                          // (M, V/32), rounded up: a bit per token
};

// What a decode step has beside its blocks. embedding (V, E): its rows input (M,) are what the first block reads. norm,
// head (V, E): of the logits. end: the first position beyond the cache. The others are (M,), see qwen3fast_decode_step.
struct Ends {
  Linear embedding, head;
  const BFloat16* norm;
  int64_t *input, *position, *output, *step;
  const int64_t* advance;
  int64_t end;
};

struct Sizes {
  int64_t M, E, H, K, D, S;  // rows, hidden, query heads, key/value heads, head_dim, positions
  float eps;
};

// y[m, n] = sum_k x[m, k] weight[n, k]: x (M, K), weight (N, K), y (M, N), K a multiple of 16.
QWEN3FAST_API void qwen3fast_linear(const BFloat16* x, const BFloat16* weight, BFloat16* y, int64_t M, int64_t N,
                                    int64_t K, int64_t threads);

// y[m, n] as of qwen3fast_linear, for any M and packed weights of the same K; y (M, all N together) holds their results side by side.
QWEN3FAST_API void qwen3fast_quantized_linear(const BFloat16* x, const Linear* weights, int64_t count, BFloat16* y,
                                              int64_t M, int64_t threads);

// Whether products are made by tiles (tiles.cpp), in bfloat16, or in int8 where the weight has 4 to 8 bits, is not fp8, and K
// is a multiple of 64.
enum Tiles : int64_t { kNoTiles, kBFloat16Tiles, kInt8Tiles };

// The same by tiles: for many rows, and also for weights in bfloat16. N multiples of 16, K of 32.
QWEN3FAST_API void qwen3fast_tile_linear(const BFloat16* x, const Linear* weights, int64_t count, BFloat16* y, int64_t M,
                                         Tiles tiles, int64_t threads);

// Returns whether this processor has tiles, and the system lets this process use them: tried in a process of its own. Call
// it before the first product by tiles.
QWEN3FAST_API bool qwen3fast_try_tiles();

// y[r, k] = weight[row[r], k]: row (R,), y (R, K). Returns false for a row that there is not.
QWEN3FAST_API bool qwen3fast_quantized_rows(const Linear* weight, const int64_t* row, BFloat16* y, int64_t R,
                                            int64_t threads);

// Quantizes a weight (N, K), N a multiple of 16 and K of 32, to 8 or 4 bits: see quantized.cpp for packed and scale.
QWEN3FAST_API void qwen3fast_quantize_weight(const BFloat16* weight, int64_t N, int64_t K, int64_t bits, uint8_t* packed,
                                          void* scale, int64_t threads);

// Writes the scales of int4, (blocks, groups, 16), in bytes, (blocks, 1 + groups, 16): see ByteScales. Returns whether they
// are the same numbers; otherwise the bytes mean nothing.
QWEN3FAST_API bool qwen3fast_pack_scales(const BFloat16* scale, int64_t blocks, int64_t groups, int8_t* bytes,
                                         int64_t threads);

// Packs a weight (N, K), N a multiple of 16 and K of 64, in 12 bits per number: see lossless.h. The first function writes
// the records of rows, and returns the number of exceptions; the second needs room for them behind the records.
QWEN3FAST_API int64_t qwen3fast_plan_lossless(const BFloat16* weight, int64_t N, int64_t K, void* records,
                                              int64_t threads);
QWEN3FAST_API void qwen3fast_pack_lossless(const BFloat16* weight, int64_t N, int64_t K, void* records, uint8_t* packed,
                                           int64_t threads);

// The output of each expert for its tokens, down(silu(gate(x)) * up(x)): x (N, E), expert (N, C) -> y (N, C, E). gate_up holds
// X weights (2I, E) one below the other, gate before up; down X weights (E, I); both packed. Returns
// false, with y unfinished, for an expert that there is not.
QWEN3FAST_API bool qwen3fast_quantized_experts(const BFloat16* x, const int64_t* expert, const Linear* gate_up,
                                               const Linear* down, BFloat16* y, int64_t N, int64_t C,
                                               int64_t threads);

// q (B, 1, H, D), position (B,) -> y (B, H, 1, D). D a multiple of 32.
QWEN3FAST_API void qwen3fast_decode_attention(const BFloat16* q, const Cache* cache, const int64_t* position, BFloat16* y,
                                              int64_t B, int64_t H, int64_t K, int64_t S, int64_t D, int64_t threads);

// q (B, T, H, D), position (B, T), row (B,), the cache row of each batch row -> y (B, T, H, D). D a multiple of 32.
// tiles_from: batch rows whose last query sees so many positions are multiplied by tiles.
QWEN3FAST_API void qwen3fast_prefill_attention(const BFloat16* q, const Cache* cache, const int64_t* position,
                                               const int64_t* row, BFloat16* y, int64_t B, int64_t T, int64_t H,
                                               int64_t K, int64_t S, int64_t D, int64_t tiles_from, int64_t threads);

// All blocks for chunks of prompts, in place of x (B, T, E): position (B, T), row (B,), the cache row of each batch row; in
// sizes, M is B T. last (B,): the only token of each batch row whose result is needed; null for all. tiles: of products;
// tiles_from: of attention. B T at least 8, otherwise sizes as of decode_layers. Only experts have orders of channels.
QWEN3FAST_API void qwen3fast_prefill_layers(const Layer* layers, int64_t count, const Sizes* sizes, const float* cos,
                                            const float* sin, const int64_t* position, const int64_t* row, int64_t T,
                                            const int64_t* last, BFloat16* x, Tiles tiles, int64_t tiles_from,
                                            int64_t threads);

// All blocks of a decode step, in place of x (M, E); cos, sin (positions, D); position (M,), -1 for an empty row. Sizes
// as in sizes, E and I multiples of 16 (of 32 for packed weights), D of 32. adapters: null for none. tiles: whether
// weights in bfloat16 are multiplied by tiles, where K is a multiple of 32. Returns the share of the time, 0 to 1, for which
// a thread, the one that it happened to most, was off its processor.
QWEN3FAST_API double qwen3fast_decode_layers(const Layer* layers, int64_t count, const Sizes* sizes, const float* cos,
                                             const float* sin, const int64_t* position, BFloat16* x,
                                             const Adapters* adapters, Tiles tiles, int64_t threads);

// A whole decode step, arguments as of decode_layers. With logits (M, V) it writes these. Without, it chooses a token per
// row as qwen3fast_sample does, writes it to output, and to input (0 for -1), and adds advance to position and step. Returns
// the same; -1, with nothing done, for a token or position that does not exist.
QWEN3FAST_API double qwen3fast_decode_step(const Layer* layers, int64_t count, const Sizes* sizes, const float* cos,
                                           const float* sin, const Ends* ends, const Adapters* adapters,
                                           const Sampling* sampling, float* logits, Tiles tiles,
                                           int64_t threads);

// A token for each row: logits (M, V), token (M,); -1 where the logits hold NaN or infinity, or only -infinity. sampling:
// null for greedy.
QWEN3FAST_API void qwen3fast_sample(const float* logits, const Sampling* sampling, int64_t* token, int64_t M, int64_t V,
                                    int64_t threads);

// y (M, V): the logits (M, V) after penalties, bias and mask.
QWEN3FAST_API void qwen3fast_process_logits(const float* logits, const Processing* rows, float* y, int64_t M, int64_t V,
                                            int64_t threads);
