"""The samplers of a step: for each row one draw from the logits that top-k, top-p and min-p keep, in 18 kernels.

Top-k and top-p both ask for the largest score that so many tokens, or so much probability, reach. Scores are not
positive, so the bits of -score have the scores' order: a radix search finds the threshold, 4 bits in each pass. A
program sums its part of the vocabulary by digit, by comparing, without atomics; the programs of the next pass add up
these sums. Weights are integers: no order of addition changes a threshold.

    B rows   V vocabulary   C programs of a row
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen3fast.kernels.cuda.decode_step.launch import launch, start_next, wait_for_previous
from qwen3fast.kernels.cuda.decode_step.tail import Best

TOKENS_OF_PROGRAM = 2048
TILE = 128  # tokens that a program sums at a time
BITS = 4  # of a digit
PASSES = 32 // BITS  # for each of the two thresholds

EVERYTHING = tl.constexpr(0x7FFFFFFF)  # bits of -score up to which all tokens are kept


class Draw(NamedTuple):
    """Workspace of `draw`.

    largest: (B, C) float32. state: (2, B, 3) int64, see `narrowed`. sums: (2, B, C, 2^BITS) int64. best: the
    largest noisy score of each program, to be given to `tail.choose`.
    """

    largest: Tensor
    state: Tensor
    sums: Tensor
    best_logit: Tensor
    best_token: Tensor

    @property
    def best(self) -> Best:
        """The programs' choices."""
        return Best(self.best_logit, self.best_token)

    @classmethod
    def allocate(cls, rows: int, vocab_size: int, device: torch.device) -> Draw:
        """Return the workspace for `rows` rows."""
        shape = (rows, triton.cdiv(vocab_size, TOKENS_OF_PROGRAM))
        return cls(
            torch.empty(shape, dtype=torch.float32, device=device),
            torch.zeros(2, rows, 3, dtype=torch.int64, device=device),
            torch.zeros(2, *shape, 2**BITS, dtype=torch.int64, device=device),
            torch.empty(shape, dtype=torch.float32, device=device),
            torch.empty(shape, dtype=torch.int32, device=device),
        )


def draw(
    logits_BV: Tensor,
    temperature_B: Tensor,
    top_k_B: Tensor,
    top_p_B: Tensor,
    min_p_B: Tensor,
    seed_B: Tensor,
    step_B: Tensor,
    work: Draw,
) -> None:
    """Write the largest noisy scores of kept tokens, and which tokens they are, to `work.best`.

    logits_BV: float32, contiguous. The others: the fields of `SamplerRows`; `sample` is the plain form.
    """
    B, V = logits_BV.shape
    C = work.largest.shape[1]
    sizes = {"V": V, "C": C, "WIDTH": triton.next_power_of_2(C), "TOKENS": TOKENS_OF_PROGRAM}
    sizes |= {"BITS": BITS, "PASSES": PASSES}
    device, grid = logits_BV.device, (C, B)
    launch(largest_kernel, grid, logits_BV, work.largest, device=device, V=V, TOKENS=TOKENS_OF_PROGRAM)
    common = (logits_BV, work.largest, work.state, work.sums, temperature_B, top_k_B, top_p_B)
    for index in range(2 * PASSES):
        launch(search_kernel, grid, *common, device=device, **sizes, TILE=TILE, INDEX=index)
    own = (min_p_B, seed_B, step_B, work.best_logit, work.best_token)
    launch(draw_kernel, grid, *common, *own, device=device, **sizes)


def best_of(logits_BV: Tensor, work: Draw) -> None:
    """Write the largest logits, and which tokens they are, to `work.best`; NaN counts as infinity."""
    B, V = logits_BV.shape
    grid = (work.largest.shape[1], B)
    out = (work.best_logit, work.best_token)
    launch(best_kernel, grid, logits_BV, *out, device=logits_BV.device, V=V, TOKENS=TOKENS_OF_PROGRAM)


@triton.jit
def load_logits(logits, r, v, V: tl.constexpr):
    """Return the logits of tokens v of row r; NaN as infinity, and -infinity beyond the vocabulary."""
    logit = tl.load(logits + r.to(tl.int64) * V + v, mask=v < V, other=float("-inf"))
    return tl.where(logit == logit, logit, float("inf"))


@triton.jit
def largest_kernel(logits, largest, V: tl.constexpr, TOKENS: tl.constexpr, DEPENDENT: tl.constexpr):
    """Program (c, r): the largest logit of part c of row r."""
    c, r = tl.program_id(0), tl.program_id(1)
    start_next(DEPENDENT)
    wait_for_previous(DEPENDENT)
    logit = load_logits(logits, r, c * TOKENS + tl.arange(0, TOKENS), V)
    tl.store(largest + r * tl.num_programs(0) + c, tl.max(logit, 0))


