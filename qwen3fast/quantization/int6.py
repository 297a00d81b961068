"""int6: 6 bits with a scale per 16 channels, as Q6_K of GGUF has them, exactly.

weight = d * s * (level - 32). A record of scales covers 256 channels of 16 rows, in 288 bytes: d float16, then s int8
for each 16 channels; each field holds 16 numbers, one per row.

    N out_features   K in_features   H = K/16   P = K/256   R rows
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwen3fast.kernels.cpu.structures import HALF_GROUP, INT6_RECORD, INT6_SPAN
from qwen3fast.quantization.packed import (
    LANES,
    Packed,
    levels_of_rows,
    pack_levels,
    pack_signed_scales,
    signed_scales,
    signed_scales_of_rows,
    sum_of_halves,
)

BITS, ZERO = 6, 32
HALVES = INT6_SPAN // HALF_GROUP  # scales in a record
# Ends of the range, as shares of the largest weight of 16 channels; the one with the least squared error is taken.
RANGES = (1.0, 1.03, 0.97, 0.94, 0.91)


def int6_shape(out_features: int, in_features: int) -> tuple[int, int, int]:
    """Return the shape of the scales of an (N, K) weight."""
    return out_features // LANES, in_features // INT6_SPAN, INT6_RECORD


def pack_int6(level_NK: Tensor, d_NP: Tensor, s_NH: Tensor) -> Packed:
    """Pack levels (uint8, 0 to 63; 32 is zero), d per 256 channels, rounded to float16, and s (-128 to 127) per 16."""
    return Packed(pack_levels(level_NK, BITS), pack_signed_scales(d_NP, s_NH))


def rows_int6(packed: Packed, row_R: Tensor) -> Tensor:
    """Return rows of the weight, (R, K) float32."""
    level_RHC = levels_of_rows(packed, row_R, BITS).float() - ZERO
    numbers_RK: Tensor = (level_RHC * signed_scales_of_rows(packed.scale, row_R)[..., None]).flatten(1)
    return numbers_RK


def quantize_int6(weight_NK: Tensor) -> Packed:
    """Quantize to 6 bits. Each 16 channels take the range with the least squared error.

    weight_NK: any float dtype; N is a multiple of 16, K of 256. A record with NaN or infinity becomes NaN.
    """
    N, K = weight_NK.shape
    half_NHC = weight_NK.float().view(N, -1, HALF_GROUP)
    is_sound_NP = half_NHC.view(N, -1, INT6_SPAN).isfinite().all(dim=2)
    d_NP, s_NH = signed_scales(_best_scale(half_NHC), HALVES)
    d_NH = d_NP.repeat_interleave(HALVES, 1)
    level_NHC = _levels(half_NHC, (d_NH * s_NH)[..., None]) + ZERO
    return pack_int6(level_NHC.to(torch.uint8).view(N, K), d_NP.where(is_sound_NP, torch.nan), s_NH)


def _best_scale(half_NHC: Tensor) -> Tensor:
    """Return the scale of each 16 channels, (N, H): -32 is on the side of the largest weight."""
    largest = half_NHC.gather(-1, half_NHC.abs().argmax(dim=-1, keepdim=True))
    best, best_error = torch.zeros_like(largest), torch.full_like(largest, torch.inf)
    for share in RANGES:
        scale = largest * (-share / ZERO)
        error = sum_of_halves((_levels(half_NHC, scale) * scale - half_NHC).square())
        is_better = error < best_error
        best, best_error = scale.where(is_better, best), error.where(is_better, best_error)
    return best.squeeze(-1)


def _levels(half_NHC: Tensor, scale: Tensor) -> Tensor:
    return torch.round(half_NHC / scale.where(scale != 0, 1.0)).nan_to_num(0).clamp(-ZERO, ZERO - 1)
