"""Types in GGUF whose levels our formats keep: their blocks of bytes -> packed weights.

A block holds channels of a row. Of Q4_0's to Q5_1's 32 channels, the first 16 are in the low halves of 16 bytes; of
Q4_K's 256, each 32 bytes hold 32 channels in the low halves and the next 32 in the high ones. Q5_K and Q6_K have 256
channels as well. IQ4_NL's blocks are as Q4_0's, and IQ4_XS has 256 channels in eight of them.
Source: block_q4_0 to block_q5_1, block_q4_K to block_q6_K and block_iq4_xs of ggml-common.h, get_scale_min_k4 of
ggml-quants.c, both in github.com/ggml-org/ggml.

R rows   K in_features   B blocks   G = K/32 groups
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qwen3fast.quantization.formats import GROUP, SAVED_FORMATS, SHORT_NL4, Format, Packed, pack_int4
from qwen3fast.quantization.int6 import pack_int6
from qwen3fast.quantization.nl4 import pack_nl4
from qwen3fast.quantization.uint4 import Layout, pack_minimums, pack_zeros


class Kept(NamedTuple):
    """A format that keeps a type's levels, and the function that packs rows of it, (R, bytes of a row) uint8."""

    format: Format
    pack: Callable[[np.ndarray], Packed]