@triton.jit
def best_kernel(logits, best_logit, best_token, V: tl.constexpr, TOKENS: tl.constexpr, DEPENDENT: tl.constexpr):
    """Program (c, r): the largest logit of part c of row r and the first token that has it."""
    c, r = tl.program_id(0), tl.program_id(1)
    start_next(DEPENDENT)
    wait_for_previous(DEPENDENT)
    v = c * TOKENS + tl.arange(0, TOKENS)
    logit = load_logits(logits, r, v, V)
    most = tl.max(logit, 0)
    at = r * tl.num_programs(0) + c
    tl.store(best_logit + at, most)
    tl.store(best_token + at, tl.min(tl.where((logit == most) & (v < V), v, V - 1), 0))


@triton.jit
def row_largest(largest, r, C: tl.constexpr, WIDTH: tl.constexpr):
    """Return the largest logit of row r."""
    c = tl.arange(0, WIDTH)
    return tl.max(tl.load(largest + r * C + c, mask=c < C, other=float("-inf")), 0)


@triton.jit
def is_number(x):
    """Return whether x, which is not NaN, is finite."""
    return (x > float("-inf")) & (x < float("inf"))


@triton.jit
def score_bits(logit, most, temperature):
    """Return the scores, 0 for the most likely token, and the bits of -score, which grow as scores fall.

    Scores of a row whose largest logit is no number mean nothing, but are numbers.
    """
    base = tl.where(is_number(most), most, 0.0)
    score = tl.minimum(tl.math.div_rn(logit - base, temperature), 0.0) + 0.0
    return score, (0.0 - score).to(tl.int32, bitcast=True)


@triton.jit
def weight_of(score, bits, kept):
    """Return probabilities in units of 2^-31 of the largest, 0 for tokens beyond the bits `kept`; int64."""
    return tl.where(bits <= kept, (tl.exp(score) * 2147483648.0).to(tl.int64), 0)


@triton.jit
def narrowed(
    state,
    sums,
    r,
    top_k,
    top_p,
    INDEX: tl.constexpr,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    PASSES: tl.constexpr,
):
    """Return the state that pass INDEX begins with: (bits that top-k keeps, leading digits found, target).

    The pass before has stored the state that it began with, and its programs' sums by digit.
    """
    BINS: tl.constexpr = 1 << BITS
    rows = tl.num_programs(1)
    if INDEX == 0:
        kept, found, target = EVERYTHING, 0, top_k
    else:
        before = state + ((INDEX - 1) % 2 * rows + r) * 3
        kept, found, target = tl.load(before), tl.load(before + 1), tl.load(before + 2)
        c, digit = tl.arange(0, WIDTH)[:, None], tl.arange(0, BINS)
        parts = sums + ((INDEX - 1) % 2 * rows + r) * (C * BINS)
        sum_of_digit = tl.sum(tl.load(parts + c * BINS + digit[None, :], mask=c < C, other=0), 0)
        if INDEX == PASSES + 1:  # the first sums of the second search are all there is
            share = tl.ceil(top_p.to(tl.float64) * tl.sum(sum_of_digit, 0).to(tl.float64)).to(tl.int64)
            target = tl.maximum(share, 1)
        reached = tl.cumsum(sum_of_digit, 0)
        next_digit = tl.minimum(tl.sum((reached < target).to(tl.int32), 0), BINS - 1)
        target -= tl.sum(tl.where(digit < next_digit, sum_of_digit, 0), 0)
        found = (found << BITS) | next_digit
        if INDEX == PASSES:
            kept = tl.where(top_k > 0, found, kept)
            found = found * 0
    return kept, found, target


