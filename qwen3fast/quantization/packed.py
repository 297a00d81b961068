"""The order of quantized weights in memory and on disk, which all formats share.

Rows lie in blocks of 16, and in a block, 32 bits hold four or eight neighboring channels of a row (or the high bits of
16 or 32), followed by the same channels of the next row: a decode step streams through memory once, in order, and one
vector instruction takes 16 rows.

    N out_features   K in_features   R rows
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qwen3fast.kernels.cpu.structures import channels_of, unpack_levels

LANES = 16  # rows in a block
GROUP = 32  # channels that share a scale in 4 bits


class Packed(NamedTuple):
    """A quantized (N, K) weight.

    int8:  weight (N/16, K/4, 16, 4) uint8; scale (N,) float32, one per row.
    fp8:   the same with the bytes of float8_e4m3fn numbers; or scale (N/16, K/128) float32, rounded up, one per 16 rows
           and 128 channels.
    int4:  weight (N/16, K/8, 16, 4) uint8, channel 8j+i in the low half and 8j+4+i in the high half of byte i;
           scale (N/16, K/32, 16) bfloat16, one per 32 channels of a row; in memory, where these are the same numbers,
           (N/16, 1 + K/32, 16) int8: see `bfloat16_scales`.
    uint4: weight as in int4; scale (N/16, K/span, bytes of a record) uint8, see uint4.py.
    uint5: weight (N/16, K*5/32, 16, 4) uint8: of 32 channels as in int4, then their fifth bits, bit j of byte i for
           channel 4j+i; scale (N/16, K/256, 256) uint8.
    int6:  weight (N/16, K*6/32, 16, 4) uint8: of 16 channels as in int4, then their high bits, bits 2j and 2j+1 of byte
           i for channel 4j+i; scale (N/16, K/256, 288) uint8, see int6.py.
    nl4:   weight as in int4; scale (N/16, K/256, 160) uint8, or (N/16, K/32, 32), see nl4.py.
    """

    weight: Tensor
    scale: Tensor


def pack_bytes(byte_NK: Tensor) -> Tensor:
    """Return one byte per weight, (N, K) uint8, in the order of 8-bit formats, (N/16, K/4, 16, 4)."""
    return _by_fours(byte_NK.contiguous().view(torch.int32))


def bytes_of_rows(packed: Packed, row_R: Tensor) -> Tensor:
    """Return the bytes of some rows in 8 bits, (R, K)."""
    return packed.weight[row_R // LANES, :, row_R % LANES].flatten(1)


def pack_levels(level_NK: Tensor, bits: int) -> Tensor:
    """Return levels of 4, 5 or 6 bits (uint8) in the order of these formats, (N/16, K * bits / 32, 16, 4)."""
    if bits == 4:
        return pack_halves(level_NK)
    more, parts = bits - 4, channels_of(bits) // 4
    four_NUP = level_NK.contiguous().view(torch.int32).unflatten(1, (-1, parts))  # four levels at a time
    low, high_NU = four_NUP & 0x0F0F0F0F, torch.zeros_like(four_NUP[..., 0])
    for part in range(parts):
        high_NU |= (four_NUP[..., part] >> 4 & 0x03030303) << part * more
    lines = torch.cat([low[..., ::2] | low[..., 1::2] << 4, high_NU[..., None]], dim=2)
    return _by_fours(lines.flatten(1))


def pack_halves(level_NK: Tensor) -> Tensor:
    """Return 4-bit levels (uint8, 0 to 15) in the order of 4-bit formats, (N/16, K/8, 16, 4)."""
    # Four levels at a time: the second four of eight channels go to the high halves. No bit leaves its byte.
    low, high = level_NK.contiguous().view(torch.int32).unflatten(1, (-1, 2)).unbind(2)
    return _by_fours(low | high << 4)


def _by_fours(four_NX: Tensor) -> Tensor:
    """Return numbers of 32 bits, four bytes of a row each, in the order of all formats: (N/16, X, 16, 4) uint8."""
    return by_blocks(four_NX).view(torch.uint8).view(len(four_NX) // LANES, -1, LANES, 4)


def levels_of_rows(packed: Packed, row_R: Tensor, bits: int = 4) -> Tensor:
    """Return the levels of some rows in 4, 5 or 6 bits, (R, K/32, 32) uint8; of 6 bits (R, K/16, 16)."""
    return unpack_levels(packed.weight[row_R // LANES, :, row_R % LANES], bits)


def float16_of_rows(record: Tensor, row_R: Tensor, first: int = 0) -> Tensor:
    """Return the float16 number of some rows in each record, (R, P, 1) float32.

    record: (N/16, P, bytes of a record) uint8. first: the byte where the numbers of 16 rows begin.
    """
    block_R, lane_R = row_R // LANES, row_R % LANES
    byte_RP2 = torch.stack([record[block_R, :, first + 2 * lane_R + i] for i in (0, 1)], dim=2)
    return byte_RP2.view(torch.float16).float()


def float16_at_least(x: Tensor) -> Tensor:
    """Return the least float16 numbers that are not below x, float32 from 0 to 65504; NaN and infinity stay so."""
    nearest = x.to(torch.float16)
    next_one = (nearest.view(torch.int16) + 1).view(torch.float16)
    return torch.where(nearest.float() < x, next_one, nearest)


def signed_scales(scale_NS: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return d (N, S/count) float32, a float16 number, and s (N, S), -127 to 127, for which d * s is nearest to scales.

    scale_NS: float32. count: scales that share d, which is not below its exact value: s has 8 bits.
    """
    d_NP = float16_at_least(scale_NS.unflatten(1, (-1, count)).abs().amax(dim=2) / 127).float()
    d_NS = d_NP.repeat_interleave(count, 1)
    return d_NP, torch.round(scale_NS / d_NS.where(d_NS > 0, 1.0)).nan_to_num(0).clamp(-127, 127)


