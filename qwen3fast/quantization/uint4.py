"""uint4: 4 bits with a minimum or a zero point per group of channels, as AWQ, GPTQ and K-quants of GGUF have them.

Levels are 0 to 15; of uint5, 5 bits, 0 to 31. A record of scales covers `span`
neighboring channels of 16 rows; each of its fields holds 16 numbers, one per row:

    with a zero point, 48 bytes        d float16, zero uint8                        weight = d * (level - zero)
    with minimums, 64 + span bytes     d float16, dmin float16, then for each       weight = d * s * level - dmin * m
                                       32 channels s uint8, m uint8
    short, 256 bytes, span 256         d, dmin, then for each 32 channels s in 6 bits, above it the 2 high bits of m;
                                       then the 4 low bits of m: groups 0 to 3, and in high halves 4 to 7

The first holds AWQ and GPTQ exactly (span: their group; scales in float16), the second Q4_1 (span 32), the third Q4_K.
uint5 has the first for Q5_0 and the second for Q5_1 (span 32 in both), the third for Q5_K.
Source of minimums: K-quants, pull request 1684 of github.com/ggml-org/llama.cpp.

    N out_features   K in_features   G = K/32 groups   P = K/span   R rows
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from qwen3fast.kernels.cpu.structures import SHORT_RECORD, SHORT_SPAN, ZERO_RECORD, bits_of, is_record, record_levels
from qwen3fast.quantization.packed import (
    GROUP,
    LANES,
    Packed,
    by_blocks,
    float16_of_rows,
    levels_of_rows,
    pack_levels,
    sum_of_halves,
)

SPANS = (256, 128, 64, 32)
HEAD = 4 * LANES  # bytes of d and dmin
# Ends of the range, as shares of the group's smallest and largest weight; the least squared error decides.
RANGES = (1.0, 0.95, 0.9, 0.85, 0.8)


class Layout(NamedTuple):
    """The record of scales.

    span: channels that it covers. has_zero: it has a zero point instead of minimums. is_short: s and m have 6 bits.
    """

    span: int
    has_zero: bool = False
    is_short: bool = False

    @classmethod
    def of(cls, packed: Packed) -> Layout:
        """Return the layout of a packed weight."""
        return cls.of_shape(tuple(packed.scale.shape), packed.weight.shape[1] * 32 // bits_of(*packed))

    @classmethod
    def of_shape(cls, shape: tuple[int, ...], in_features: int) -> Layout:
        """Return the layout of scales of this shape."""
        span = in_features // shape[1]
        return cls(span, shape[2] == ZERO_RECORD, (span, shape[2]) == (SHORT_SPAN, SHORT_RECORD))

    @classmethod
    def default(cls, in_features: int) -> Layout:
        """Return the layout in which weights are quantized: minimums, the largest span that divides K."""
        return cls(next(span for span in SPANS if in_features % span == 0))

    @classmethod
    def short(cls, in_features: int) -> Layout:
        """Return the layout of Q4_K and Q5_K, for any K that is a multiple of 256."""
        return cls(SHORT_SPAN, is_short=True)

    @property
    def record(self) -> int:
        """Return the bytes of a record."""
        return ZERO_RECORD if self.has_zero else SHORT_RECORD if self.is_short else HEAD + self.span

    def shape(self, out_features: int, in_features: int) -> tuple[int, int, int]:
        """Return the shape of the scales of an (N, K) weight."""
        return out_features // LANES, in_features // self.span, self.record


def is_layout(shape: tuple[int, ...], out_features: int, in_features: int) -> bool:
    """Return whether scales of this shape are some layout's of an (N, K) weight."""
    if len(shape) != 3 or not shape[1] or in_features % shape[1]:
        return False
    span = in_features // shape[1]
    is_whole = span % GROUP == 0 and shape[:2] == Layout(span).shape(out_features, in_features)[:2]
    return is_whole and is_record(span, shape[2])


def pack_zeros(level_NK: Tensor, d_NP: Tensor, zero_NP: Tensor, bits: int = 4) -> Packed:
    """Pack levels (uint8, of 4 or 5 bits), a scale, rounded to float16, and a zero point (0 to 255) per span."""
    d, zero = by_blocks(d_NP.to(torch.float16)), by_blocks(zero_NP.to(torch.uint8))
    return Packed(pack_levels(level_NK, bits), torch.cat([d.view(torch.uint8), zero], dim=2))


