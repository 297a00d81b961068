"""Products of many rows with quantized weights by PyTorch: the weight is written out in bfloat16, then multiplied.

Its cost does not depend on the number of rows, so with enough of them it is small beside the product, which PyTorch
computes in bfloat16 with what the processor has for that (AMX). Activations are not quantized.

M rows   N out_features   K in_features
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3fast.kernels.cpu.lossless import is_lossless, unpack_rows
from qwen3fast.kernels.cpu.structures import (
    FP8_SPAN,
    GROUP,
    LANES,
    NL4_TABLE,
    ZERO_RECORD,
    bfloat16_scales,
    bits_of,
    in_features_of,
    is_nl4,
    record_levels,
    unpack_levels,
)

NUMBERS_AT_ONCE = 2**20  # in float32


def dequantized_linear(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """Return x @ weight.T, (..., N) bfloat16. x: (..., K) bfloat16; packed, scale: see `packed_linear`.

    int8 levels are whole numbers up to 127, which bfloat16 holds exactly: their scales multiply the product.
    """
    if is_lossless(packed, scale):
        return F.linear(x, _lossless_weight(packed, scale))
    if scale.dim() == 2:
        return _fp8_linear(x, packed, scale)
    if scale.dim() == 1:
        levels_NK = _in_rows(packed).view(torch.int8).bitwise_xor(-128).to(torch.bfloat16)  # byte - 128
        return (F.linear(x, levels_NK).float() * scale).to(torch.bfloat16)
    if scale.dtype == torch.uint8:
        return F.linear(x, _weight_with_records(packed, scale))
    return F.linear(x, _int4_weight(packed, scale))


def _lossless_weight(packed: Tensor, scale: Tensor) -> Tensor:
    """Return the weight, (N, K) bfloat16, unpacked some rows at a time."""
    weight_NK = torch.empty(packed.shape[0] * LANES, in_features_of(packed), dtype=torch.bfloat16)
    step = max(1, NUMBERS_AT_ONCE // weight_NK.shape[1])
    for row_R in torch.arange(len(weight_NK)).split(step):
        weight_NK[row_R] = unpack_rows(packed, scale, row_R)
    return weight_NK


def _fp8_linear(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """Return the product with a weight in fp8, whose numbers bfloat16 holds exactly."""
    numbers_NK = _in_rows(packed).view(torch.float8_e4m3fn).to(torch.bfloat16)
    if len(scale) == len(numbers_NK):
        return (F.linear(x, numbers_NK).float() * scale[:, 0]).to(torch.bfloat16)
    for numbers, by_block in zip(numbers_NK.split(FP8_SPAN, dim=1), scale.unbind(1), strict=True):
        numbers.mul_(by_block.repeat_interleave(LANES)[:, None])
    return F.linear(x, numbers_NK)


def _int4_weight(packed: Tensor, scale: Tensor) -> Tensor:
    """Return the weight that 4 bits stand for, (N, K) bfloat16."""
    levels_NGC = _levels(packed, 4)
    scale_NG = bfloat16_scales(scale).transpose(1, 2).reshape(len(levels_NGC), -1)
    return ((levels_NGC.to(torch.bfloat16) - 8) * scale_NG[..., None]).flatten(1)


def _weight_with_records(packed: Tensor, scale: Tensor) -> Tensor:
    """Return the same for uint4, uint5, int6 and nl4; in float32, some blocks at a time."""
    bits = bits_of(packed, scale)
    blocks, K = packed.shape[0], packed.shape[1] * 32 // bits
    weight_NK = torch.empty(blocks * LANES, K, dtype=torch.bfloat16)
    step = max(1, NUMBERS_AT_ONCE // (K * LANES))
    for start in range(0, blocks, step):
        part = slice(start, start + step)
        if bits == 6:
            numbers = (_levels(packed[part], 6).float() - 32).mul_(_signed_scales(scale[part]))
        elif is_nl4(K // scale.shape[1], scale.shape[2]):
            numbers = NL4_TABLE[_levels(packed[part], 4).int()].mul_(_signed_scales(scale[part]))
        else:
            scale_NG1, minimum_NG1 = _uint4_scales(scale[part], K)
            numbers = _levels(packed[part], bits).float().mul_(scale_NG1).sub_(minimum_NG1)
        weight_NK[start * LANES : (start + step) * LANES] = numbers.flatten(1)
    return weight_NK


def _uint4_scales(scale: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """Return the scale and the minimum of each group, (N, G, 1) float32 each."""
    blocks, spans, record = scale.shape
    groups = K // spans // GROUP
    d, rest = scale[..., : 2 * LANES].contiguous().view(torch.float16).float()[:, :, None], scale[..., 2 * LANES :]
    if record == ZERO_RECORD:
        pairs = [d.expand(-1, -1, groups, -1), (d * rest[:, :, None].float()).expand(-1, -1, groups, -1)]
    else:
        dmin = rest[..., : 2 * LANES].contiguous().view(torch.float16).float()[:, :, None]
        s, m = record_levels(rest[..., 2 * LANES :], groups).float().unbind(3)
        pairs = [d * s, dmin * m]
    first, second = (x.flatten(1, 2).transpose(1, 2).reshape(blocks * LANES, -1, 1) for x in pairs)
    return first, second


def _signed_scales(scale: Tensor) -> Tensor:
    """Return the scales of int6 and nl4, (N, X, 1) float32: X for each row."""
    scales = scale[..., : 2 * LANES].contiguous().view(torch.float16)[:, :, None].float()
    if scale.shape[2] > 2 * LANES:
        scales = scales * scale[..., 2 * LANES :].view(torch.int8).unflatten(2, (-1, LANES)).float()
    return scales.flatten(1, 2).transpose(1, 2).reshape(len(scale) * LANES, -1, 1)


def _levels(packed: Tensor, bits: int) -> Tensor:
    """Return levels of 4 to 6 bits, (N, G, 32) uint8, of 6 bits (N, K/16, 16)."""
    return unpack_levels(_in_rows(packed).view(packed.shape[0] * LANES, -1, 4), bits)


def _in_rows(packed: Tensor) -> Tensor:
    """Return the bytes in the order of rows, (N, bytes of a row) uint8; four neighboring bytes move as one number."""
    blocks, count = packed.shape[:2]
    words = packed.view(torch.int32).view(blocks, count, LANES).transpose(1, 2).contiguous()
    return words.view(blocks * LANES, count).view(torch.uint8)
