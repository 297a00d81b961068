"""Qwen's "FP8" checkpoints: float8_e4m3fn numbers with a scale per block of 128 rows and 128 channels.

`weight` (N, K), `weight_scale_inv` (N/128, K/128), rounded up: blocks at the edges are cut. Despite its name,
numbers are multiplied by the scale.
Source: DeepSeek-V3 report, arXiv:2412.19437, section 3.3.2; transformers' finegrained_fp8.

N out_features   K in_features   n some rows
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwen3fast.checkpoint.prequantized.expected import FLOATS, ExpectedTensor
from qwen3fast.checkpoint.prequantized.format import BLOCK


def expected_tensors(N: int, K: int) -> dict[str, ExpectedTensor]:
    """Return the tensors of a layer by the ends of their names."""
    return {
        "weight": ExpectedTensor((N, K), ("F8_E4M3",)),
        "weight_scale_inv": ExpectedTensor((-(-N // BLOCK), -(-K // BLOCK)), FLOATS),
    }


def weight(tensors: dict[str, Tensor], rows: slice) -> Tensor:
    """Return some rows dequantized, (n, K) float32."""
    number_nK, scale = tensors["weight"][rows].float(), tensors["weight_scale_inv"].float()
    row_n = torch.arange(rows.start, rows.stop, device=scale.device)
    return number_nK * scale[row_n // BLOCK].repeat_interleave(BLOCK, dim=1)[:, : number_nK.shape[1]]
