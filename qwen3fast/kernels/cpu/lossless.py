"""Packing of weights in bfloat16 in 12 bits per number (lossless.h).

N out_features   K in_features   W words of 16 bits per row
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwen3fast.kernels.cpu.library import functions
from qwen3fast.kernels.cpu.structures import CODED, CODED_WORDS, LANES, RECORD, address, require

MULTIPLE = 64  # of K
MAX_CHANNELS = 2**16 - 1  # exceptions have numbers of 16 bits


def packed_shape(out_features: int, in_features: int) -> tuple[int, ...]:
    """Return the shape of the packed bytes, as other formats have it; each row's bytes follow the previous row's."""
    words = in_features // CODED * CODED_WORDS + in_features % CODED
    return (out_features // LANES, words // 2, LANES, 4)


def pack_lossless(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Return a weight, (N, K) bfloat16, as packed bytes, (N/16, W/2, 16, 4), and scales, which are of any length.

    Raises: ValueError for another dtype, device, shape or layout.
    """
    N, K = weight_NK.shape
    weight = address("pack_lossless: weight", weight_NK, torch.bfloat16, N, K)
    require(
        N % LANES == 0 and K % MULTIPLE == 0 and K <= MAX_CHANNELS,
        "pack_lossless: N a multiple of 16, K of 64, below 65,536",
    )
    records, threads = weight_NK.new_empty(N * RECORD, dtype=torch.uint8), torch.get_num_threads()
    exceptions = functions().qwen3fast_plan_lossless(weight, N, K, records.data_ptr(), threads)
    require(N * RECORD // 4 + exceptions < 2**31, "pack_lossless: more exceptions than a record can count")
    scale = torch.cat([records, records.new_empty(exceptions * 4)])
    packed = records.new_empty(packed_shape(N, K))
    functions().qwen3fast_pack_lossless(weight, N, K, scale.data_ptr(), packed.data_ptr(), threads)
    return packed, scale