def pack_minimums(
    level_NK: Tensor, d_NP: Tensor, dmin_NP: Tensor, s_NG: Tensor, m_NG: Tensor, is_short: bool = False, bits: int = 4
) -> Packed:
    """Pack levels (uint8, of 4 or 5 bits), d and dmin per span, rounded to float16, and s and m per 32 channels.

    s and m are from 0 to 255; is_short: to 63, in 6 bits.
    """
    N, P = d_NP.shape
    heads = [by_blocks(x.to(torch.float16)).view(torch.uint8) for x in (d_NP, dmin_NP)]
    of_groups = [by_blocks(x.to(torch.uint8)).view(N // LANES, P, -1, LANES) for x in (s_NG, m_NG)]
    if is_short:
        s, m = of_groups
        low, high = (m & 15).chunk(2, dim=2)
        tail = torch.cat([s | m >> 4 << 6, low | high << 4], dim=2).flatten(2)
    else:
        tail = torch.stack(of_groups, dim=3).flatten(2)  # (N/16, P, groups * 2 * 16)
    return Packed(pack_levels(level_NK, bits), torch.cat([*heads, tail], dim=2))


def rows_uint4(packed: Packed, row_R: Tensor) -> Tensor:
    """Return rows of the weight, (R, K) float32."""
    level_RGC = levels_of_rows(packed, row_R, bits_of(*packed)).float()
    scale_RG, minimum_RG = scales_uint4(packed, row_R)
    return (level_RGC * scale_RG[..., None] - minimum_RG[..., None]).flatten(1)


def scales_uint4(packed: Packed, row_R: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scale and the minimum of each group of some rows, (R, G) float32."""
    layout, block_R, lane_R = Layout.of(packed), row_R // LANES, row_R % LANES
    groups = layout.span // GROUP
    d_RP1 = float16_of_rows(packed.scale, row_R)
    if layout.has_zero:
        zero_RP1 = packed.scale[..., 2 * LANES :][block_R, :, lane_R].float()[..., None]
        return tuple(x.expand(-1, -1, groups).flatten(1) for x in (d_RP1, d_RP1 * zero_RP1))  # type: ignore[return-value]
    tail = record_levels(packed.scale[..., HEAD:], groups)
    s_RPg, m_RPg = tail[block_R, ..., lane_R].float().unbind(-1)
    return (d_RP1 * s_RPg).flatten(1), (float16_of_rows(packed.scale, row_R, 2 * LANES) * m_RPg).flatten(1)


def quantize_uint4(weight_NK: Tensor, layout_of: Callable[[int], Layout] = Layout.default, bits: int = 4) -> Packed:
    """Quantize to 4 bits: with a scale and a minimum per 32 channels, both in 8 bits of a float16 per span, by default.

    Each group's range includes 0 and is the one of `RANGES` with the least squared error. A span with NaN or infinity
    becomes NaN. layout_of: the layout of scales, given K; groups of one with zero points are spans. bits: 5 for uint5.
    """
    N, K = weight_NK.shape
    most = (1 << bits) - 1
    span, has_zero, is_short = layout_of(K)
    group = weight_NK.float().view(N, -1, span if has_zero else GROUP)
    is_sound = group.view(N, -1, span).isfinite().all(dim=2)
    scale_NG, minimum_NG = _best_range(group, most)
    if has_zero:
        d_NP = scale_NG.to(torch.float16).float()
        zero_NP = torch.round(minimum_NG / d_NP.where(d_NP > 0, 1.0)).nan_to_num(0).clamp(0, most)
        level = _levels(group, d_NP[..., None], (d_NP * zero_NP)[..., None], most)
        return pack_zeros(level.to(torch.uint8).view(N, K), d_NP.where(is_sound, torch.nan), zero_NP, bits)
    d_NP, s_NG = _in_steps(scale_NG, span, 63 if is_short else 255)
    dmin_NP, m_NG = _in_steps(minimum_NG, span, 63 if is_short else 255)
    step, minimum = ((s * d.repeat_interleave(span // GROUP, 1)) for s, d in ((s_NG, d_NP), (m_NG, dmin_NP)))
    level = _levels(group, step[..., None], minimum[..., None], most)
    d_NP = d_NP.where(is_sound, torch.nan)
    return pack_minimums(level.to(torch.uint8).view(N, K), d_NP, dmin_NP, s_NG, m_NG, is_short, bits)


def _best_range(group: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return the scale and the minimum, which is taken off, of each group, (N, G). most: the highest level."""
    high, low = (end.amax(dim=2, keepdim=True).clamp(min=0) for end in (group, -group))
    best = [torch.zeros_like(high), torch.zeros_like(high), torch.full_like(high, torch.inf)]
    for share in RANGES:
        scale, minimum = (high + low) * (share / most), low * share
        error = (_levels(group, scale, minimum, most) * scale - minimum - group).square()
        error = sum_of_halves(error) if group.shape[2] == GROUP else error.sum(dim=2, keepdim=True)
        is_better = error < best[2]
        best = [x.where(is_better, old) for x, old in zip((scale, minimum, error), best, strict=True)]
    return best[0].squeeze(2), best[1].squeeze(2)


def _levels(group: Tensor, scale: Tensor, minimum: Tensor, most: int) -> Tensor:
    return torch.round((group + minimum) / scale.where(scale > 0, 1.0)).nan_to_num(0).clamp(0, most)


def _in_steps(number_NG: Tensor, span: int, steps: int) -> tuple[Tensor, Tensor]:
    """Return numbers from 0 on as a float16 per span (as float32), (N, P), times 0 to `steps`, (N, G)."""
    largest_NP = number_NG.unflatten(1, (-1, span // GROUP)).amax(dim=2)
    unit_NP = (largest_NP / steps).to(torch.float16).float()
    unit_NG = unit_NP.repeat_interleave(span // GROUP, 1)
    return unit_NP, torch.round(number_NG / unit_NG.where(unit_NG > 0, 1.0)).nan_to_num(0).clamp(0, steps)
