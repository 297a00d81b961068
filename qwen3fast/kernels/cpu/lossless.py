"""Weights in bfloat16, packed in 12 bits per number (lossless.h): packed by C++, and unpacked by PyTorch.

N out_features   K in_features   R rows   W words of 16 bits per row
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwen3fast.kernels.cpu.library import functions
from qwen3fast.kernels.cpu.structures import CODED, CODED_WORDS, LANES, RECORD, address, require

MULTIPLE = 64  # of K
MAX_CHANNELS = 2**16 - 1  # exceptions have numbers of 16 bits


def row_words(in_features: int) -> int:
    """Return W."""
    return in_features // CODED * CODED_WORDS + in_features % CODED


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
    records, threads = torch.empty(N * RECORD, dtype=torch.uint8), torch.get_num_threads()
    exceptions = functions().qwen3fast_plan_lossless(weight, N, K, records.data_ptr(), threads)
    require(N * RECORD // 4 + exceptions < 2**31, "pack_lossless: more exceptions than a record can count")
    scale = torch.cat([records, torch.empty(exceptions * 4, dtype=torch.uint8)])
    packed = torch.empty(N // LANES, row_words(K) // 2, LANES, 4, dtype=torch.uint8)
    functions().qwen3fast_pack_lossless(weight, N, K, scale.data_ptr(), packed.data_ptr(), threads)
    return packed, scale


def is_lossless(packed: Tensor, scale: Tensor) -> bool:
    """Return whether these tensors may be a lossless weight: no other format has scales of this shape and dtype."""
    return scale.dtype == torch.uint8 and scale.dim() == 1 and len(scale) >= packed.shape[0] * LANES * RECORD


def unpack_rows(packed: Tensor, scale: Tensor, row_R: Tensor) -> Tensor:
    """Return rows of the weight, (R, K) bfloat16. row_R: int64."""
    N, R = packed.shape[0] * LANES, len(row_R)
    words_RW = packed.view(N, -1)[row_R].view(torch.int16)
    coded = words_RW.shape[1] // CODED_WORDS * CODED_WORDS
    numbers = scale.view(torch.int16)
    first_R, count_R, base_R = _records(numbers[: N * RECORD // 2].view(N, -1)[row_R])
    words = words_RW[:, :coded].reshape(R, coded // CODED_WORDS, 3, CODED // 4).int() & 0xFFFF
    shift = torch.tensor([0, 4, 8], device=packed.device)[:, None]
    last = (words >> 12 << shift).sum(dim=2, keepdim=True, dtype=torch.int32)
    twelve_RK = torch.cat([words & 0xFFF, last], dim=2).flatten(1)
    code_RK = twelve_RK & 15
    bits_RK = torch.where(code_RK == 0, 0, (code_RK << 7) + base_R[:, None]) | (twelve_RK & 16) << 11 | twelve_RK >> 5
    whole_RK = torch.cat([(bits_RK - (bits_RK >> 15 << 16)).to(torch.int16), words_RW[:, coded:]], dim=1)

    which_E = torch.repeat_interleave(torch.arange(R, device=packed.device), count_R)
    place_E = torch.arange(len(which_E), device=packed.device) - (count_R.cumsum(0) - count_R)[which_E]
    place_E += row_R[which_E] * (RECORD // 4) + first_R[which_E]  # in units of 4 bytes
    channel_E, number_E = numbers.view(-1, 2)[place_E].unbind(1)
    whole_RK[which_E, channel_E.long() & 0xFFFF] = number_E
    return whole_RK.view(torch.bfloat16)


def _records(record_R4: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the fields of `RowRecord`, (R,) each."""
    low, high, count, base = (record_R4.long() & 0xFFFF).unbind(1)
    return low | high << 16, count, base.int()
