"""Products of a few rows with 8-bit or 4-bit weights on a GPU, in the layout of quantization/formats.py.

With few rows, a product is bound by reading the weight. A program processes a block of 16 rows of the weight, one
32-bit word per row at a time: reads are coalesced. It dequantizes the words in registers and multiplies on the tensor
cores. A weight with few rows has too few blocks to occupy all multiprocessors: its channels are split as well, and the
parts are added afterwards, in a fixed order, which atomic additions would not have. Scales of fp8 blocks multiply the
float32 sums over the channels of a tile, which lies in one block.

Not yet run on a GPU; tests run it in Triton's interpreter.

    M rows of x   N out_features   K in_features   J 32-bit words per row   C parts of the channels
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen3fast.kernels.cpu.structures import LANES
from qwen3fast.kernels.cuda.decode_step.launch import current
from qwen3fast.kernels.cuda.decode_step.weights import (
    FP8_BLOCK,
    Weight,
    nan_of_words,
    record_bytes,
    record_scales,
)
from qwen3fast.kernels.define import define

BLOCK_J = 64  # words per row that a program reads at a time in 16 bits
BLOCK_J_OF_FP8 = 32  # with scales of blocks: 128 channels, which share a scale
PROGRAMS = 2 * 132  # to launch: two per multiprocessor of an H100


def packed_matvec(x_MK: Tensor, packed: Tensor, scale: Tensor, is_fp8: bool) -> Tensor:
    """Return x @ weight.T in C parts, (C, M, N) float32; the product is their sum over C. M is at most 64.

    x_MK: any float dtype. packed, scale: as `Packed` in formats.py; the number of bits is taken from their shapes.
    """
    weight, (M, K), (blocks, J) = Weight.of(packed, scale, is_fp8), x_MK.shape, packed.shape[:2]
    C, rows = num_parts(blocks, J), max(LANES, triton.next_power_of_2(M))
    block = block_words(x_MK.dtype, rows, weight.kind)
    y_CMN = torch.empty(C, M, blocks * LANES, dtype=torch.float32, device=x_MK.device)
    sizes = (M, J, share_of(J, C, block), K // J, weight.kind, rows, block)
    with current(x_MK.device):
        _multiply[(blocks, C)](x_MK.contiguous(), weight.tensor, scale, y_CMN, *sizes)
    return y_CMN


def block_words(dtype: torch.dtype, rows: int, kind: int) -> int:
    """Return the words per row that a program reads at a time, for rows of this dtype.

    In float32, 64 words for 64 rows would need 279 KB of shared memory, more than any GPU has for a program.
    """
    words = BLOCK_J_OF_FP8 if kind == FP8_BLOCK else BLOCK_J
    return words if dtype.itemsize < 4 else min(words, 1024 // rows)


def share_of(words: int, parts: int, block: int) -> int:
    """Return the words per row in a part: whole blocks, whose number a smaller share would not reduce."""
    return -(-words // (parts * block)) * block


def num_parts(blocks: int, words: int) -> int:
    """Return C, the number of parts that the channels are split into."""
    return max(1, min(-(-PROGRAMS // blocks), words // BLOCK_J))


define(
    "packed_matvec(Tensor x, Tensor packed, Tensor scale, bool is_fp8) -> Tensor",
    packed_matvec,
    lambda x, packed, scale, is_fp8: x.new_empty(
        (num_parts(*packed.shape[:2]), x.shape[0], packed.shape[0] * packed.shape[2]), dtype=torch.float32
    ),
    "CUDA",
)


@triton.jit
def word_scales(scale, at, j, is_real, lane, num_words, kind: tl.constexpr):
    """Return the scales and minimums of words j in the weight's block `at`: (block, 16) float32 each, or a number."""
    mask = is_real[:, None]
    word_scale, minimum = 1.0, 0.0
    if kind == 4:
        place = (at * (num_words // 4) + j // 4)[:, None] * 16 + lane[None, :]
        word_scale = tl.load(scale + place, mask=mask, other=0.0).to(tl.float32)
    elif kind > 4:
        words: tl.constexpr = kind // 64  # of a record
        record = scale + ((at * (num_words // words) + j // words) * record_bytes(kind))[:, None]
        word_scale, minimum = record_scales(record, (j % words // 4)[:, None], lane[None, :], mask, kind)
    return word_scale, minimum


@triton.jit
def block_scale(scale, at, first, num_words):
    """Return the scale of the 128 channels that contain word `first` of the weight's block `at`."""
    return tl.load(scale + at * ((num_words + 31) // 32) + first // 32)


@triton.jit
def unpack_channel(word, scale, minimum, part: tl.constexpr, kind: tl.constexpr):
    """Return channel `part` of each word, dequantized to float32; of 8-bit words without their scale.

    A word holds 4 channels of 8 bits, one per byte, or 8 channels of 4 bits: the low halves of its bytes first. A NaN
    of fp8 is in its word's first channel: the product is the same.
    """
    bits = (word >> (8 * (part % 4) + 4 * (part // 4))) & (255 if kind < 4 else 15)
    if kind == 2 or kind == 3:
        # float8_e4m3fn: sign, 4 bits of exponent, 3 of fraction; as float16's bits, 2^8 times too small.
        half = (((bits & 128) << 8) | ((bits & 127) << 7)).to(tl.uint16).to(tl.float16, bitcast=True)
        weight = half.to(tl.float32) * 256.0
        if part == 0:
            weight += nan_of_words(word)
    elif kind == 1:
        weight = (bits - 128).to(tl.float32)
    elif kind == 4:
        weight = (bits - 8).to(tl.float32) * scale
    else:
        weight = bits.to(tl.float32) * scale - minimum
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
    kind: tl.constexpr,
    rows: tl.constexpr,
    block: tl.constexpr,
):
    """Program (b, c): part c of the channels of weight rows 16b..16b+15. channels: per word, 4 (8 bits) or 8 (4)."""
    b, c = tl.program_id(0), tl.program_id(1)
    row, lane, at = tl.arange(0, rows), tl.arange(0, 16), b.to(tl.int64)
    num_channels = num_words * channels
    total = tl.zeros([rows, 16], tl.float32)
    end = tl.minimum(share * (c + 1), num_words)
    for first in range(share * c, end, block):
        j = first + tl.arange(0, block)
        is_real = j < end
        word = tl.load(words + (at * num_words + j[:, None]) * 16 + lane[None, :], mask=is_real[:, None], other=0)
        word_scale, minimum = word_scales(scale, at, j, is_real, lane, num_words, kind)
        sums = tl.zeros([rows, 16], tl.float32) if kind == 3 else total
        for part in tl.static_range(channels):
            weight = unpack_channel(word, word_scale, minimum, part, kind)
            numbers = tl.load(
                x + row[:, None] * num_channels + (j * channels + part)[None, :],
                mask=(row < num_rows)[:, None] & is_real[None, :],
                other=0.0,
            )
            sums = tl.dot(numbers, weight.to(numbers.dtype), sums, input_precision="ieee")
        total = total + sums * block_scale(scale, at, first, num_words) if kind == 3 else sums
    n = b * 16 + lane
    if kind < 3:
        total *= tl.load(scale + n)[None, :]
    to = (c * num_rows + row[:, None]).to(tl.int64) * (tl.num_programs(0) * 16) + n[None, :]
    tl.store(y + to, total, mask=(row < num_rows)[:, None])
