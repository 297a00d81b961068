"""Numbers of GGUF's types of more than 4 bits: bit for bit the gguf package's, in PyTorch, which is faster.

Source: block_q8_0 of ggml-common.h, and the dequantization in ggml-quants.c, both in github.com/ggml-org/ggml.

R rows   K in_features   B blocks of all rows
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from qwen3fast.checkpoint.gguf.levels import float16_at, levels_of_q5_k, levels_of_q6_k


def numbers_of_q8_0(rows: np.ndarray) -> Tensor:
    """Return (R, K) float32 of rows in Q8_0, (R, bytes of a row): per 32 channels a float16 scale, then 32 bytes."""
    block_BX = torch.from_numpy(rows).view(-1, 34)
    level_BC = block_BX[:, 2:].contiguous().view(torch.int8)
    return (level_BC * float16_at(block_BX, 0)[:, None]).view(len(rows), -1)


def numbers_of_q5_k(rows: np.ndarray) -> Tensor:
    """Return (R, K) float32 of rows in Q5_K, (R, bytes of a row)."""
    level_B8C, (d_B1, dmin_B1), (s_B8, m_B8) = levels_of_q5_k(rows)
    number_B8C = level_B8C * (d_B1 * s_B8)[..., None] - (dmin_B1 * m_B8)[..., None]
    return number_B8C.view(len(rows), -1)


def numbers_of_q6_k(rows: np.ndarray) -> Tensor:
    """Return (R, K) float32 of rows in Q6_K, (R, bytes of a row)."""
    level_BSC, d_B1, s_BS = levels_of_q6_k(rows)
    return ((level_BSC.view(torch.int8) - 32) * (d_B1 * s_BS)[..., None]).view(len(rows), -1)


NUMBERS = {"Q8_0": numbers_of_q8_0, "Q5_K": numbers_of_q5_k, "Q6_K": numbers_of_q6_k}