def pack_signed_scales(d_NP: Tensor, s_NS: Tensor | None) -> Tensor:
    """Return records of scales d * s, (N/16, P, bytes) uint8: d as float16, then s as int8, or none; see int6.py."""
    d = by_blocks(d_NP.to(torch.float16)).view(torch.uint8)
    if s_NS is None:
        return d
    return torch.cat([d, by_blocks(s_NS.to(torch.int8)).view(torch.uint8).view(*d.shape[:2], -1)], dim=2)


def signed_scales_of_rows(record: Tensor, row_R: Tensor) -> Tensor:
    """Return the scales that records of `pack_signed_scales` hold for some rows, (R, S) float32."""
    scale_RPC = float16_of_rows(record, row_R)
    if record.shape[2] > 2 * LANES:
        s = record[..., 2 * LANES :].view(torch.int8).unflatten(-1, (-1, LANES))
        scale_RPC = scale_RPC * s[row_R // LANES, ..., row_R % LANES].float()
    return scale_RPC.flatten(1)


def short_scales(scale: Tensor, least: Tensor) -> Tensor:
    """Return the nearest numbers with 3 bits of fraction, float32, as scales in bytes have.

    scale: float32. least: sizes that the results have at least, powers of two or 0.
    """
    bits = (scale.contiguous().view(torch.int32) + 2**19) & -(2**20)
    rounded = bits.view(torch.float32)
    return torch.copysign(torch.maximum(rounded.abs(), least), rounded)


def least_scales(weight_NK: Tensor) -> Tensor:
    """Return the least scale of each row's groups, (N, 1) float32: scales in bytes span 15 powers of two."""
    most_N1 = weight_NK.abs().amax(dim=1, keepdim=True) / 65536
    power_N1 = (most_N1.view(torch.int32) & 0x7F800000).view(torch.float32)
    return torch.where(most_N1.isfinite(), power_N1, 0.0)


def by_blocks(number_NX: Tensor) -> Tensor:
    """Return numbers of each row with rows of a block side by side, (N, X) -> (N/16, X, 16)."""
    return number_NX.view(len(number_NX) // LANES, LANES, -1).transpose(1, 2).contiguous()


def sum_of_halves(x: Tensor) -> Tensor:
    """Return sums over the last dimension (a power of two; kept) in an order that no machine changes."""
    while (half := x.shape[-1] // 2) > 0:
        x = x[..., :half] + x[..., half:]
    return x
