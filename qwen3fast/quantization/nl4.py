"""nl4: levels of 4 bits that stand for the numbers of a table, denser around zero, as in IQ4_NL and IQ4_XS of GGUF.

weight = d * s * TABLE[level], exactly as these types define it. A record of scales covers 256 channels of 16 rows, in
160 bytes: d float16, then s int8 for each 32 channels; or 32 channels, in 32 bytes: d alone, and s is 1. Each field
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
    by_blocks,
    float16_at_least,
    float16_of_rows,
    levels_of_rows,
    pack_halves,
    sum_of_halves,
)

TABLE = torch.tensor(NL4_TABLE, dtype=torch.float32)
BORDERS = (TABLE[1:] + TABLE[:-1]) / 2  # between the numbers of neighboring levels
GROUPS = NL4_SPAN // GROUP  # in a record
# Numbers that a group's largest weight is mapped to, one after the other; the least squared error decides.
LARGEST = (-127.0, -117.0, -107.0, -104.0, -138.0, 113.0, 103.0, 123.0)


def nl4_shape(out_features: int, in_features: int, span: int = NL4_SPAN) -> tuple[int, int, int]:
    """Return the shape of the scales of an (N, K) weight, a record per `span` channels, 256 or 32."""
    return out_features // LANES, in_features // span, NL4_RECORD if span == NL4_SPAN else NL4_SHORT_RECORD


def pack_nl4(level_NK: Tensor, d_NP: Tensor, s_NG: Tensor | None = None) -> Packed:
    """Pack levels (uint8, 0 to 15), d per record, rounded to float16, and s (-128 to 127) per 32 channels, or none."""
    N, P = d_NP.shape
    record = by_blocks(d_NP.to(torch.float16)).view(torch.uint8)
    if s_NG is not None:
        s = by_blocks(s_NG.to(torch.int8)).view(torch.uint8).view(N // LANES, P, GROUPS * LANES)
        record = torch.cat([record, s], dim=2)
    return Packed(pack_halves(level_NK), record)


def rows_nl4(packed: Packed, row_R: Tensor) -> Tensor:
    """Return rows of the weight, (R, K) float32."""
    number_RGC = TABLE.to(row_R.device)[levels_of_rows(packed, row_R).int()]
    scale_RPS = float16_of_rows(packed.scale, row_R)
    if packed.scale.shape[2] == NL4_RECORD:
        s = packed.scale[..., 2 * LANES :].view(torch.int8).unflatten(-1, (GROUPS, LANES))
        scale_RPS = scale_RPS * s[row_R // LANES, ..., row_R % LANES].float()
    return (number_RGC * scale_RPS.flatten(1)[..., None]).flatten(1)


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
    else:  # d is not below its exact value, which may be less than float16's least number: s has 8 bits
        d_NP = float16_at_least(scale_NG.view(N, -1, GROUPS).abs().amax(dim=2) / 127).float()
        d_NG = d_NP.repeat_interleave(GROUPS, 1)
        s_NG = torch.round(scale_NG / d_NG.where(d_NG > 0, 1.0)).nan_to_num(0).clamp(-127, 127)
        scale_NG = d_NG * s_NG
    level_NGC = _levels(group_NGC, scale_NG[..., None])
    return pack_nl4(level_NGC.to(torch.uint8).view(N, K), d_NP.where(is_sound_NP, torch.nan), s_NG)


def _best_scale(group_NGC: Tensor) -> Tensor:
    """Return the scale of each 32 channels, (N, G): for chosen levels, the one with the least squared error."""
    largest = group_NGC.gather(-1, group_NGC.abs().argmax(dim=-1, keepdim=True))
    best, best_error = torch.zeros_like(largest), torch.full_like(largest, torch.inf)
    for number in LARGEST:
        chosen_NGC = TABLE[_levels(group_NGC, largest / number)]
        scale = sum_of_halves(group_NGC * chosen_NGC) / sum_of_halves(chosen_NGC.square())
        error = sum_of_halves((chosen_NGC * scale - group_NGC).square())
        is_better = error < best_error
        best, best_error = scale.where(is_better, best), error.where(is_better, best_error)
    return best.squeeze(-1)


def _levels(group_NGC: Tensor, scale: Tensor) -> Tensor:
    return torch.bucketize(group_NGC / scale.where(scale != 0, 1.0), BORDERS)
