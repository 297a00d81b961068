"""lossless: bfloat16 weights in 12 bits each, exactly; kernels/cpu/lossless.h describes the layout.

Of bfloat16's 256 exponents, 15 neighboring ones serve nearly all numbers of a row. Exponents become codes of 4 bits,
and the few numbers without a code are stored beside the others. DFloat11 (Zhang et al. 2025, arXiv:2504.11651) saves
most bits of exponents, too: its codes of varying length take 11 bits per number. Only the C++ operations pack, multiply
and unpack such weights.

    N out_features   K in_features, a multiple of 64   R rows
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwen3fast.kernels.cpu.lossless import pack_lossless as pack
from qwen3fast.quantization.packed import Packed

LOSSLESS = "lossless"


def pack_lossless(weight_NK: Tensor) -> Packed:
    """Pack a weight; numbers in other dtypes are rounded to bfloat16 first."""
    return Packed(*pack(weight_NK.to(torch.bfloat16).contiguous()))


def rows_lossless(packed: Packed, row_R: Tensor) -> Tensor:
    """Return rows of the weight, (R, K) float32."""
    rows_RK: Tensor = torch.ops.qwen3fast.quantized_rows(*packed, row_R)
    return rows_RK.float()
