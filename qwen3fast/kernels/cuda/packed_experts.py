"""Products of rows with 8-bit or 4-bit weights, each row with the weight of its own expert, on a GPU.

The experts' weights are stacked in the layout of quantization/formats.py. A program reads the number of its row's
expert on the device and then only that expert's weight; the host does not wait for the router. With one row per
program, the 16 sums run on the ordinary cores instead of the tensor cores. See packed_matvec.py for the rest.

Not yet run on a GPU; tests run it in Triton's interpreter.

    P rows of x   X experts   N out_features of an expert   K in_features   J 32-bit words of a row
    C parts of the channels
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen3fast.kernels.cpu.structures import LANES
from qwen3fast.kernels.cuda.decode_step.launch import current
from qwen3fast.kernels.cuda.decode_step.weights import Weight
from qwen3fast.kernels.cuda.packed_matvec import (
    block_scale,
    block_words,
    num_parts,
    share_of,
    unpack_channel,
    word_scales,
)
from qwen3fast.kernels.define import define


def packed_experts(
    x_PK: Tensor, packed: Tensor, scale: Tensor, expert_P: Tensor, num_experts: int, is_fp8: bool
) -> Tensor:
    """Return x[p] @ weight[expert[p]].T, (P, N) float32.

    The number of parts depends on the number of rows, which varies in compiled code, so they are added here.
    x_PK: any float dtype. packed, scale: as `Packed` in formats.py, of X * N rows. expert_P: int64, each below X.
    """
    P, K = x_PK.shape
    blocks, J = packed.shape[0] // num_experts, packed.shape[1]
    C = num_parts(blocks * P, J)
    y_CPN = torch.empty(C, P, blocks * LANES, dtype=torch.float32, device=x_PK.device)
    weight = Weight.of(packed, scale, is_fp8)  # (X * N/16, J, 16, 1)
    block = block_words(torch.bfloat16, 1, weight.kind)  # sums in registers, whatever x's dtype
    sizes = (J, share_of(J, C, block), K // J, weight.kind, block)
    with current(x_PK.device):
        _multiply_chosen[(blocks, C, P)](x_PK.contiguous(), weight.tensor, scale, expert_P, y_CPN, *sizes)
    return y_CPN[0] if C == 1 else y_CPN.sum(0)


define(
    "packed_experts(Tensor x, Tensor packed, Tensor scale, Tensor expert, int num_experts, bool is_fp8) -> Tensor",
    packed_experts,
    lambda x, packed, scale, expert, num_experts, is_fp8: x.new_empty(
        (x.shape[0], packed.shape[0] // num_experts * packed.shape[2]), dtype=torch.float32
    ),
    "CUDA",
)


@triton.jit
def _multiply_chosen(
    x, words, scale, expert, y, num_words, share, channels: tl.constexpr, kind: tl.constexpr, block: tl.constexpr
):
    """Program (b, c, p): part c of the channels of weight rows 16b..16b+15 of row p's expert."""
    b, c, p = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    lane = tl.arange(0, 16)
    num_channels = num_words * channels
    at = tl.load(expert + p) * tl.num_programs(0) + b  # int64: the block, counted over all experts
    total = tl.zeros([16], tl.float32)
    end = tl.minimum(share * (c + 1), num_words)
    for first in range(share * c, end, block):
        j = first + tl.arange(0, block)
        is_real = j < end
        word = tl.load(words + (at * num_words + j[:, None]) * 16 + lane[None, :], mask=is_real[:, None], other=0)
        word_scale, minimum = word_scales(scale, at, j, is_real, lane, num_words, kind)
        sums = tl.zeros([16], tl.float32) if kind == 3 else total
        for part in tl.static_range(channels):
            weight = unpack_channel(word, word_scale, minimum, part, kind)
            numbers = tl.load(x + p * num_channels + j * channels + part, mask=is_real, other=0.0).to(tl.float32)
            sums += tl.sum(weight * numbers[:, None], axis=0)
        total = total + sums * block_scale(scale, at, first, num_words) if kind == 3 else sums
    if kind < 3:
        total *= tl.load(scale + at * 16 + lane)
    to = (c * tl.num_programs(2) + p).to(tl.int64) * (tl.num_programs(0) * 16) + b * 16 + lane
    tl.store(y + to, total)
