"""Types of 4 bits in GGUF whose levels our formats keep: their blocks of bytes -> packed weights.

A block holds channels of a row. Of Q4_0's and Q4_1's 32 channels, the first 16 are in the low halves of 16 bytes; of
Q4_K's 256, each 32 bytes hold 32 channels in the low halves and the next 32 in the high ones.
Source: block_q4_0, block_q4_1 and block_q4_K of ggml-common.h, get_scale_min_k4 of ggml-quants.c, both in
github.com/ggml-org/ggml.

R rows   K in_features   B blocks   G = K/32 groups
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qwen3fast.quantization.formats import FORMATS, GROUP, Format, Packed, pack_int4
from qwen3fast.quantization.uint4 import Layout, pack_minimums, pack_zeros


class Kept(NamedTuple):
    """A format that keeps a type's levels, and the function that packs rows of it, (R, bytes of a row) uint8."""

    format: Format
    pack: Callable[[np.ndarray], Packed]


def levels_of_q4_0(rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return levels (R, K) uint8 and scales (R, G) float32 of rows in Q4_0: the scale in float16, then 16 bytes."""
    block_RGB = torch.from_numpy(rows).view(len(rows), -1, 2 + GROUP // 2)
    return halves(block_RGB[..., 2:]), float16_at(block_RGB, 0)


def pack_q4_0(rows: np.ndarray) -> Packed:
    """Pack rows of Q4_0: the same levels, scales rounded to bfloat16 (by a share of 2^-9 at most)."""
    return pack_int4(*levels_of_q4_0(rows))


def pack_q4_0_exactly(rows: np.ndarray) -> Packed:
    """Pack rows of Q4_0, exactly, with 8 as the zero point."""
    level_RK, scale_RG = levels_of_q4_0(rows)
    return pack_zeros(level_RK, scale_RG, torch.full_like(scale_RG, 8))


def pack_q4_1(rows: np.ndarray) -> Packed:
    """Pack rows of Q4_1, exactly: the scale and the smallest number in float16, then 16 bytes."""
    block_RGB = torch.from_numpy(rows).view(len(rows), -1, 4 + GROUP // 2)
    d_RG, dmin_RG = float16_at(block_RGB, 0), -float16_at(block_RGB, 2)
    one_RG = torch.ones(block_RGB.shape[:2], dtype=torch.uint8)
    return pack_minimums(halves(block_RGB[..., 4:]), d_RG, dmin_RG, one_RG, one_RG)


def pack_q4_k(rows: np.ndarray) -> Packed:
    """Pack rows of Q4_K, exactly: d and dmin in float16, 12 bytes of s and m in 6 bits each, then 128 bytes."""
    block_RBX = torch.from_numpy(rows).view(len(rows), -1, 144)
    word_RBX = block_RBX.view(torch.int32)
    s_RB8, m_RB8 = scales_in_6_bits(word_RBX[..., 1:4])
    level_RK = halves(word_RBX[..., 4:].unflatten(2, (4, 8)))
    d_RB, dmin_RB = float16_at(block_RBX, 0), float16_at(block_RBX, 2)
    return pack_minimums(level_RK, d_RB, dmin_RB, s_RB8.flatten(1), m_RB8.flatten(1), is_short=True)


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


def _uint4(layout: Layout) -> Format:
    return FORMATS["uint4"].with_layout(lambda _: layout)


# The formats that keep each type's levels; the first one is the default.
KEPT = {
    "Q4_0": (Kept(FORMATS["int4"], pack_q4_0), Kept(_uint4(Layout(32, has_zero=True)), pack_q4_0_exactly)),
    "Q4_1": (Kept(_uint4(Layout(32)), pack_q4_1),),
    "Q4_K": (Kept(_uint4(Layout(256, is_short=True)), pack_q4_k),),
}
