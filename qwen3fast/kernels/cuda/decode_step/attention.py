"""Attention of a decode step: QK-norm, RoPE, cache write and attention over the used positions, in one kernel.

Each key/value head's positions are split over programs, which read the length on the device: one CUDA graph serves all
lengths, and its cost follows the used length. The program whose split contains the row's own position computes the new
key and value, writes them to the cache and starts its sums with them; no program reads them back. A second kernel
combines the splits; caches that are short enough for one split do not need it.
Source: Dao et al., "Flash-Decoding for long-context inference" (2023); online softmax: arXiv:1805.02867.

    B rows   H query heads   K key/value heads   G = H/K   S positions allocated   D head_dim   N splits
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from qwen3fast.kernels.cuda.decode_step.launch import launch, start_next, wait_for_previous
from qwen3fast.kernels.cuda.decode_step.linear import plain_norm
from qwen3fast.kernels.cuda.split_attention import BLOCK, MIN_DOT, attend_block, num_splits, num_stages


class Splits(NamedTuple):
    """Workspace in float32: each split's weighted values, (B*H, N, D), largest score and sum of weights."""

    values: Tensor
    maximum: Tensor
    total: Tensor

    @classmethod
    def allocate(cls, rows: list[int], H: int, K: int, S: int, D: int, device: torch.device) -> dict[int, Splits]:
        """Return the workspaces for several numbers of rows, in the same memory."""
        shapes = {B: (B * H, num_splits(B * K, S)) for B in rows}
        most = max(heads * N for heads, N in shapes.values())
        values, maximum, total = (torch.empty(most * n, dtype=torch.float32, device=device) for n in (D, 1, 1))
        return {
            B: cls(
                values[: heads * N * D].view(heads, N, D),
                maximum[: heads * N].view(heads, N),
                total[: heads * N].view(heads, N),
            )
            for B, (heads, N) in shapes.items()
        }


