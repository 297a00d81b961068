"""Layers of float8_e4m3fn numbers: Qwen's "FP8", a scale per 128 x 128 weights, and the form it shares with others.

`weight` (N, K), `weight_scale_inv` (N/128, K/128), rounded up: blocks at the edges are cut. Despite its name,
numbers are multiplied by the scale. Experts have such tensors each, or stacked ones: `gate_up_proj` (X, N, K) and
`gate_up_proj_scale_inv`, and the same of `down_proj`.
Source: DeepSeek-V3 report, arXiv:2412.19437, section 3.3.2; transformers' finegrained_fp8.

N out_features   K in_features   X experts   n some rows   B blocks of 128 channels, rounded up, or 1
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qwen3fast.checkpoint.prequantized.format import BLOCK, FLOATS, ExpectedTensor, PrequantizedFormat
from qwen3fast.quantization.formats import LANES, Packed
from qwen3fast.quantization.fp8 import pack_fp8


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


class Floats(NamedTuple):
    """weight[n, k] = number[n, k] * scale[n, b], where b = k // 128, or 0 where a row has one scale.

    number_nK: float8_e4m3fn. scale_nB: float32.
    """

    number_nK: Tensor
    scale_nB: Tensor

    @classmethod
    def of(cls, number_NK: Tensor, scale: Tensor, rows: slice, has_blocks: bool) -> Floats:
        """Return some rows of a weight.

        scale: per 128 x 128 block (has_blocks), (N/128, K/128), both rounded up; or per row, (N, 1), or one, (1,).
        """
        row_n = torch.arange(rows.start, rows.stop, device=scale.device)
        if scale.dim() == 1:
            return cls(number_NK[rows], scale.float().expand(len(row_n), 1))
        return cls(number_NK[rows], scale[row_n // BLOCK if has_blocks else row_n].float())

    def weight(self) -> Tensor:
        """Return the dequantized rows, (n, K) float32; exact for scales in float16 or bfloat16."""
        number_nK, scale_nB = self.number_nK.float(), self.scale_nB
        if scale_nB.shape[1] == 1:
            return number_nK * scale_nB
        return number_nK * scale_nB.repeat_interleave(BLOCK, dim=1)[:, : number_nK.shape[1]]

    def as_fp8(self, has_blocks: bool) -> Packed:
        """Return the same numbers and scales in our format; the rows are whole blocks of 16. has_blocks: of fp8."""
        return pack_fp8(self.number_nK, self.scale_nB[::LANES] if has_blocks else self.scale_nB[:, 0])
