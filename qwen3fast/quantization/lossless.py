"""lossless: bfloat16 weights in 12 bits each, exactly; kernels/cpu/lossless.h describes the layout.

Of bfloat16's 256 exponents, 15 neighboring ones serve nearly all numbers of a row. Exponents become codes of 4 bits,
and the few numbers without a code are stored beside the others. DFloat11 (Zhang et al. 2025, arXiv:2504.11651) saves
most bits of exponents, too: its codes of varying length take 11 bits per number.

    N out_features   K in_features, a multiple of 64   R rows   W words of 16 bits per row
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3fast.kernels import cpu
from qwen3fast.kernels.cpu.lossless import pack_lossless as pack_in_cpp
from qwen3fast.kernels.cpu.lossless import row_words, unpack_rows
from qwen3fast.kernels.cpu.structures import CODED, RECORD
from qwen3fast.quantization.packed import LANES, Packed

LOSSLESS = "lossless"
CODES = 15  # of exponents other than 0, which has code 0


def pack_lossless(weight_NK: Tensor) -> Packed:
    """Pack a weight; numbers in other dtypes are rounded to bfloat16 first."""
    weight_NK = weight_NK.to(torch.bfloat16).contiguous()
    if weight_NK.device.type == "cpu" and cpu.is_loaded():
        return Packed(*pack_in_cpp(weight_NK))
    return pack_plainly(weight_NK)


def pack_plainly(weight_NK: Tensor) -> Packed:
    """Pack a weight in bfloat16 with PyTorch: the same bytes as the C++ operation's."""
    N, K = weight_NK.shape
    coded = K // CODED * CODED
    bits_NK = weight_NK[:, :coded].view(torch.int16).int() & 0xFFFF
    exponent_NK = bits_NK >> 7 & 0xFF
    base_N = _bases(exponent_NK)
    code_NK = torch.where(exponent_NK == 0, 0, exponent_NK - base_N[:, None])
    is_exception_NK = (code_NK < 0) | (code_NK > CODES) | ((code_NK == 0) & (exponent_NK != 0))
    code_NK = code_NK.masked_fill(is_exception_NK, 0)
    twelve_NK = code_NK | bits_NK >> 15 << 4 | (bits_NK & 0x7F) << 5
    three, last = twelve_NK.view(N, -1, 4, CODED // 4).split([3, 1], dim=2)
    shift = torch.tensor([0, 4, 8], device=weight_NK.device)[:, None]
    words_NW = (three | (last >> shift & 15) << 12).flatten(1)
    words_NW = torch.cat([_int16(words_NW), weight_NK[:, coded:].view(torch.int16)], dim=1)

    row, channel = is_exception_NK.nonzero().unbind(1)
    count_N = is_exception_NK.sum(dim=1)
    first_N = torch.arange(N, 0, -1, device=weight_NK.device) * (RECORD // 4) + count_N.cumsum(0) - count_N
    records_N4 = torch.cat(
        [first_N.int()[:, None].view(torch.int16), _int16(torch.stack([count_N, base_N << 7], dim=1))], dim=1
    )
    exceptions = torch.stack([_int16(channel), _int16(bits_NK[row, channel])], dim=1)
    scale = torch.cat([records_N4.flatten(), exceptions.flatten()]).view(torch.uint8)
    return Packed(words_NW.contiguous().view(torch.uint8).view(packed_shape(N, K)), scale)


def _bases(exponent_NK: Tensor) -> Tensor:
    """Return the exponent before the window that most numbers of each row are in, (N,); of equal ones the first."""
    count_N256 = torch.zeros(len(exponent_NK), 256, dtype=torch.int64, device=exponent_NK.device)
    count_N256.scatter_add_(1, exponent_NK.long(), torch.ones_like(exponent_NK, dtype=torch.int64))
    total_N257 = F.pad(count_N256.cumsum(1), (1, 0))
    inside = total_N257[:, CODES + 1 :] - total_N257[:, 1 : 257 - CODES]  # of exponents base + 1 to base + CODES
    most = inside.amax(dim=1, keepdim=True)
    return (inside == most).int().argmax(dim=1)


def _int16(number: Tensor) -> Tensor:
    """Return numbers from 0 to 65535 as the 16 bits that they have."""
    return torch.where(number < 2**15, number, number - 2**16).to(torch.int16)


def packed_shape(out_features: int, in_features: int) -> tuple[int, ...]:
    """Return the shape of the packed bytes, as other formats have it; each row's bytes follow the previous row's."""
    return (out_features // LANES, row_words(in_features) // 2, LANES, 4)


def rows_lossless(packed: Packed, row_R: Tensor) -> Tensor:
    """Return rows of the weight, (R, K) float32."""
    return unpack_rows(*packed, row_R).float()
