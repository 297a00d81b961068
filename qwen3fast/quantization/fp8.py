"""fp8: float8_e4m3fn numbers with a scale per row, or per block of 16 rows and 128 channels.

Blocks hold the scales of checkpoints that have one per 128 x 128 weights exactly: eight blocks share each. The last
block of a row is shorter where K is not a multiple of 128.

    N out_features   K in_features   R rows   B = K/128 blocks of channels, rounded up
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3fast.quantization.packed import LANES, Packed, bytes_of_rows, pack_bytes

SPAN = 128  # channels of a block
LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448


def scale_shape(out_features: int, in_features: int, has_blocks: bool) -> tuple[int, ...]:
    """Return the shape of the scales of an (N, K) weight."""
    return (out_features // LANES, -(-in_features // SPAN)) if has_blocks else (out_features,)


def pack_fp8(number_NK: Tensor, scale: Tensor) -> Packed:
    """Pack numbers (float8_e4m3fn) with their scales, (N,) or (N/16, B)."""
    return Packed(pack_bytes(number_NK.view(torch.uint8)), scale.float().contiguous())


def quantize_fp8(weight_NK: Tensor) -> Packed:
    """Quantize to float8_e4m3fn, one scale per row: its largest weight becomes +-448, the largest number there is."""
    weight = weight_NK.float()
    scale_N = weight.abs().amax(dim=1) / LARGEST
    return pack_fp8((weight / scale_N.clamp(min=1e-30)[:, None]).to(torch.float8_e4m3fn), scale_N)


def quantize_fp8_blocks(weight_NK: Tensor) -> Packed:
    """Quantize to float8_e4m3fn, one scale per block: its largest weight becomes +-448."""
    N, K = weight_NK.shape
    block = F.pad(weight_NK.float().abs(), (0, -K % SPAN)).view(N // LANES, LANES, -1, SPAN)
    scale_nB = block.amax(dim=(1, 3)) / LARGEST
    scale_NK = scale_nB.clamp(min=1e-30).repeat_interleave(LANES, 0).repeat_interleave(SPAN, 1)[:, :K]
    return pack_fp8((weight_NK.float() / scale_NK).to(torch.float8_e4m3fn), scale_nB)


def rows_fp8(packed: Packed, row_R: Tensor) -> Tensor:
    """Return rows of the weight, (R, K) float32."""
    number_RK = from_fp8(bytes_of_rows(packed, row_R))
    if packed.scale.dim() == 1:
        return number_RK * packed.scale[row_R, None]
    scale_RB = packed.scale[row_R // LANES]
    return number_RK * scale_RB.repeat_interleave(SPAN, dim=1)[:, : number_RK.shape[1]]


def from_fp8(byte: Tensor) -> Tensor:
    """Return the float8_e4m3fn numbers of bytes (uint8), as float32.

    By their bits, since Triton converts them only on GPUs of compute capability 8.9 and later: a float16 with the same
    exponent and fraction is 2^8 times as small.
    """
    bits = byte.contiguous().view(torch.int8).to(torch.int16)
    number = ((bits << 7) & ~0x4000).view(torch.float16).float() * 256.0
    return torch.where(bits & 0x7F == 0x7F, torch.nan, number)
