"""Checkpoints of llm-compressor: compressed-tensors, 4 or 8 bits or float8, one tensor per property of a layer.

"pack-quantized": `weight_packed` (N, K*bits/32) int32, levels packed along channels, lowest bits first; `weight_scale`
(N, G); with zero points `weight_zero_point` (N*bits/32, G) int32, packed along rows; `weight_g_idx` (K,) int32 where
the channels of a group are not neighbors; `weight_shape` (2,). Stored levels and zero points are 2^(bits-1) more than
the numbers that they stand for. "int-quantized": `weight` (N, K) int8, `weight_scale`, `weight_zero_point` int8.
"float-quantized": `weight` (N, K) float8_e4m3fn, `weight_scale`. A scale is one per group, row (N, 1), tensor (1,) or
block of 128 x 128.
Source: compressed-tensors' compressors (pack_quantized, naive_quantized).

N out_features   K in_features   G groups   n some rows
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwen3fast.checkpoint.prequantized.format import BLOCK, FLOATS, ExpectedTensor, PrequantizedFormat
from qwen3fast.checkpoint.prequantized.levels import Levels, unpack


def expected_tensors(stored: PrequantizedFormat, N: int, K: int) -> dict[str, ExpectedTensor]:
    """Return the tensors of a layer by the ends of their names; none for a shape that the format cannot store."""
    in_word = 32 // stored.bits
    if stored.layout == "pack-quantized" and (K % in_word or (N % in_word and not stored.is_symmetric)):
        return {}
    if stored.strategy == "group" and K % stored.group_size:
        return {}
    G = K // stored.group_size if stored.strategy == "group" else 1
    scale = {"tensor": (1,), "block": (-(-N // BLOCK), -(-K // BLOCK))}.get(stored.strategy, (N, G))
    tensors = {"weight_scale": ExpectedTensor(scale, FLOATS)}
    if stored.layout == "float-quantized":
        zeros = ExpectedTensor(scale, ("F8_E4M3", "I8"), is_optional=True)  # some versions wrote zeros
        return {"weight": ExpectedTensor((N, K), ("F8_E4M3",)), **tensors, "weight_zero_point": zeros}
    if stored.layout == "int-quantized":
        zeros = ExpectedTensor(scale, ("I8",), is_optional=stored.is_symmetric)
        return {"weight": ExpectedTensor((N, K), ("I8",)), **tensors, "weight_zero_point": zeros}
    return {
        "weight_packed": ExpectedTensor((N, K // in_word), ("I32",)),
        **tensors,
        "weight_zero_point": ExpectedTensor((N // in_word, G), ("I32",), is_optional=stored.is_symmetric),
        "weight_g_idx": ExpectedTensor((K,), ("I32", "I64"), is_optional=not stored.has_act_order),
        "weight_shape": ExpectedTensor((2,), ("I32", "I64"), is_optional=True),
    }


def levels(stored: PrequantizedFormat, tensors: dict[str, Tensor], rows: slice) -> Levels:
    """Return the levels of some rows; the first one is a multiple of 8. Raises: ValueError for unknown groups."""
    is_packed, middle = stored.layout == "pack-quantized", 2 ** (stored.bits - 1)
    if is_packed:
        level_nK = unpack(tensors["weight_packed"][rows], stored.bits, dim=1)
    else:
        level_nK = _unsigned(tensors["weight"][rows])
    scale_nG = _of_rows(tensors["weight_scale"], rows).float()
    n, G = len(level_nK), scale_nG.shape[1]
    scale_nG = scale_nG.expand(n, G)
    zeros = tensors.get("weight_zero_point")
    if zeros is None:
        zero_nG = torch.full_like(scale_nG, middle, dtype=torch.uint8)
    elif is_packed:
        in_word = 32 // stored.bits
        zero_nG = unpack(zeros[rows.start // in_word : -(-rows.stop // in_word)], stored.bits, dim=0)[:n]
    else:
        zero_nG = _unsigned(_of_rows(zeros, rows)).expand(n, G)
    index_K = tensors.get("weight_g_idx") if stored.has_act_order else None
    return Levels.of(level_nK, zero_nG, scale_nG, stored.group_size, index_K)


def _of_rows(scale: Tensor, rows: slice) -> Tensor:
    """Return the scales of some rows; one for the whole tensor serves all of them."""
    return scale[None] if scale.dim() == 1 else scale[rows]


def _unsigned(number: Tensor) -> Tensor:
    """Return int8 numbers as levels: 128 more, uint8."""
    return (number.short() + 128).to(torch.uint8)