def read_32(rows: np.ndarray, num_floats: int = 1, bits: int = 4) -> tuple[Tensor, ...]:
    """Return levels (R, K) uint8 of rows in blocks of 32 channels, and the float16 numbers that each block begins with.

    These are one or two tensors, (R, G) float32. Then come, with 5 bits, 4 bytes of fifth bits, one per channel; and 16
    bytes of halves.
    """
    begin = 2 * num_floats + (4 if bits == 5 else 0)
    block_RGB = torch.from_numpy(rows).view(len(rows), -1, begin + GROUP // 2)
    level_RK = halves(block_RGB[..., begin:])
    if bits == 5:
        shift_C = torch.arange(GROUP, dtype=torch.int32, device="cpu")
        high = block_RGB[..., begin - 4 : begin].contiguous().view(torch.int32) >> shift_C & 1
        level_RK |= high.to(torch.uint8).flatten(1) << 4
    return level_RK, *(float16_at(block_RGB, 2 * i) for i in range(num_floats))


def pack_q4_0(rows: np.ndarray) -> Packed:
    """Pack rows of Q4_0: the same levels, scales rounded to bfloat16 (by a share of 2^-9 at most)."""
    return pack_int4(*read_32(rows))


def pack_zero(rows: np.ndarray, bits: int) -> Packed:
    """Pack rows of Q4_0 or Q5_0, exactly: a scale, and the middle level as the zero point."""
    level_RK, scale_RG = read_32(rows, bits=bits)
    return pack_zeros(level_RK, scale_RG, torch.full_like(scale_RG, 2 ** (bits - 1)), bits=bits)


def pack_minimum(rows: np.ndarray, bits: int) -> Packed:
    """Pack rows of Q4_1 or Q5_1, exactly: the scale, and the smallest number."""
    level_RK, d_RG, least_RG = read_32(rows, num_floats=2, bits=bits)
    one_RG = torch.ones_like(d_RG, dtype=torch.uint8)
    return pack_minimums(level_RK, d_RG, -least_RG, one_RG, one_RG, bits=bits)


def pack_k(rows: np.ndarray, bits: int) -> Packed:
    """Pack rows of Q4_K or Q5_K, exactly: d and dmin in float16, 12 bytes of s and m in 6 bits, 128 bytes of halves.

    Q5_K has 32 bytes of highest bits before the halves: bit g of byte i belongs to channel i of the 32 of group g.
    """
    block_RBX = torch.from_numpy(rows).view(len(rows), -1, 176 if bits == 5 else 144)
    word_RBX = block_RBX.view(torch.int32)  # four bytes at a time
    level_RK = halves(word_RBX[..., -32:].unflatten(2, (4, 8)))
    if bits == 5:
        high_RB8X = torch.stack([word_RBX[..., 4:12] >> g & 0x01010101 for g in range(8)], dim=2)
        level_RK |= high_RB8X.flatten(1).view(torch.uint8) << 4
    s_RB8, m_RB8 = scales_in_6_bits(word_RBX[..., 1:4])
    d_RB, dmin_RB = float16_at(block_RBX, 0), float16_at(block_RBX, 2)
    return pack_minimums(level_RK, d_RB, dmin_RB, s_RB8.flatten(1), m_RB8.flatten(1), is_short=True, bits=bits)


def pack_q6_k(rows: np.ndarray) -> Packed:
    """Pack rows of Q6_K, exactly: per 256 channels 128 bytes of halves, 64 of high bits, 16 scales, d.

    Each half of a block has 64 bytes of halves, for channels i and 64 + i, and 32 bytes of two bits each, for channels
    i, 32 + i, 64 + i and 96 + i. A scale is of 16 channels; 32 is the level of zero.
    """
    block_RBX = torch.from_numpy(rows).view(len(rows), -1, 210)
    pair_RBX = block_RBX.view(torch.int16)  # two bytes at a time
    low_RK = halves(pair_RBX[..., :64].unflatten(2, (2, 32)))
    high_RB2X = pair_RBX[..., 64:96].unflatten(2, (2, 16))
    high_RB2X = torch.cat([high_RB2X >> shift & 0x0303 for shift in (0, 2, 4, 6)], dim=3)
    scale_RS = block_RBX[..., 192:208].contiguous().view(torch.int8).flatten(1)
    return pack_int6(low_RK | high_RB2X.flatten(1).view(torch.uint8) << 4, float16_at(block_RBX, 208), scale_RS)


def pack_iq4_nl(rows: np.ndarray) -> Packed:
    """Pack rows of IQ4_NL, exactly."""
    return pack_nl4(*read_32(rows))


def pack_iq4_xs(rows: np.ndarray) -> Packed:
    """Pack rows of IQ4_XS, exactly: d in float16; high and low bits of 8 scales, in 2 and 4 bytes; 128 bytes."""
    block_RBX = torch.from_numpy(rows).view(len(rows), -1, 136)
    high_RB1 = block_RBX[..., 2:4].contiguous().view(torch.int16).int()
    high_RB8 = (high_RB1 >> torch.arange(0, 16, 2, device="cpu") & 3) << 4
    low_RB8 = torch.stack([block_RBX[..., 4:8] & 15, block_RBX[..., 4:8] >> 4], dim=-1).flatten(2)
    level_RK = halves(block_RBX[..., 8:].unflatten(2, (8, 16)))
    return pack_nl4(level_RK, float16_at(block_RBX, 0), ((high_RB8 | low_RB8) - 32).flatten(1))


def scales_in_6_bits(word: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scales and the minimums, (..., 8) uint8, from the 12 bytes that a block of Q4_K has for them.

    word: these bytes, (..., 3) int32. The low 6 bits of each byte of the first two are of groups 0 to 3; the third has
    4 bits of each of the others, whose high 2 bits are in the first two.
    """
    a, b, c = word.unbind(-1)
    results = []
    for first, low in ((a, c), (b, c >> 4)):
        later = low & 0x0F0F0F0F | (first >> 6 & 0x03030303) << 4
        results.append(torch.stack([first & 0x3F3F3F3F, later], dim=-1).view(torch.uint8))
    return results[0], results[1]


def halves(byte: Tensor) -> Tensor:
    """Return low halves, then high halves of the last dimension, row by row: (R, ..., C) -> (R, K) uint8.

    byte: uint8, or two or four bytes at a time in int16 or int32, which is faster.
    """
    mask = {1: 0x0F, 2: 0x0F0F, 4: 0x0F0F0F0F}[byte.element_size()]
    return torch.cat([byte & mask, byte >> 4 & mask], dim=-1).flatten(1).view(torch.uint8)


def float16_at(block: Tensor, first: int) -> Tensor:
    """Return the float16 number at a byte of each block, (..., bytes of a block) -> (...) float32."""
    return block[..., first : first + 2].contiguous().view(torch.float16).squeeze(-1).float()


def _affine(name: str, layout: Layout) -> Format:
    return SAVED_FORMATS[name].with_layout(lambda _: layout)


# The formats that keep each type's levels; the first one is the default.
KEPT = {
    "Q4_0": (
        Kept(SAVED_FORMATS["int4"], pack_q4_0),
        Kept(_affine("uint4", Layout(32, has_zero=True)), partial(pack_zero, bits=4)),
    ),
    "Q4_1": (Kept(_affine("uint4", Layout(32)), partial(pack_minimum, bits=4)),),
    "Q5_0": (Kept(_affine("uint5", Layout(32, has_zero=True)), partial(pack_zero, bits=5)),),
    "Q5_1": (Kept(_affine("uint5", Layout(32)), partial(pack_minimum, bits=5)),),
    "Q4_K": (Kept(SAVED_FORMATS["uint4"].with_layout(Layout.short), partial(pack_k, bits=4)),),
    "Q5_K": (Kept(SAVED_FORMATS["uint5"], partial(pack_k, bits=5)),),
    "Q6_K": (Kept(SAVED_FORMATS["int6"], pack_q6_k),),
    "IQ4_NL": (Kept(SHORT_NL4, pack_iq4_nl),),
    "IQ4_XS": (Kept(SAVED_FORMATS["nl4"], pack_iq4_xs),),
}
