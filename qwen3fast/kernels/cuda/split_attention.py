"""Attention of one query per row over the used part of a KV cache, on a GPU.

One program per head would not occupy a GPU: each head's positions are split over several programs. Every split
computes its own maximum, sum and weighted values, and a second kernel merges them. Lengths are read on the device: the
cost follows the used length, also within one CUDA graph. Each key and value is read once for all query heads of its
group.
Source: Dao et al., "Flash-Decoding for long-context inference" (2023); online softmax: arXiv:1805.02867. The plain form
is `attend` in kernels/attention.py.

Not yet run on a GPU; tests run it in Triton's interpreter.

    B rows   H query heads   K key/value heads   G = H/K   S positions allocated   D head_dim   N splits
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen3fast.kernels.cuda.decode_step.launch import current
from qwen3fast.kernels.define import define

BLOCK = 64  # positions that a program reads at a time, and the smallest split of a decode step
MIN_DOT = 16  # rows that Triton's matrix product needs
PROGRAMS = 2 * 132  # to launch: two per multiprocessor of an H100
MAX_SPLITS = 64


def split_attention(
    q_BTHD: Tensor,
    k_RKSD: Tensor,
    v_RKSD: Tensor,
    position_B1: Tensor,
    k_scale_RKS: Tensor | None = None,
    v_scale_RKS: Tensor | None = None,
) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v over positions 0..position (-1 as 0) of slots 0..B-1, for T = 1.

    k_RKSD, v_RKSD: contiguous, in q's dtype, or int8 with scales k_scale_RKS, v_scale_RKS (float32). D is a power of
    two.
    Returns: (B, H, 1, D) in q's dtype.
    """
    B, _, H, D = q_BTHD.shape
    K, S = k_RKSD.shape[1:3]
    G, N = H // K, num_splits(B * K, S)
    q = q_BTHD.contiguous()
    y = torch.empty(B, H, 1, D, dtype=q.dtype, device=q.device)
    rest = B * H if N > 1 else 0  # of what a second kernel merges
    part = torch.empty(rest, N, D, dtype=torch.float32, device=q.device)
    maximum, total = torch.empty(2, rest, N, dtype=torch.float32, device=q.device).unbind()
    is_quantized = k_scale_RKS is not None
    scales = (k_scale_RKS, v_scale_RKS) if is_quantized else (maximum, total)  # not read then
    rows = max(MIN_DOT, triton.next_power_of_2(G))
    inputs, sizes = (q, k_RKSD, v_RKSD, *scales, position_B1), (S, D**-0.5, K, G, D, rows, BLOCK, N == 1, is_quantized)
    with current(q.device):
        _attend_split[(B * K, N)](*inputs, part, maximum, total, y, *sizes, num_stages=num_stages(q.dtype))
        if N > 1:
            _merge_splits[(B * H,)](part, maximum, total, y, N, triton.next_power_of_2(N), D)
    return y


def num_stages(dtype: torch.dtype) -> int:
    """Return how many blocks are loaded at the same time: in float32, three would not fit into shared memory."""
    return 2 if dtype == torch.float32 else 3


define(
    "split_attention(Tensor q, Tensor k, Tensor v, Tensor position, Tensor? k_scale=None, "
    "Tensor? v_scale=None) -> Tensor",
    split_attention,
    lambda q, *others: q.new_empty(q.shape[0], q.shape[2], 1, q.shape[3]),
    "CUDA",
)


