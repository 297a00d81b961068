"""The samplers: pure tensor functions from logits to token ids, without host synchronization.

Each row has its own parameters, and its noise is a hash of (seed, step, vocabulary index): the same request draws the
same tokens in any row, batch, cache bucket and device. Top-k, top-p and min-p are thresholds on the scores: tokens that
tie with the last one kept are kept as well, as in transformers' top-k.

    B rows   V vocabulary   W window of largest scores
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

WINDOW = 64  # a top_k up to this needs only the 64 largest scores


class SamplerKind(enum.Enum):
    """The samplers. The host chooses one from the parameters of a batch, without reading logits."""

    GREEDY = "greedy"
    WINDOW = "window"
    FULL = "full"


class SamplerRows(NamedTuple):
    """Sampling parameters of B rows: temperature, top_p and min_p in float32; top_k, seed and step in int64.

    step: the number of tokens that the row's request has sampled so far.
    """

    temperature_B: Tensor
    top_k_B: Tensor
    top_p_B: Tensor
    min_p_B: Tensor
    seed_B: Tensor
    step_B: Tensor


def kind_for(params: Iterable[tuple[float, int]]) -> SamplerKind:
    """Return the cheapest sampler that is exact for all of these pairs (temperature, top_k)."""
    sampled = [top_k for temperature, top_k in params if temperature > 0]
    if not sampled:
        return SamplerKind.GREEDY
    return SamplerKind.WINDOW if all(0 < k <= WINDOW for k in sampled) else SamplerKind.FULL


def sample(logits_BV: Tensor, rows: SamplerRows, kind: SamplerKind) -> Tensor:
    """Choose a token for each row: (B,) int64; -1 where the logits hold NaN or +inf, or only -inf.

    In the order of transformers: temperature, top-k, top-p, min-p. The Gumbel-max trick then draws from
    softmax(score), as the argmax of score + noise. Source: Maddison et al., arXiv:1411.0030, section 2.
    """
    logits_BV = logits_BV.float()
    best_B1 = logits_BV.amax(dim=-1, keepdim=True)
    token_B = _first(logits_BV == best_B1)
    if kind is not SamplerKind.GREEDY:
        is_greedy_B = rows.temperature_B <= 0
        temperature_B = torch.where(is_greedy_B, 1.0, rows.temperature_B)
        # The largest score is 0: nothing overflows at small temperatures. Adding 0 turns -0 into +0, which must tie.
        score_BV = (logits_BV - best_B1) / temperature_B[:, None] + 0.0
        find_threshold = _threshold_in_window if kind is SamplerKind.WINDOW else _threshold_in_vocabulary
        threshold_B = torch.maximum(find_threshold(score_BV, rows), rows.min_p_B.log())
        noise_BV = gumbel_noise(rows.seed_B, rows.step_B, logits_BV.shape[-1])
        noisy_BV = torch.where(score_BV >= threshold_B[:, None], score_BV + noise_BV, -math.inf)
        token_B = torch.where(is_greedy_B, token_B, _first(noisy_BV == noisy_BV.amax(dim=-1, keepdim=True)))
    return torch.where(torch.isfinite(best_B1.squeeze(-1)), token_B, -1)  # amax of NaN is NaN


_NOWHERE = 2**31 - 1


def _first(is_it_BV: Tensor) -> Tensor:
    """Return the index of the first True in each row, (B,) int64: an argmax in two steps that Inductor vectorizes.

    `_NOWHERE` is a constant: Inductor makes a dynamic vocabulary size an int64, and Triton 3.6 does not compile a loop
    whose variable is int32 at first and int64 later.
    """
    index_V = torch.arange(is_it_BV.shape[-1], dtype=torch.int32, device=is_it_BV.device)
    return torch.where(is_it_BV, index_V, _NOWHERE).amin(dim=-1).long()


def _threshold_in_window(score_BV: Tensor, rows: SamplerRows) -> Tensor:
    """Return the smallest score that top-k and top-p keep, (B,); exact if 0 < top_k <= WINDOW in all sampled rows."""
    width = min(WINDOW, score_BV.shape[-1])
    window_BW = score_BV.topk(width, dim=-1).values
    index_B = rows.top_k_B.clamp(1, width) - 1
    top_k_threshold_B1 = window_BW.gather(1, index_B[:, None])
    # Scores equal to the k-th are kept as well, also beyond the window: count them in the whole row.
    above_BW = window_BW > top_k_threshold_B1
    ties_B1 = (score_BV >= top_k_threshold_B1).sum(dim=-1, keepdim=True) - above_BW.sum(dim=-1, keepdim=True)
    weight_BW = torch.where(above_BW, window_BW.exp(), 0.0).double()
    total_B1 = weight_BW.sum(dim=-1, keepdim=True) + ties_B1 * top_k_threshold_B1.exp().double()
    # A token is kept while the total probability above it is below p: the token that crosses p is kept.
    mass_before_BW = weight_BW.cumsum(dim=-1) - weight_BW
    kept_BW = above_BW & (mass_before_BW < rows.top_p_B.double()[:, None] * total_B1)
    mass_above_k_B = weight_BW.sum(dim=-1)
    reaches_k_B = (mass_above_k_B < rows.top_p_B.double() * total_B1.squeeze(1)) | (rows.top_p_B >= 1)
    smallest_kept_B = torch.where(kept_BW, window_BW, 0.0).amin(dim=-1)
    return torch.where(reaches_k_B, top_k_threshold_B1.squeeze(1), smallest_kept_B)


def _threshold_in_vocabulary(score_BV: Tensor, rows: SamplerRows) -> Tensor:
    """Return the smallest score that top-k and top-p keep, (B,), for any parameters, without sorting the vocabulary.

    Both thresholds are the largest t for which the total weight of {score >= t} reaches a target. Weights are integers:
    their sum does not depend on the order of addition, and is the same in any batch and on any device.
    """
    key_BV = _ordered_int(score_BV)
    key_of_k_B = _largest_key_reaching(key_BV, torch.ones_like(key_BV), rows.top_k_B)
    key_of_k_B = torch.where(rows.top_k_B > 0, key_of_k_B, 0)
    weight_BV = torch.where(key_BV >= key_of_k_B[:, None], (score_BV.exp() * 2.0**31).to(torch.int64), 0)
    target_B = (rows.top_p_B.double() * weight_BV.sum(dim=-1)).ceil().to(torch.int64).clamp(min=1)
    key_of_p_B = torch.where(rows.top_p_B < 1, _largest_key_reaching(key_BV, weight_BV, target_B), 0)
    kept_BV = key_BV >= torch.maximum(key_of_k_B, key_of_p_B)[:, None]
    return torch.where(kept_BV, score_BV, 0.0).amin(dim=-1)


def _ordered_int(x: Tensor) -> Tensor:
    """Map float32 to int64 from 0 to 2^32 - 1, in the same order (negative floats have their bits in reverse order)."""
    bits = x.view(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64) + 2**31


def _largest_key_reaching(key_BV: Tensor, weight_BV: Tensor, target_B: Tensor) -> Tensor:
    """Return the largest t with sum(weight where key >= t) >= target, (B,); 0 if there is none.

    A radix search: a histogram of the leading 11 bits finds the bin of t; the next bits are searched in that bin.
    """
    found_B = torch.zeros_like(target_B)
    for shift, bits in ((21, 11), (10, 11), (0, 10)):
        is_candidate_BV = (key_BV >> (shift + bits)) == found_B[:, None]
        digit_BV = (key_BV >> shift) & (2**bits - 1)
        histogram_BN = key_BV.new_zeros(key_BV.shape[0], 2**bits + 1)
        histogram_BN = histogram_BN.scatter_add(1, digit_BV, torch.where(is_candidate_BV, weight_BV, 0))
        # The last entry, always 0, is the weight above the largest digit.
        reaching_BN = histogram_BN.flip(-1).cumsum(-1).flip(-1)
        digit_B = ((reaching_BN >= target_B[:, None]).sum(dim=-1) - 1).clamp(0, 2**bits - 1)
        target_B = target_B - reaching_BN.gather(1, digit_B[:, None] + 1).squeeze(1)
        found_B = (found_B << bits) | digit_B
    return found_B


def gumbel_noise(seed_B: Tensor, step_B: Tensor, vocab_size: int) -> Tensor:
    """Return standard Gumbel noise, (B, V) float32, a function of (seed, step, vocabulary index) alone.

    It is -log of an exponential variate -log(1 - u), with u of 32 bits: small u keep their precision in float32, and
    the smallest exponentials win.
    """
    index_V = torch.arange(vocab_size, dtype=torch.int64, device=seed_B.device)
    seed_low, seed_high = seed_B & _MASK, (seed_B >> 32) & _MASK
    first_B = _mix(_mix(seed_low) ^ _mix(seed_high ^ 0x5BD1E995) ^ _mix(step_B + 0x3C6EF372))
    second_B = _mix(first_B ^ 0x2545F491)
    bits_BV = _mix(_mix(index_V + first_B[:, None]) ^ second_B[:, None])
    u_BV = (bits_BV.float() + 0.5) * 2.0**-32
    return -(-torch.log1p(-u_BV.clamp(max=1 - 2.0**-24))).log()


_MASK = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """Return a 32-bit integer hash, in int64 arithmetic; multipliers are reduced modulo 2^32 to prevent overflow.

    Source: the function "lowbias32" of Chris Wellons' hash prospector (public domain).
    """
    x = x & _MASK
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * (0x846CA68B - 2**32)) & _MASK
    return x ^ (x >> 16)
