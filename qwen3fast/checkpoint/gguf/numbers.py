"""Numbers of GGUF's types of more than 4 bits: bit for bit the gguf package's, in PyTorch, which is faster.

Source: block_q8_0, block_q5_K and block_q6_K of ggml-common.h, and their dequantization in ggml-quants.c, both in
github.com/ggml-org/ggml.

R rows   K in_features   B blocks of all rows
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from qwen3fast.checkpoint.gguf.levels import float16_at, halves, scales_in_6_bits


def numbers_of_q8_0(rows: np.ndarray) -> Tensor:
    """Return (R, K) float32 of rows in Q8_0, (R, bytes of a row): per 32 channels a float16 scale, then 32 bytes."""
    block_BX = torch.from_numpy(rows).view(-1, 34)
    level_BC = block_BX[:, 2:].contiguous().view(torch.int8)
    return (level_BC * float16_at(block_BX, 0)[:, None]).view(len(rows), -1)


def numbers_of_q5_k(rows: np.ndarray) -> Tensor:
    """Return (R, K) float32 of rows in Q5_K: as Q4_K, with 32 bytes of highest bits before the halves.

    Bit g of byte i belongs to channel i of the 32 channels of group g.
    """
    block_BX = torch.from_numpy(rows).view(-1, 176)
    word_BX = block_BX.view(torch.int32)  # four bytes at a time
    s_B8, m_B8 = scales_in_6_bits(word_BX[:, 1:4])
    low_B8C = halves(word_BX[:, 12:].unflatten(1, (4, 8))).view(-1, 8, 32)
    high_B8C = torch.stack([word_BX[:, 4:12] >> g & 0x01010101 for g in range(8)], dim=1).view(torch.uint8)
    scale_B8 = float16_at(block_BX, 0)[:, None] * s_B8
    minimum_B8 = float16_at(block_BX, 2)[:, None] * m_B8
    level_B8C = low_B8C | high_B8C << 4
    return (level_B8C * scale_B8[..., None] - minimum_B8[..., None]).view(len(rows), -1)


def numbers_of_q6_k(rows: np.ndarray) -> Tensor:
    """Return (R, K) float32 of rows in Q6_K: per 256 channels 128 bytes of halves, 64 of high bits, 16 scales, d.

    Each half of a block has 64 bytes of halves, for channels i and 64 + i, and 32 bytes of two bits each, for channels
    i, 32 + i, 64 + i and 96 + i. A level is from -32 to 31, a scale is of 16 channels.
    """
    block_BX = torch.from_numpy(rows).view(-1, 210)
    pair_BX = block_BX.view(torch.int16)  # two bytes at a time
    low_BC = halves(pair_BX[:, :64].unflatten(1, (2, 32)))
    high_B2X = pair_BX[:, 64:96].unflatten(1, (2, 16))
    high_BC = torch.cat([high_B2X >> shift & 0x0303 for shift in (0, 2, 4, 6)], dim=2).flatten(1).view(torch.uint8)
    level_BSC = (low_BC | high_BC << 4).view(torch.int8).view(-1, 16, 16) - 32
    scale_BS = float16_at(block_BX, 208)[:, None] * block_BX[:, 192:208].contiguous().view(torch.int8)
    return (level_BSC * scale_BS[..., None]).view(len(rows), -1)


NUMBERS = {"Q8_0": numbers_of_q8_0, "Q5_K": numbers_of_q5_k, "Q6_K": numbers_of_q6_k}