@triton.jit
def search_kernel(
    logits,
    largest,
    state,
    sums,
    temperature,
    top_k,
    top_p,
    V: tl.constexpr,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    BITS: tl.constexpr,
    PASSES: tl.constexpr,
    TILE: tl.constexpr,
    INDEX: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Program (c, r): the sums, by the digit of pass INDEX, of part c of row r: numbers of tokens, then weights."""
    c, r = tl.program_id(0), tl.program_id(1)
    BINS: tl.constexpr = 1 << BITS
    rows = tl.num_programs(1)
    start_next(DEPENDENT)
    wait_for_previous(DEPENDENT)
    heat, k, p = tl.load(temperature + r), tl.load(top_k + r), tl.load(top_p + r)
    kept, found, target = narrowed(state, sums, r, k, p, INDEX, C, WIDTH, BITS, PASSES)
    if c == 0:
        own = state + (INDEX % 2 * rows + r) * 3
        tl.store(own, kept)
        tl.store(own + 1, found)
        tl.store(own + 2, target)
    is_needed = (k > 0) if INDEX < PASSES else (p < 1)
    if is_needed & (heat > 0):
        most = row_largest(largest, r, C, WIDTH)
        shift: tl.constexpr = (PASSES - 1 - INDEX % PASSES) * BITS
        digit = tl.arange(0, BINS)
        total = tl.zeros([BINS, TILE], tl.int32 if INDEX < PASSES else tl.int64)
        for first in range(0, TOKENS, TILE):
            v = c * TOKENS + first + tl.arange(0, TILE)
            score, bits = score_bits(load_logits(logits, r, v, V), most, heat)
            is_candidate = v < V
            if INDEX % PASSES > 0:
                is_candidate = is_candidate & ((bits >> (shift + BITS)) == found)
            is_digit = ((bits >> shift) & (BINS - 1))[None, :] == digit[:, None]
            if INDEX < PASSES:
                total += (is_digit & is_candidate[None, :]).to(tl.int32)
            else:
                total += tl.where(is_digit & is_candidate[None, :], weight_of(score, bits, kept)[None, :], 0)
        parts = sums + ((INDEX % 2 * rows + r) * C + c) * BINS
        tl.store(parts + digit, tl.sum(total, 1).to(tl.int64))


@triton.jit
def draw_kernel(
    logits,
    largest,
    state,
    sums,
    temperature,
    top_k,
    top_p,
    min_p,
    seed,
    step,
    best_logit,
    best_token,
    V: tl.constexpr,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    BITS: tl.constexpr,
    PASSES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Program (c, r): the largest noisy score of part c of row r; of greedy rows, the largest score."""
    c, r = tl.program_id(0), tl.program_id(1)
    start_next(DEPENDENT)
    wait_for_previous(DEPENDENT)
    heat, k, p, least = tl.load(temperature + r), tl.load(top_k + r), tl.load(top_p + r), tl.load(min_p + r)
    kept, found, _ = narrowed(state, sums, r, k, p, 2 * PASSES, C, WIDTH, BITS, PASSES)
    kept = tl.minimum(kept, tl.where(p < 1, found, kept))
    most = row_largest(largest, r, C, WIDTH)
    is_greedy = heat <= 0
    v = c * TOKENS + tl.arange(0, TOKENS)
    logit = load_logits(logits, r, v, V)
    score, bits = score_bits(logit, most, tl.where(is_greedy, 1.0, heat))
    lowest = tl.where(least > 0, tl.log(tl.where(least > 0, least, 1.0)), float("-inf"))
    noisy = score + gumbel_noise(tl.load(seed + r), tl.load(step + r), v)
    noisy = tl.where((bits <= kept) & (score >= lowest), noisy, float("-inf"))
    value = tl.where(is_greedy, score, noisy)
    # Rows without a choice are as invalid as those whose largest logit is no number.
    value = tl.where(v < V, tl.where(is_number(most), value, float("inf")), float("-inf"))
    chosen = tl.max(value, 0)
    at = r * C + c
    tl.store(best_logit + at, chosen)
    tl.store(best_token + at, tl.min(tl.where((value == chosen) & (v < V), v, V - 1), 0))


@triton.jit
def gumbel_noise(seed, step, v):
    """Return the noise of tokens v: `gumbel_noise` of sampling/samplers.py, in arithmetic of 32 bits."""
    low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    first = mix(mix(low) ^ mix(high ^ 0x5BD1E995) ^ mix(step.to(tl.uint32) + 0x3C6EF372))
    second = mix(first ^ 0x2545F491)
    bits = mix(mix(v.to(tl.uint32) + first) ^ second)
    u = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 1 - 5.9604644775390625e-08)
    # -log(1 - u), precise for small u: the logarithm of the rounded 1 - u, corrected for the rounding.
    # Source: N. Higham, Accuracy and Stability of Numerical Algorithms, section 1.14.1.
    rest = 1 - u
    taken = 1 - rest
    exponential = tl.where(taken > 0, -tl.log(rest) * (u / tl.where(taken > 0, taken, 1.0)), u)
    return -tl.log(exponential)


@triton.jit
def mix(x):
    """Return the 32-bit hash `_mix` of sampling/samplers.py."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)
