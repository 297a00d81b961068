"""Products of a few rows with 8-bit or 4-bit weights on a GPU, in the layout of quantization/formats.py.

With few rows, a product is bound by reading the weight. A program processes a block of 16 rows of the weight, one
32-bit word per row at a time: reads are coalesced. It dequantizes the words in registers and multiplies on the tensor
cores. A weight with few rows has too few blocks to occupy all multiprocessors: its channels are split as well, and the
parts are added afterwards, in a fixed order, which atomic additions would not have.

Not yet run on a GPU; tests run it in Triton's interpreter.

    M rows of x   N out_features   K in_features   J 32-bit words per row   C parts of the channels
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen3fast.kernels.cpu.structures import span_and_record

BLOCK_J = 64  # words per row that a program reads at a time
LANES = 16  # rows of the weight in a block, as in formats.py; also the smallest side of Triton's matrix product
GROUP = 32  # channels that share a scale in 4 bits
PROGRAMS = 2 * 132  # to launch: two per multiprocessor of an H100
MAX_ROWS = 64


def packed_matvec(x_MK: Tensor, packed: Tensor, scale: Tensor, is_fp8: bool) -> Tensor:
    """Return x @ weight.T in C parts, (C, M, N) float32; the product is their sum over C. M is at most MAX_ROWS.

    x_MK: any float dtype. packed, scale: as `Packed` in formats.py; the number of bits is taken from their shapes.
    """
    M, K = x_MK.shape
    blocks, J = packed.shape[:2]
    C, rows = num_parts(blocks, J), max(LANES, triton.next_power_of_2(M))
    y_CMN = torch.empty(C, M, blocks * LANES, dtype=torch.float32, device=x_MK.device)
    words = packed.view(torch.int32)  # (N/16, J, 16, 1)
    sizes = (M, J, triton.cdiv(J, C), K // J, is_fp8, *span_and_record(packed, scale), rows, LANES, BLOCK_J, GROUP)
    _multiply[(blocks, C)](x_MK.contiguous(), words, scale, y_CMN, *sizes)
    return y_CMN


def num_parts(blocks: int, words: int) -> int:
    """Return C, the number of parts that the channels are split into."""
    return max(1, min(-(-PROGRAMS // blocks), words // BLOCK_J))


@triton.jit
def group_scales(
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
    """Return the scales of 4-bit words j in the weight's block `at`, (block, lanes) float32."""
    groups = num_words * channels // group
    place = (at * groups + (j // (group // channels))[:, None]) * lanes + lane[None, :]
    return tl.load(scale + place, mask=is_real[:, None], other=0.0).to(tl.float32)


@triton.jit
def group_minimums(
    records,
    at,
    j,
    is_real,
    lane,
    num_words,
    span: tl.constexpr,
    record: tl.constexpr,
    lanes: tl.constexpr,
):
    """Return the scales and minimums of uint4's words j in the weight's block `at`, (block, lanes) float32 each."""
    mask, words = is_real[:, None], span // 8  # of a record
    place = records + ((at * num_words // words + j // words) * record)[:, None]
    d = tl.load((place + 2 * lane[None, :]).to(tl.pointer_type(tl.float16)), mask=mask, other=0.0).to(tl.float32)
    if record == 3 * lanes:
        minimum = d * tl.load(place + (2 * lanes + lane)[None, :], mask=mask, other=0).to(tl.float32)
    else:
        half = (place + (2 * lanes + 2 * lane)[None, :]).to(tl.pointer_type(tl.float16))
        minimum = tl.load(half, mask=mask, other=0.0).to(tl.float32)
        levels, group = place + 4 * lanes + lane[None, :], (j % words // 4)[:, None]
        if span == 256 and record == 16 * lanes:  # in 6 bits
            s = tl.load(levels + group * lanes, mask=mask, other=0).to(tl.int32)
            m = tl.load(levels + (8 + group % 4) * lanes, mask=mask, other=0).to(tl.int32)
            m = ((m >> (group // 4 * 4)) & 15) | ((s >> 6) << 4)
            s = s & 63
        else:
            s = tl.load(levels + group * 2 * lanes, mask=mask, other=0)
            m = tl.load(levels + (group * 2 + 1) * lanes, mask=mask, other=0)
        minimum *= m.to(tl.float32)
        d *= s.to(tl.float32)
    return d, minimum


@triton.jit
def word_scales(
    scale,
    at,
    j,
    is_real,
    lane,
    num_words,
    span: tl.constexpr,
    record: tl.constexpr,
    channels: tl.constexpr,
    lanes: tl.constexpr,
    group: tl.constexpr,
):
    """Return the scale and the minimum that is taken off of words j: (block, lanes) float32, or a number."""
    word_scale, minimum = 1.0, 0.0
    if record != 0:
        word_scale, minimum = group_minimums(scale, at, j, is_real, lane, num_words, span, record, lanes)
    elif channels == 8:
        word_scale = group_scales(scale, at, j, is_real, lane, num_words, channels, lanes, group)
    return word_scale, minimum


@triton.jit
def unpack(
    word, scale, minimum, has_minimum: tl.constexpr, part: tl.constexpr, channels: tl.constexpr, is_fp8: tl.constexpr
):
    """Return channel `part` of each word, dequantized to float32; of 8-bit words without the row's scale.

    A word holds 4 channels of 8 bits, one per byte, or 8 channels of 4 bits: the low halves of its bytes first.
    """
    bits = (word >> (8 * (part % 4) + 4 * (part // 4))) & (255 if channels == 4 else 15)
    if is_fp8:
        # float8_e4m3fn: sign, 4 bits of exponent, 3 of fraction; as float16's bits, 2^8 times too small.
        half = (((bits & 128) << 8) | ((bits & 127) << 7)).to(tl.uint16).to(tl.float16, bitcast=True)
        weight = half.to(tl.float32) * 256.0
    elif channels == 4:
        weight = (bits - 128).to(tl.float32)
    elif has_minimum:
        weight = bits.to(tl.float32) * scale - minimum
    else:
        weight = (bits - 8).to(tl.float32) * scale
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
    span: tl.constexpr,
    record: tl.constexpr,
    rows: tl.constexpr,
    lanes: tl.constexpr,
    block: tl.constexpr,
    group: tl.constexpr,
):
    """Program (b, c): part c of the channels of weight rows 16b..16b+15. channels: per word, 4 (8 bits) or 8 (4)."""
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
        word_scale, minimum = word_scales(
            scale, b.to(tl.int64), j, is_real, lane, num_words, span, record, channels, lanes, group
        )
        for part in tl.static_range(channels):
            weight = unpack(word, word_scale, minimum, record != 0, part, channels, is_fp8)
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
