"""Products of many rows with quantized weights by PyTorch: the weight is written out in bfloat16, then multiplied.

Its cost does not depend on the number of rows, so with enough of them it is small beside the product, which PyTorch
computes in bfloat16 with what the processor has for that (AMX). Activations are not quantized.

M rows   N out_features   K in_features
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3fast.kernels.cpu.structures import GROUP, LANES


def dequantized_linear(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """Return x @ weight.T, (..., N) bfloat16. x: (..., K) bfloat16; packed, scale: see `packed_linear`.

    int8 levels are whole numbers up to 127, which bfloat16 holds exactly: their scales multiply the product.
    """
    if scale.dim() == 1:
        levels_NK = _in_rows(packed).view(torch.int8).bitwise_xor(-128).to(torch.bfloat16)  # byte - 128
        return (F.linear(x, levels_NK).float() * scale).to(torch.bfloat16)
    return F.linear(x, _int4_weight(packed, scale))


def _int4_weight(packed: Tensor, scale: Tensor) -> Tensor:
    """Return the weight that 4 bits stand for, (N, K) bfloat16."""
    bytes_NK8 = _in_rows(packed).view(packed.shape[0] * LANES, -1, 1, 4)
    levels = torch.cat([bytes_NK8 & 15, bytes_NK8 >> 4], dim=2).view(len(bytes_NK8), -1, GROUP)
    scale_NG = scale.transpose(1, 2).reshape(len(bytes_NK8), -1)
    return ((levels.to(torch.bfloat16) - 8) * scale_NG[..., None]).flatten(1)


def _in_rows(packed: Tensor) -> Tensor:
    """Return the bytes in the order of rows, (N, bytes of a row) uint8; four neighboring bytes move as one number."""
    blocks, count = packed.shape[:2]
    words = packed.view(torch.int32).view(blocks, count, LANES).transpose(1, 2).contiguous()
    return words.view(blocks * LANES, count).view(torch.uint8)
