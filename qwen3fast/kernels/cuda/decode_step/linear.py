"""Products of 1 to 8 rows with a weight, fused with the operations before and after them: one kernel, three uses.

    RMSNorm, then the stacked q, k and v projections
    the output or down projection, added to the residual stream
    RMSNorm, then the stacked gate and up projections, then silu(gate) * up

A program computes BN rows of the weight. Every program normalizes x itself, which costs less than another kernel.
Rounding to the dtype happens at the same points as in the plain modules.

    R rows of x   N out_features   K in_features
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from qwen3fast.kernels.cuda.decode_step.launch import launch, prefetch, start_next, wait_for_previous
from qwen3fast.kernels.cuda.decode_step.weights import (
    Weight,
    after_wait,
    channels_of,
    columns_of,
    load_channels,
    load_weights,
    multiply,
    num_groups,
    scale_numbers,
    tile_shape,
)
from qwen3fast.kernels.cuda.split_attention import num_stages

STORE, ADD, GATE = 0, 1, 2  # the use of a product
# Bytes of a packed weight behind the first tile that a program prefetches at most. Some 500 programs do so at once,
# with a gate for two weights: the L2 cache, 50 MB on an H100, is to hold it all until they read it. Their whole shares,
# up to 384 KiB for 8B, would evict each other.
PREFETCHED = tl.constexpr(2**14)


def norm_linear(x_RK: Tensor, norm_K: Tensor, eps: float, weight: Weight, y_RN: Tensor) -> None:
    """Write RMSNorm(x) @ weight.T to y_RN; x, norm and y in one dtype, contiguous."""
    _launch(x_RK, norm_K, eps, weight, y_RN, STORE)


def norm_gated_linear(x_RK: Tensor, norm_K: Tensor, eps: float, weight: Weight, y_RN: Tensor) -> None:
    """Write silu(gate) * up to y_RN; gate and up are the halves of RMSNorm(x) @ weight.T; weight: (2N, K)."""
    _launch(x_RK, norm_K, eps, weight, y_RN, GATE)


def linear_add(x_RK: Tensor, weight: Weight, y_RN: Tensor) -> None:
    """Add x @ weight.T to y_RN, in place."""
    _launch(x_RK, None, 0.0, weight, y_RN, ADD)


def plain_norm_linear(x_RK: Tensor, norm_K: Tensor, eps: float, weight_NK: Tensor) -> Tensor:
    """Return the output of `norm_linear`. weight_NK: in x's dtype, or in float32 if it was quantized."""
    return _product(plain_norm(x_RK, norm_K, eps), weight_NK)


def plain_norm_gated_linear(x_RK: Tensor, norm_K: Tensor, eps: float, weight_2NK: Tensor) -> Tensor:
    """Return the output of `norm_gated_linear`."""
    gate, up = _product(plain_norm(x_RK, norm_K, eps), weight_2NK).chunk(2, dim=-1)
    return F.silu(gate) * up


def plain_linear_add(x_RK: Tensor, weight_NK: Tensor, y_RN: Tensor) -> Tensor:
    """Return y_RN after `linear_add`."""
    return y_RN + _product(x_RK, weight_NK)


