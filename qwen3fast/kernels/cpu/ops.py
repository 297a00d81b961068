"""The functions of ops.h as operations, `torch.ops.qwen3fast.*`: arguments checked, results allocated.

Each raises ValueError for arguments that it does not serve. `quantize_weight` is a plain function.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3fast.kernels.cpu import tiles
from qwen3fast.kernels.cpu.library import functions
from qwen3fast.kernels.cpu.structures import (
    LANES,
    LinearPointers,
    RowLimits,
    address,
    checked_cache,
    checked_positions,
    packed_linear,
    require,
)
from qwen3fast.kernels.define import define


def linear(x: Tensor, weight_NK: Tensor, limits: Sequence[int] = ()) -> Tensor:
    """Return x @ weight.T, (..., N) bfloat16. x: (..., K) bfloat16.

    limits: `RowLimits`, as a sequence of numbers; empty for this operation's own form alone.
    """
    N, K = weight_NK.shape
    rows, chosen = x.numel() // K, RowLimits(*limits)
    require(x.dtype == weight_NK.dtype == torch.bfloat16, "linear: bfloat16 only")
    require(weight_NK.is_contiguous() and x.shape[-1] == K, "linear: weight (N, K) contiguous, x (..., K)")
    require(K % LANES == 0, "linear: K a multiple of 16")
    if chosen.form_at(rows) == "dequantized":
        return F.linear(x, weight_NK)
    if chosen.tiles_at(rows) and K % (2 * LANES) == N % LANES == 0 and tiles.are_usable():
        return tiles.tile_linear(x, [LinearPointers(weight_NK.data_ptr(), None, N, K, 16, 0, 0)])
    x, y = x.contiguous(), x.new_empty((*x.shape[:-1], N))
    functions().qwen3fast_linear(x.data_ptr(), weight_NK.data_ptr(), y.data_ptr(), rows, N, K, torch.get_num_threads())
    return y


def quantized_linear(x: Tensor, packed: list[Tensor], scale: list[Tensor], limits: Sequence[int] = ()) -> Tensor:
    """Return x @ weight.T for packed weights of the same K, in any formats, side by side. x: (..., K) bfloat16.

    limits: `RowLimits`, as a sequence of numbers; empty for this operation's own form alone.
    """
    K = x.shape[-1]
    require(x.dtype == torch.bfloat16, "quantized_linear: x must be bfloat16")
    require(len(packed) == len(scale) > 0, "quantized_linear: there must be a scale for each weight")
    try:
        linears = list(map(packed_linear, packed, scale))
    except ValueError as err:
        raise ValueError(f"quantized_linear: {err}") from None
    for linear in linears:
        require(linear.K == K, f"quantized_linear: x has {K} channels, a weight has {linear.K}")
    rows, chosen = x.numel() // K, RowLimits(*limits)
    if chosen.form_at(rows) == "dequantized":
        return torch.cat([dequantized_linear(x, *weight) for weight in zip(packed, scale, strict=True)], dim=-1)
    if (kind := chosen.tiles_at(rows)) and tiles.are_usable():
        return tiles.tile_linear(x, linears, kind)
    x, y = x.contiguous(), x.new_empty((*x.shape[:-1], sum(linear.N for linear in linears)))
    pointers = (LinearPointers * len(linears))(*linears)
    functions().qwen3fast_quantized_linear(
        x.data_ptr(), pointers, len(linears), y.data_ptr(), rows, torch.get_num_threads()
    )
    return y


def dequantized_linear(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """Return x @ weight.T, (..., N) bfloat16, by PyTorch's product, with activations that are not quantized.

    The weight is written out first, which costs as much for one row as for many. Scales of rows multiply the product:
    the levels of int8, and the numbers of fp8, are exact in bfloat16.
    x: (..., K) bfloat16; packed, scale: see `packed_linear`.
    """
    N = packed.shape[0] * LANES
    is_last = scale.dtype == torch.float32 and scale.shape in ((N,), (N, 1))
    row_N = torch.arange(N, device="cpu")
    y = F.linear(x, quantized_rows(packed, torch.ones_like(scale) if is_last else scale, row_N))
    return (y.float() * scale.flatten()).to(torch.bfloat16) if is_last else y


def quantize_weight(weight_NK: Tensor, packed: Tensor, scale: Tensor) -> None:
    """Quantize a weight, (N, K) bfloat16, into packed and scale, whose shapes give the bits; see `packed_linear`.

    Raises: ValueError for another dtype, device, shape or layout.
    """
    linear = packed_linear(packed, scale)
    is_right = linear.bits in (4, 8) and not linear.span and not linear.record
    require(is_right, "quantize_weight: int8 and int4 only, with scales in float32 and bfloat16")
    weight = address("quantize_weight: weight", weight_NK, torch.bfloat16, linear.N, linear.K)
    sizes, pointers = (linear.N, linear.K, linear.bits), (linear.weight, linear.scale)
    functions().qwen3fast_quantize_weight(weight, *sizes, *pointers, torch.get_num_threads())


def pack_scales(scale: Tensor) -> Tensor | None:
    """Return scales of int4, (N/16, K/32, 16) bfloat16, in bytes, (N/16, 1 + K/32, 16) int8; see `bfloat16_scales`.

    None if bytes would be other numbers.
    """
    blocks, groups = scale.shape[:2]
    pointer = address("pack_scales: scale", scale, torch.bfloat16, blocks, groups, LANES)
    result = torch.empty(blocks, 1 + groups, LANES, dtype=torch.int8, device="cpu")
    arguments = (pointer, blocks, groups, result.data_ptr(), torch.get_num_threads())
    return result if functions().qwen3fast_pack_scales(*arguments) else None


def quantized_rows(packed: Tensor, scale: Tensor, row_R: Tensor) -> Tensor:
    """Return rows of a packed weight, (R, K) bfloat16; row_R: int64."""
    linear = packed_linear(packed, scale)
    require(row_R.dtype == torch.int64 and row_R.dim() == 1, "quantized_rows: row must be (R,) int64")
    row_R, y_RK = row_R.contiguous(), torch.empty(len(row_R), linear.K, dtype=torch.bfloat16, device="cpu")
    pointers = (byref(linear), row_R.data_ptr(), y_RK.data_ptr())
    if not functions().qwen3fast_quantized_rows(*pointers, len(row_R), torch.get_num_threads()):
        raise ValueError(f"quantized_rows: a row of {row_R.tolist()} is not one of the weight's {linear.N}")
    return y_RK


def decode_attention(
    q_BTHD: Tensor,
    k_RKSD: Tensor,
    v_RKSD: Tensor,
    position_B1: Tensor,
    k_scale_RKS: Tensor | None = None,
    v_scale_RKS: Tensor | None = None,
) -> Tensor:
    """Return attention of one query per row, T = 1, over positions 0..position_B1 of rows 0..B-1: (B, H, 1, D).

    q_BTHD: bfloat16. position_B1: int64.
    """
    (B, T, H, D), (R, K, S, _) = q_BTHD.shape, k_RKSD.shape
    layer = checked_cache("decode_attention", q_BTHD, k_RKSD, v_RKSD, k_scale_RKS, v_scale_RKS)
    require(
        D % (2 * LANES) == 0 and T == 1 and 1 <= B <= R,
        "decode_attention: q (B, 1, H, D), D a multiple of 32, B from 1 to R",
    )
    q, position = q_BTHD.contiguous(), checked_positions("decode_attention", position_B1, B)
    y_BH1D = q.new_empty(B, H, 1, D)
    functions().qwen3fast_decode_attention(
        q.data_ptr(), byref(layer), position.data_ptr(), y_BH1D.data_ptr(), B, H, K, S, D, torch.get_num_threads()
    )
    return y_BH1D


_CACHE = "Tensor q, Tensor k, Tensor v, Tensor position, Tensor? k_scale=None, Tensor? v_scale=None"
_LIMITS = "int[] limits=[]"
define(
    f"linear(Tensor x, Tensor weight, {_LIMITS}) -> Tensor",
    linear,
    lambda x, weight, *_: x.new_empty((*x.shape[:-1], weight.shape[0])),
)
define(
    f"quantized_linear(Tensor x, Tensor[] packed, Tensor[] scale, {_LIMITS}) -> Tensor",
    quantized_linear,
    lambda x, packed, *_: x.new_empty((*x.shape[:-1], sum(p.shape[0] * p.shape[2] for p in packed))),
)
define("quantized_rows(Tensor packed, Tensor scale, Tensor row) -> Tensor", quantized_rows, None)
define(
    f"decode_attention({_CACHE}) -> Tensor",
    decode_attention,
    lambda q, *_: q.new_empty((q.shape[0], q.shape[2], 1, q.shape[3])),
)