def num_splits(heads: int, positions: int) -> int:
    """Return N, the number of splits per key/value head, for any used length. heads: of all rows together."""
    return max(1, min(-(-PROGRAMS // heads), -(-positions // BLOCK), MAX_SPLITS))


@triton.jit
def attend_block(
    query,
    k,
    v,
    k_scale,
    v_scale,
    vector,
    is_used,
    is_seen,
    scale,
    most,
    weight_sum,
    sums,
    head_dim: tl.constexpr,
    is_quantized: tl.constexpr,
):
    """Add a block of the cache to the sums of an online softmax. Returns: its maximum, sum of weights and sums.

    vector: the numbers of the block's keys and values. is_used: which of them are read. is_seen: the same for each row
    of the query, [rows or 1, block].
    """
    channel = tl.arange(0, head_dim)
    key = tl.load(k + vector[None, :] * head_dim + channel[:, None], mask=is_used[None, :], other=0.0)
    score = tl.dot(query, key.to(query.dtype), input_precision="ieee") * scale
    if is_quantized:
        score *= tl.load(k_scale + vector, mask=is_used, other=0.0)[None, :]
    score = tl.where(is_seen, score, -1e30)
    new_most = tl.maximum(most, tl.max(score, 1))
    weight = tl.where(is_seen, tl.exp(score - new_most[:, None]), 0.0)
    shrink = tl.exp(most - new_most)
    weight_sum = weight_sum * shrink + tl.sum(weight, 1)
    if is_quantized:
        weight *= tl.load(v_scale + vector, mask=is_used, other=0.0)[None, :]
    value = tl.load(v + vector[:, None] * head_dim + channel[None, :], mask=is_used[:, None], other=0.0)
    product = tl.dot(weight.to(query.dtype), value.to(query.dtype), input_precision="ieee")
    return new_most, weight_sum, sums * shrink[:, None] + product


@triton.jit
def _attend_split(
    q,
    k,
    v,
    k_scale,
    v_scale,
    position,
    part,
    maximum,
    total,
    y,
    num_positions,
    scale,
    num_heads: tl.constexpr,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    rows: tl.constexpr,
    block: tl.constexpr,
    is_whole: tl.constexpr,
    is_quantized: tl.constexpr,
):
    """Program (i, n): split n of key/value head i % K in row i // K; `group` query heads, padded to `rows`.

    is_whole: there is one split, and the result goes to y.
    """
    i, split, num_parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    length = tl.maximum(tl.load(position + i // num_heads), 0) + 1
    share = tl.cdiv(length, num_parts)
    start = split * share
    end = tl.minimum(start + share, length)
    row, channel = tl.arange(0, rows), tl.arange(0, head_dim)
    is_real = row < group
    query = tl.load(q + (i * group + row[:, None]) * head_dim + channel[None, :], mask=is_real[:, None], other=0.0)
    most = tl.full([rows], -1e30, tl.float32)
    mass = tl.zeros([rows], tl.float32)
    values = tl.zeros([rows, head_dim], tl.float32)
    for first in range(start, end, block):
        at = first + tl.arange(0, block)
        is_used = at < end
        vector, seen = i.to(tl.int64) * num_positions + at, is_used[None, :]
        most, mass, values = attend_block(
            query, k, v, k_scale, v_scale, vector, is_used, seen, scale, most, mass, values, head_dim, is_quantized
        )
    out = (i * group + row) * num_parts + split
    at = out[:, None] * head_dim + channel[None, :]
    if is_whole:
        tl.store(y + at, (values / mass[:, None]).to(y.dtype.element_ty), mask=is_real[:, None])
    else:
        tl.store(maximum + out, most, mask=is_real)
        tl.store(total + out, mass, mask=is_real)
        tl.store(part + at, values, mask=is_real[:, None])


@triton.jit
def _merge_splits(part, maximum, total, y, num_parts, width: tl.constexpr, head_dim: tl.constexpr):
    """Program h: all splits of query head h; `width` is num_parts rounded up to a power of two."""
    h = tl.program_id(0)
    split, channel = tl.arange(0, width), tl.arange(0, head_dim)
    is_real = split < num_parts
    most = tl.load(maximum + h * num_parts + split, mask=is_real, other=-1e30)
    weight = tl.where(is_real, tl.exp(most - tl.max(most, 0)), 0.0)
    weight_sum = tl.sum(weight * tl.load(total + h * num_parts + split, mask=is_real, other=0.0), 0)
    values = tl.load(
        part + (h * num_parts + split[:, None]) * head_dim + channel[None, :], mask=is_real[:, None], other=0.0
    )
    result = tl.sum(values * weight[:, None], 0) / weight_sum
    tl.store(y + h * head_dim + channel, result.to(y.dtype.element_ty))