def plain_norm(x: Tensor, norm: Tensor, eps: float) -> Tensor:
    """Return RMSNorm(x) over the last dimension; see model/norm.py."""
    x_float32 = x.float()
    return (x_float32 * torch.rsqrt(x_float32.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * norm


def _product(x_RK: Tensor, weight_NK: Tensor) -> Tensor:
    return F.linear(x_RK.float(), weight_NK.float()).to(x_RK.dtype)


def _launch(x_RK: Tensor, norm_K: Tensor | None, eps: float, weight: Weight, y_RN: Tensor, use: int) -> None:
    (R, K), N = x_RK.shape, y_RN.shape[1]
    BN, BK = tile_shape(N, K, weight.kind, x_RK.dtype, num_tiles=2 if use == GATE else 1)
    arguments = (x_RK, x_RK if norm_K is None else norm_K, weight.tensor, weight.scale, y_RN, eps)
    sizes = {"R": R, "ROWS": columns_of(R), "N": N, "K": K, "BN": BN, "BK": BK}
    sizes |= {"KIND": weight.kind, "P": channels_of(weight.kind), "HAS_NORM": norm_K is not None, "USE": use}
    grid, stages = (triton.cdiv(N, BN),), num_stages(x_RK.dtype)
    launch(linear_kernel, grid, *arguments, device=x_RK.device, **sizes, num_stages=stages)


@triton.jit
def linear_kernel(
    x,
    norm,
    w,
    scale,
    y,
    eps,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    KIND: tl.constexpr,
    P: tl.constexpr,
    HAS_NORM: tl.constexpr,
    USE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Program i: columns i*BN.. of the result."""
    n0 = tl.program_id(0) * BN
    G: tl.constexpr = num_groups(KIND, BK)
    up_w, up_scale = w + N * (K // P), scale + scale_numbers(N, K, KIND)  # the second half of a gated weight
    # Weights do not depend on the previous kernel: they are loaded while it ends.
    raw = load_weights(w, n0, 0, N, K, BN, BK, KIND, P)
    if USE == 2:
        up_raw = load_weights(up_w, n0, 0, N, K, BN, BK, KIND, P)
    if P != 1 and BK < K:
        BLOCKS: tl.constexpr = (BN + 15) // 16
        num_bytes = tl.minimum((K - BK) // P * 64, PREFETCHED // BLOCKS)
        for i in tl.static_range(BLOCKS):
            block = tl.minimum(n0 // 16 + i, N // 16 - 1).to(tl.int64)
            at = block * (K // P * 16) + BK // P * 16
            prefetch(w + at, num_bytes, DEPENDENT)
            if USE == 2:
                prefetch(up_w + at, num_bytes, DEPENDENT)
    if HAS_NORM:
        norm_x = load_channels(norm, 0, 1, 1, K, BK, G)
    start_next(DEPENDENT)
    wait_for_previous(DEPENDENT)

    part = load_channels(x, 0, R, ROWS, K, BK, G)
    if HAS_NORM:
        inverse = inverse_rms(x, part, eps, R, ROWS, K, BK, G)
        part = normalized(part, inverse, after_wait(norm_x, DEPENDENT))
    zeros = tl.zeros([G, BN, ROWS], tl.float32)
    sums = multiply(after_wait(raw, DEPENDENT), part, zeros, scale, n0, 0, N, K, BN, BK, KIND, DEPENDENT)
    if USE == 2:
        up_sums = multiply(after_wait(up_raw, DEPENDENT), part, zeros, up_scale, n0, 0, N, K, BN, BK, KIND, DEPENDENT)
    if BK < K:
        for k0 in tl.range(BK, K, BK):
            part = load_channels(x, k0, R, ROWS, K, BK, G)
            if HAS_NORM:
                part = normalized(part, inverse, load_channels(norm, k0, 1, 1, K, BK, G))
            raw = load_weights(w, n0, k0, N, K, BN, BK, KIND, P)
            sums = multiply(raw, part, sums, scale, n0, k0, N, K, BN, BK, KIND, DEPENDENT)
            if USE == 2:
                up_raw = load_weights(up_w, n0, k0, N, K, BN, BK, KIND, P)
                up_sums = multiply(up_raw, part, up_sums, up_scale, n0, k0, N, K, BN, BK, KIND, DEPENDENT)

    r, n = tl.arange(0, ROWS), n0 + tl.arange(0, BN)
    mask = (n < N)[:, None] & (r < R)[None, :]
    at = n[:, None] + (r * N)[None, :]
    result = rounded(sums, scale, n, N, y.dtype.element_ty, KIND)
    if USE == 1:
        result += tl.load(y + at, mask=mask, other=0.0).to(tl.float32)
    if USE == 2:
        gate = (result * tl.sigmoid(result)).to(y.dtype.element_ty).to(tl.float32)
        result = gate * rounded(up_sums, up_scale, n, N, y.dtype.element_ty, KIND)
    tl.store(y + at, result.to(y.dtype.element_ty), mask=mask)


@triton.jit
def inverse_rms(x, first, eps, R: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, G: tl.constexpr):
    """Return 1 / sqrt(mean square + eps) of the rows of x, [1, ROWS, 1]; `first`: their first BK channels."""
    part = first.to(tl.float32)
    squares = part * part
    if BK < K:
        for k0 in tl.static_range(BK, K, BK):  # unrolled: many loads are underway at once
            part = load_channels(x, k0, R, ROWS, K, BK, G).to(tl.float32)
            squares += part * part
    return (1.0 / tl.sqrt(tl.sum(tl.sum(squares, 2), 0) / K + eps))[None, :, None]


@triton.jit
def normalized(part, inverse, norm):
    """Return channels normalized as in `RMSNorm`: rounded to the dtype before and after applying the weight."""
    scaled = (part.to(tl.float32) * inverse).to(part.dtype)
    return (scaled.to(tl.float32) * norm.to(tl.float32)).to(part.dtype)


@triton.jit
def rounded(sums, scale, n, N: tl.constexpr, dtype: tl.constexpr, KIND: tl.constexpr):
    """Return the sums of all groups, with the rows' scales of 8 bits, rounded to the dtype, as float32 [BN, ROWS]."""
    sums = tl.sum(sums, 0)
    if KIND == 1 or KIND == 2:
        sums *= tl.load(scale + n, mask=n < N, other=0.0)[:, None]
    return sums.to(dtype).to(tl.float32)
