"""Qwen's "FP8" checkpoints: float8_e4m3fn numbers with a scale per block of 128 rows and 128 channels.

`weight` (N, K), `weight_scale_inv` (N/128, K/128), rounded up: blocks at the edges are cut. Despite its name,
numbers are multiplied by the scale. Experts have such tensors each, or stacked ones: `gate_up_proj` (X, N, K) and
`gate_up_proj_scale_inv`, and the same of `down_proj`.
Source: DeepSeek-V3 report, arXiv:2412.19437, section 3.3.2; transformers' finegrained_fp8.

N out_features   K in_features   X experts
"""

from __future__ import annotations

from torch import Tensor

from qwen3fast.checkpoint.prequantized.floats import Floats
from qwen3fast.checkpoint.prequantized.format import BLOCK, FLOATS, ExpectedTensor, PrequantizedFormat


def expected_tensors(stored: PrequantizedFormat, N: int, K: int) -> dict[str, ExpectedTensor]:
    """Return the tensors of a layer by the ends of their names."""
    return {
        "weight": ExpectedTensor((N, K), ("F8_E4M3",)),
        "weight_scale_inv": ExpectedTensor((-(-N // BLOCK), -(-K // BLOCK)), FLOATS),
    }


def expected_stacks(X: int, N: int, K: int) -> dict[str, ExpectedTensor]:
    """Return the tensors of stacked experts, whose names do not end in "weight"; none if an expert ends in a block."""
    if N % BLOCK:
        return {}
    return {
        "": ExpectedTensor((X, N, K), ("F8_E4M3",)),
        "_scale_inv": ExpectedTensor((X, N // BLOCK, -(-K // BLOCK)), FLOATS),
    }


def floats(stored: PrequantizedFormat, tensors: dict[str, Tensor], rows: slice) -> Floats:
    """Return the numbers of some rows."""
    return Floats.of_blocks(tensors["weight"], tensors["weight_scale_inv"], rows)
