"""Rows of a layer as float8_e4m3fn numbers with their scales: the common form of Qwen's "FP8" and compressed-tensors.

n some rows   N out_features   K in_features   B blocks of 128 channels, rounded up, or 1
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qwen3fast.checkpoint.prequantized.format import BLOCK
from qwen3fast.quantization.formats import LANES, Packed
from qwen3fast.quantization.fp8 import pack_fp8


class Floats(NamedTuple):
    """weight[n, k] = number[n, k] * scale[n, b], where b = k // 128, or 0 where a row has one scale.

    number_nK: float8_e4m3fn. scale_nB: float32.
    """

    number_nK: Tensor
    scale_nB: Tensor

    @classmethod
    def of_blocks(cls, number_NK: Tensor, scale: Tensor, rows: slice) -> Floats:
        """Return some rows of a weight with a scale per 128 x 128 block, (N/128, K/128), both rounded up."""
        row_n = torch.arange(rows.start, rows.stop, device=scale.device)
        return cls(number_NK[rows], scale[row_n // BLOCK].float())

    @classmethod
    def of_rows(cls, number_NK: Tensor, scale: Tensor, rows: slice) -> Floats:
        """Return some rows of a weight with a scale per row, (N, 1), or one for all of them, (1,)."""
        number_nK = number_NK[rows]
        scale_n1 = scale[None].expand(len(number_nK), 1) if scale.dim() == 1 else scale[rows]
        return cls(number_nK, scale_n1.float())

    def weight(self) -> Tensor:
        """Return the dequantized rows, (n, K) float32; exact for scales in float16 or bfloat16."""
        number_nK, scale_nB = self.number_nK.float(), self.scale_nB
        if scale_nB.shape[1] == 1:
            return number_nK * scale_nB
        return number_nK * scale_nB.repeat_interleave(BLOCK, dim=1)[:, : number_nK.shape[1]]

    def as_fp8(self, has_blocks: bool) -> Packed:
        """Return the same numbers and scales in our format; the rows are whole blocks of 16. has_blocks: of fp8."""
        return pack_fp8(self.number_nK, self.scale_nB[::LANES] if has_blocks else self.scale_nB[:, 0])
