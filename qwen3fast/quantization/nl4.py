"""nl4: levels of 4 bits that stand for the numbers of a table, denser around zero, as in IQ4_NL and IQ4_XS of GGUF.

weight = d * s * NL4_TABLE[level], exactly as these types define it. A record of scales covers 256 channels of 16 rows,
in 160 bytes: d float16, then s int8 for each 32 channels; or 32 channels, in 32 bytes: d alone, and s is 1. Each field
holds 16 numbers, one per row.

    N out_features   K in_features   G = K/32   P = records of a row   R rows
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwen3fast.kernels.cpu.structures import NL4_RECORD, NL4_SHORT_RECORD, NL4_SPAN, NL4_TABLE
from qwen3fast.quantization.packed import (
    GROUP,
    LANES,
    Packed,
    levels_of_rows,
    pack_halves,
    pack_signed_scales,
    signed_scales,
    signed_scales_of_rows,
    sum_of_halves,
)

BORDERS = (NL4_TABLE[1:] + NL4_TABLE[:-1]) / 2  # between the numbers of neighboring levels
GROUPS = NL4_SPAN // GROUP  # in a record
# Numbers that a group's largest weight is mapped to, one after the other; the least squared error decides.
LARGEST = (-127.0, -117.0, -107.0, -104.0, -138.0, 113.0, 103.0, 123.0)


def nl4_shape(out_features: int, in_features: int, span: int = NL4_SPAN) -> tuple[int, int, int]:
    """Return the shape of the scales of an (N, K) weight, a record per `span` channels, 256 or 32."""
    return out_features // LANES, in_features // span, NL4_RECORD if span == NL4_SPAN else NL4_SHORT_RECORD


def pack_nl4(level_NK: Tensor, d_NP: Tensor, s_NG: Tensor | None = None) -> Packed:
    """Pack levels (uint8, 0 to 15), d per record, rounded to float16, and s (-128 to 127) per 32 channels, or none."""
    return Packed(pack_halves(level_NK), pack_signed_scales(d_NP, s_NG))


def rows_nl4(packed: Packed, row_R: Tensor) -> Tensor:
    """Return rows of the weight, (R, K) float32."""
    number_RGC = NL4_TABLE.to(row_R.device)[levels_of_rows(packed, row_R).int()]
    numbers_RK: Tensor = (number_RGC * signed_scales_of_rows(packed.scale, row_R)[..., None]).flatten(1)
    return numbers_RK


def quantize_nl4(weight_NK: Tensor, span: int = NL4_SPAN) -> Packed:
    """Quantize to levels of 4 bits with a scale per 32 channels. A record with NaN or infinity becomes NaN.

    weight_NK: any float dtype; N is a multiple of 16, K of `span`, 256 or 32.
    """
    N, K = weight_NK.shape
    group_NGC = weight_NK.float().view(N, -1, GROUP)
    is_sound_NP = group_NGC.view(N, -1, span).isfinite().all(dim=2)
    scale_NG = _best_scale(group_NGC)
    if span == GROUP:
        d_NP, s_NG = scale_NG.to(torch.float16).float(), None
        scale_NG = d_NP
    else:
        d_NP, s_NG = signed_scales(scale_NG, GROUPS)
        scale_NG = d_NP.repeat_interleave(GROUPS, 1) * s_NG
    level_NGC = _levels(group_NGC, scale_NG[..., None])
    return pack_nl4(level_NGC.to(torch.uint8).view(N, K), d_NP.where(is_sound_NP, torch.nan), s_NG)


def _best_scale(group_NGC: Tensor) -> Tensor:
    """Return the scale of each 32 channels, (N, G): for chosen levels, the one with the least squared error."""
    largest = group_NGC.gather(-1, group_NGC.abs().argmax(dim=-1, keepdim=True))
    best, best_error = torch.zeros_like(largest), torch.full_like(largest, torch.inf)
    for number in LARGEST:
        chosen_NGC = NL4_TABLE[_levels(group_NGC, largest / number)]
        scale = sum_of_halves(group_NGC * chosen_NGC) / sum_of_halves(chosen_NGC.square())
        error = sum_of_halves((chosen_NGC * scale - group_NGC).square())
        is_better = error < best_error
        best, best_error = scale.where(is_better, best), error.where(is_better, best_error)
    return best.squeeze(-1)


def _levels(group_NGC: Tensor, scale: Tensor) -> Tensor:
    return torch.bucketize(group_NGC / scale.where(scale != 0, 1.0), BORDERS)