def attend(
    qkv_BN: Tensor,
    q_norm_D: Tensor,
    k_norm_D: Tensor,
    eps: float,
    cos_SD: Tensor,
    sin_SD: Tensor,
    position_B: Tensor,
    k_RKSD: Tensor,
    v_RKSD: Tensor,
    k_scale_RKS: Tensor | None,
    v_scale_RKS: Tensor | None,
    splits: Splits,
    y_BN: Tensor,
) -> None:
    """Write new keys and values at position_B of rows 0..B-1, and the attention's output, (B, H*D), to y_BN.

    qkv_BN: (B, (H + 2K) * D), q, k and v side by side. position_B: int64; for -1, nothing is cached and y is zero.
    k_RKSD, v_RKSD: contiguous, in any float dtype, or int8 with float32 scales. D: a power of two, at least 16.
    """
    B, D, (K, S) = len(qkv_BN), q_norm_D.shape[0], k_RKSD.shape[1:3]
    H = y_BN.shape[1] // D
    N = splits.maximum.shape[1]
    is_quantized = k_scale_RKS is not None
    scales = (k_scale_RKS, v_scale_RKS) if is_quantized else (splits.maximum, splits.total)  # not read then
    device = y_BN.device
    inputs = (qkv_BN, q_norm_D, k_norm_D, eps, cos_SD, sin_SD, position_B, k_RKSD, v_RKSD)
    sizes = {"K": K, "G": H // K, "D": D, "ROWS": max(MIN_DOT, triton.next_power_of_2(H // K)), "BLOCK": BLOCK, "N": N}
    sizes |= {"IS_QUANTIZED": is_quantized, "num_stages": num_stages(y_BN.dtype)}
    launch(attention_kernel, (B * K, N), *inputs, *scales, *splits, y_BN, S, D**-0.5, device=device, **sizes)
    if N > 1:
        width = triton.next_power_of_2(N)
        launch(combine_kernel, (B * H,), position_B, *splits, y_BN, device=device, H=H, D=D, N=N, W=width, BLOCK=BLOCK)


def plain_attend(
    qkv_BN: Tensor,
    q_norm_D: Tensor,
    k_norm_D: Tensor,
    eps: float,
    cos_SD: Tensor,
    sin_SD: Tensor,
    position_B: Tensor,
    k_RKSD: Tensor,
    v_RKSD: Tensor,
    k_scale_RKS: Tensor | None = None,
    v_scale_RKS: Tensor | None = None,
) -> Tensor:
    """Return the output of `attend`, computed row by row, and write keys and values as it does."""
    (K, _, D), rows = k_RKSD.shape[1:], []
    for b, place in enumerate(position_B.tolist()):
        q, k, v = qkv_BN[b].view(-1, D).split([qkv_BN.shape[1] // D - 2 * K, K, K])
        if place < 0:
            rows.append(torch.zeros_like(q).flatten())
            continue
        q, k = (_rotate(plain_norm(x, w, eps), cos_SD[place], sin_SD[place]) for x, w in ((q, q_norm_D), (k, k_norm_D)))
        used = []
        for new, cache, scale in ((k, k_RKSD, k_scale_RKS), (v, v_RKSD, v_scale_RKS)):
            if scale is not None:
                largest = new.float().abs().amax(-1)
                scale[b, :, place] = largest / 127
                new = (new.float() * torch.where(largest > 0, 127 / largest, 0.0)[:, None]).round()
            cache[b, :, place] = new.to(cache.dtype)
            read = cache[b, :, : place + 1].float()
            used.append(read if scale is None else (read * scale[b, :, : place + 1, None]).to(q.dtype).float())
        y = F.scaled_dot_product_attention(q.float()[None, :, None], used[0][None], used[1][None], enable_gqa=True)
        rows.append(y.to(q.dtype).flatten())
    return torch.stack(rows)


def _rotate(x_ND: Tensor, cos_D: Tensor, sin_D: Tensor) -> Tensor:
    first, second = x_ND.float().chunk(2, dim=-1)
    return (x_ND.float() * cos_D + torch.cat([-second, first], dim=-1) * sin_D).to(x_ND.dtype)


@triton.jit
def split_size(length, N: tl.constexpr, BLOCK: tl.constexpr):
    """Return the number of positions in a split: whole blocks, for as few splits as possible."""
    return tl.cdiv(tl.cdiv(length, N), BLOCK) * BLOCK


@triton.jit
def norm_and_rotate(x, row, mask, norm, cos, sin, eps, D: tl.constexpr):
    """Return RMSNorm and RoPE of vectors [rows, D] at `x + row * D`, float32, rounded as in the plain modules."""
    d = tl.arange(0, D)
    other = (d + D // 2) % D
    dtype: tl.constexpr = x.dtype.element_ty
    value = tl.load(x + row[:, None] * D + d[None, :], mask=mask[:, None], other=0.0).to(tl.float32)
    partner = tl.load(x + row[:, None] * D + other[None, :], mask=mask[:, None], other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(value * value, 1) / D + eps)
    value = (value * inverse[:, None]).to(dtype).to(tl.float32) * tl.load(norm + d).to(tl.float32)[None, :]
    partner = (partner * inverse[:, None]).to(dtype).to(tl.float32) * tl.load(norm + other).to(tl.float32)[None, :]
    value, partner = value.to(dtype).to(tl.float32), partner.to(dtype).to(tl.float32)
    partner = tl.where(d[None, :] < D // 2, -partner, partner)
    result = value * tl.load(cos + d)[None, :] + partner * tl.load(sin + d)[None, :]
    return result.to(dtype).to(tl.float32)


@triton.jit
def write_vector(x, cache, scale, at, D: tl.constexpr, IS_QUANTIZED: tl.constexpr):
    """Write a vector [1, D] as vector `at` of the cache. Returns: the stored vector (int8: dequantized), float32."""
    place = at * D + tl.arange(0, D)[None, :]
    if IS_QUANTIZED:
        largest = tl.max(tl.abs(x), 1) + tl.sum(x * 0.0, 1)  # a maximum drops NaN
        # Rounds halves to even, as torch.round: adding 1.5 * 2^23 leaves no room for a fraction.
        level = x * tl.where(largest > 0, 127.0 / largest, 0.0)[:, None] + 12582912.0 - 12582912.0
        tl.store(cache + place, level.to(tl.int8))
        tl.store(scale + at + tl.arange(0, 1), largest / 127.0)
        return level * (largest / 127.0)[:, None]
    stored = x.to(cache.dtype.element_ty)
    tl.store(cache + place, stored)
    return stored.to(tl.float32)


@triton.jit
def attention_kernel(
    qkv,
    q_norm,
    k_norm,
    eps,
    cos,
    sin,
    position,
    k,
    v,
    k_scale,
    v_scale,
    values,
    maximum,
    total,
    y,
    num_positions,
    scale,
    K: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    N: tl.constexpr,
    IS_QUANTIZED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Program (i, n): split n of key/value head i % K in row i // K; its G query heads, padded to ROWS."""
    i, split = tl.program_id(0), tl.program_id(1)
    b, head = i // K, i % K
    row, d = tl.arange(0, ROWS), tl.arange(0, D)
    is_real = row < G
    start_next(DEPENDENT)
    wait_for_previous(DEPENDENT)
    place = tl.load(position + b).to(tl.int32)
    out = (i * G + row) * N + split
    y_at = (i * G + row)[:, None] * D + d[None, :]
    dtype: tl.constexpr = y.dtype.element_ty
    share = split_size(place + 1, N, BLOCK)
    if place < 0:
        if split == 0:
            tl.store(y + y_at, tl.zeros([ROWS, D], dtype), mask=is_real[:, None])
    elif split * share <= place:
        start = split * share
        end = tl.minimum(start + share, place)  # the row's own position is not read
        own = qkv + b * ((G + 2) * K * D)
        row_cos, row_sin = cos + place * D, sin + place * D
        query = norm_and_rotate(own, head * G + row, is_real, q_norm, row_cos, row_sin, eps, D)
        most = tl.full([ROWS], -1e30, tl.float32)
        weight_sum = tl.zeros([ROWS], tl.float32)
        sums = tl.zeros([ROWS, D], tl.float32)
        first_vector = i.to(tl.int64) * num_positions
        if start + share > place:
            one = tl.arange(0, 1)
            key = norm_and_rotate(own, G * K + head + one, one == 0, k_norm, row_cos, row_sin, eps, D)
            value = tl.load(own + (G * K + K + head + one)[:, None] * D + d[None, :]).to(tl.float32)
            key = write_vector(key, k, k_scale, first_vector + place, D, IS_QUANTIZED).to(dtype).to(tl.float32)
            value = write_vector(value, v, v_scale, first_vector + place, D, IS_QUANTIZED).to(dtype).to(tl.float32)
            most = tl.sum(query * key, 1) * scale
            weight_sum += 1.0
            sums += value
        query = query.to(dtype)
        for first in range(start, end, BLOCK):
            at = first + tl.arange(0, BLOCK)
            is_used = at < end
            vector, seen = first_vector + at, is_used[None, :]
            most, weight_sum, sums = attend_block(
                query, k, v, k_scale, v_scale, vector, is_used, seen, scale, most, weight_sum, sums, D, IS_QUANTIZED
            )
        if N == 1:
            tl.store(y + y_at, (sums / weight_sum[:, None]).to(dtype), mask=is_real[:, None])
        else:
            tl.store(maximum + out, most, mask=is_real)
            tl.store(total + out, weight_sum, mask=is_real)
            tl.store(values + out[:, None] * D + d[None, :], sums, mask=is_real[:, None])


@triton.jit
def combine_kernel(
    position,
    values,
    maximum,
    total,
    y,
    H: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
    W: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Program i: the splits in use of query head i % H in row i // H; W is N rounded up to a power of two."""
    i = tl.program_id(0)
    split, d = tl.arange(0, W), tl.arange(0, D)
    start_next(DEPENDENT)
    wait_for_previous(DEPENDENT)
    length = tl.load(position + i // H).to(tl.int32) + 1
    if length > 0:  # otherwise the attention kernel wrote zeros
        is_real = split * split_size(length, N, BLOCK) < length
        most = tl.load(maximum + i * N + split, mask=is_real, other=-1e30)
        weight = tl.where(is_real, tl.exp(most - tl.max(most, 0)), 0.0)
        weight_sum = tl.sum(weight * tl.load(total + i * N + split, mask=is_real, other=0.0), 0)
        at = (i * N + split[:, None]) * D + d[None, :]
        sums = tl.load(values + at, mask=is_real[:, None], other=0.0)
        tl.store(y + i * D + d, (tl.sum(sums * weight[:, None], 0) / weight_sum).to(y.dtype.element_ty))
