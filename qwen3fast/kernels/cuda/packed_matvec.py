"""Products of a few rows with weights in 8 or 4 bits on a GPU, in the layout of quantization/formats.py.

With few rows a product is bound by reading the weight. A program takes 16 rows of the weight side by side, 32 bits of
each at a time (so that what its threads read lies side by side in memory), widens them in registers and multiplies on
the tensor cores. A short weight has too few blocks for a GPU's multiprocessors, so its channels are split, too, and the
parts added up afterwards: in a fixed order, unlike with atomic additions.

Not yet run on a GPU; tests run it in Triton's interpreter.

    M rows of x   N out_features   K in_features   J 32-bit words of a row   P channels a word   C parts of the channels
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_J = 64  # words that a program takes of each row at a time
LANES = 16  # rows of the weight in a block, as in formats.py; also the smallest side of Triton's matrix product
GROUP = 32  # channels that share a scale in 4 bits
PROGRAMS = 2 * 132  # to start: two for each multiprocessor of an H100
MAX_ROWS = 64


def packed_matvec(x_MK: Tensor, packed: Tensor, scale: Tensor, is_fp8: bool) -> Tensor:
    """The parts of x @ weight.T, (C, M, N) float32, whose sum over C it is; M up to MAX_ROWS.

    x_MK: any float dtype. packed, scale: as `Packed` in formats.py; the number of bits is taken from their shapes.
    """
    M, K = x_MK.shape
    blocks, J = packed.shape[:2]
    C, rows = num_parts(blocks, J), max(LANES, triton.next_power_of_2(M))
    y_CMN = torch.empty(C, M, blocks * LANES, dtype=torch.float32, device=x_MK.device)
    words = packed.view(torch.int32)  # (N/16, J, 16, 1)
    _multiply[(blocks, C)](
        x_MK.contiguous(), words, scale, y_CMN, M, J, triton.cdiv(J, C), K // J, is_fp8, rows, LANES, BLOCK_J, GROUP
    )
    return y_CMN


def num_parts(blocks: int, words: int) -> int:
    """Into how many parts the channels go."""
    return max(1, min(-(-PROGRAMS // blocks), words // BLOCK_J))


@triton.jit
def group_factors(
    scale,
    at,
    j,
    is_real,
    lane,
    num_words,
    channels: tl.constexpr,
    lanes: tl.constexpr,
    group: tl.constexpr,
):
    """Scales of 4 bits, (block, lanes) float32: those of the groups that words j of the weight's block `at` are in."""
    groups = num_words * channels // group
    place = (at * groups + (j // (group // channels))[:, None]) * lanes + lane[None, :]
    return tl.load(scale + place, mask=is_real[:, None], other=0.0).to(tl.float32)


@triton.jit
def unpack(word, factor, part: tl.constexpr, channels: tl.constexpr, is_fp8: tl.constexpr):
    """Channel `part` of each word, in float32 (in 8 bits without the row's scale).

    A word holds 4 channels, byte by byte, or 8 in 4 bits: first the four low halves of its bytes, then the high ones.
    """
    bits = (word >> (8 * (part % 4) + 4 * (part // 4))) & (255 if channels == 4 else 15)
    if is_fp8:
        # float8_e4m3fn: sign, 4 bits of exponent, 3 of fraction; as float16's bits, 2^8 times too small.
        half = (((bits & 128) << 8) | ((bits & 127) << 7)).to(tl.uint16).to(tl.float16, bitcast=True)
        weight = half.to(tl.float32) * 256.0
    elif channels == 4:
        weight = (bits - 128).to(tl.float32)
    else:
        weight = (bits - 8).to(tl.float32) * factor
    return weight


@triton.jit
def _multiply(
    x,
    words,
    scale,
    y,
    num_rows,
    num_words,
    share,
    channels: tl.constexpr,
    is_fp8: tl.constexpr,
    rows: tl.constexpr,
    lanes: tl.constexpr,
    block: tl.constexpr,
    group: tl.constexpr,
):
    """Program (b, c): part c of the channels of weight rows 16b..16b+15; `channels` in a word: 4 (8 bits) or 8 (4)."""
    b, c = tl.program_id(0), tl.program_id(1)
    row, lane = tl.arange(0, rows), tl.arange(0, lanes)
    num_channels = num_words * channels
    total = tl.zeros([rows, lanes], tl.float32)
    end = tl.minimum(share * (c + 1), num_words)
    for first in range(share * c, end, block):
        j = first + tl.arange(0, block)
        is_real = j < end
        word = tl.load(
            words + (b.to(tl.int64) * num_words + j[:, None]) * lanes + lane[None, :], mask=is_real[:, None], other=0
        )
        factor = 1.0
        if channels == 8:
            factor = group_factors(scale, b.to(tl.int64), j, is_real, lane, num_words, channels, lanes, group)
        for part in tl.static_range(channels):
            weight = unpack(word, factor, part, channels, is_fp8)
            numbers = tl.load(
                x + row[:, None] * num_channels + (j * channels + part)[None, :],
                mask=(row < num_rows)[:, None] & is_real[None, :],
                other=0.0,
            )
            total = tl.dot(numbers, weight.to(numbers.dtype), total, input_precision="ieee")
    n = b * lanes + lane
    if channels == 4:
        total *= tl.load(scale + n)[None, :]
    at = (c * num_rows + row[:, None]).to(tl.int64) * (tl.num_programs(0) * lanes) + n[None, :]
    tl.store(y + at, total, mask=(row < num_rows)[:, None])
