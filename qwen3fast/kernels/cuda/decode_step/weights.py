"""Tiles of weights: reading each format and multiplying it with up to 8 rows, in one form for all formats.

A product with so few rows is to be bound by reading the weight. Ordinary cores would be busy for longer: 8 rows take 8
instructions per weight, and sums over channels go through several threads. Here the tensor cores multiply, with the
weight in the place of the large matrix. They add up a row's products in the same order for any number of rows; sums of
squares before them depend on it. Numbers of all formats are exact in bfloat16; scales of groups multiply the float32
sums.

A tile is BN rows by BK channels of a weight, in G groups of channels, which the warps share and whose sums are added at
the end: [G, BN, BK/G]. Packed weights (see quantization/formats.py) are loaded as bytes [G, words, BN, 4].

    R rows of x   N out_features   K in_features   P channels in a 32-bit word   G groups of channels in a tile
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen3fast.kernels.cpu.structures import LANES, SHORT_RECORD, SHORT_SPAN, ZERO_RECORD, span_and_record

# How a weight is stored: kinds below INT4 have 8 bits or more. FP8_BLOCK has a scale per 16 rows and 128 channels.
# Kinds of uint4 hold its layout of scales as well: 8 * span + 5 with minimums, + 6 with zero points, + 7 with minimums
# whose numbers have 6 bits; each layout has kernels of its own.
PLAIN, INT8, FP8, FP8_BLOCK, INT4, UINT4 = 0, 1, 2, 3, 4, 5
# Weights in a tile: enough bytes are underway, with the tiles of a loop that are loaded ahead, and no kernel spills.
TILE = 8192
PROGRAMS = 132  # at least, if smaller tiles give as many: one per multiprocessor of an H100
# A group for each warp, as wide as a step of the tensor cores or a group of scales; and few enough for registers.
MIN_BK, MAX_BK = 128, 1024
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


class Weight(NamedTuple):
    """An (N, K) weight as a kernel's arguments, as in `Packed`. scale: of PLAIN the weight again, and not read."""

    tensor: Tensor
    scale: Tensor
    kind: int

    @classmethod
    def of(cls, tensor: Tensor, scale: Tensor | None, is_fp8: bool) -> Weight:
        """Return the weight with its kind, known from the shapes."""
        if scale is None:
            return cls(tensor, tensor, PLAIN)
        if scale.dim() == 1:
            return cls(tensor.view(torch.int32), scale, FP8 if is_fp8 else INT8)
        if scale.dim() == 2:
            return cls(tensor.view(torch.int32), scale, FP8_BLOCK)
        if scale.dtype == torch.uint8:
            return cls(tensor.view(torch.int32), scale, uint4_kind(*span_and_record(tensor, scale)))
        return cls(tensor.view(torch.int32), scale, INT4)

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (N, K)."""
        if self.kind == PLAIN:
            return self.tensor.shape[0], self.tensor.shape[1]
        return self.tensor.shape[0] * LANES, self.tensor.shape[1] * channels_of(self.kind)


def uint4_kind(span: int, record: int) -> int:
    """Return the kind of uint4 with records of so many bytes for so many channels."""
    return 8 * span + UINT4 + (record == ZERO_RECORD) + 2 * ((span, record) == (SHORT_SPAN, SHORT_RECORD))


def channels_of(kind: int) -> int:
    """Return P, the channels in a word."""
    return 1 if kind == PLAIN else 4 if kind < INT4 else 8


def tile_shape(
    out_features: int, in_features: int, kind: int, dtype: torch.dtype, num_tiles: int = 1
) -> tuple[int, int]:
    """Return (BN, BK).

    dtype: of x. num_tiles: number of weights that a program multiplies x with at the same time.
    """
    BN = next((BN for BN in (32, 16) if out_features >= BN * PROGRAMS), 8)
    return BN, channels_of_tile(in_features, kind, dtype, BN * num_tiles)


def columns_of(num_rows: int) -> int:
    """Return ROWS: the number of rows as kernels see it, a power of two.

    At least 2: for one column, Triton (3.8) mixes up the sums of a warp's groups.
    """
    return max(2, int(triton.next_power_of_2(num_rows)))


def channels_of_tile(in_features: int, kind: int, dtype: torch.dtype, rows: int) -> int:
    """Return BK for so many rows of weights. Float32, for which there are no tensor cores, needs more registers."""
    size = TILE // 2 if dtype == torch.float32 else TILE if kind == PLAIN else 2 * TILE
    return min(size // rows, MAX_BK, max(MIN_BK, int(triton.next_power_of_2(in_features))))


@triton.constexpr_function
def num_groups(KIND, BK):
    """Return G: one per warp, or more of channels that share a scale. (Fewer would leave warps without work.)"""
    return BK // 32 if KIND >= 4 else max(4, BK // 128) if KIND == 3 else 4


@triton.jit
def load_weights(
    w, n0, k0, N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KIND: tl.constexpr, P: tl.constexpr
):
    """Load the tile at row n0 and channel k0: [G, BN, BK/G], or bytes [G, BK/G/P, BN, 4]; 0 beyond the weight."""
    G: tl.constexpr = num_groups(KIND, BK)
    if P == 1:
        g, n, k = tl.arange(0, G)[:, None, None], tl.arange(0, BN)[None, :, None], tl.arange(0, BK // G)[None, None, :]
        k = k0 + g * (BK // G) + k
        at = n * K + k
        mask = (n0 + n < N) & (k < K)
        base = w + n0.to(tl.int64) * K
    else:
        # A block's bytes of one word: 4 for each of 16 rows. As one axis they are loaded 16 at a time.
        J: tl.constexpr = BK // G // P
        g, j, b = tl.arange(0, G)[:, None, None], tl.arange(0, J)[None, :, None], tl.arange(0, BN * 4)[None, None, :]
        j = k0 // P + g * J + j
        at = j * 64 + b // 64 * (K // P * 64) + b % 64
        mask = (n0 + b // 4 < N) & (j < K // P)
        base = w.to(tl.pointer_type(tl.uint8)) + (n0 // 16).to(tl.int64) * (K // P * 64) + n0 // 8 % 2 * 32
    if N % BN == 0 and K % BK == 0:
        raw = tl.load(base + at, eviction_policy="evict_first")
    else:
        raw = tl.load(base + at, mask=mask, other=0, eviction_policy="evict_first")
    if P != 1:
        raw = tl.reshape(raw, G, BK // G // P, BN, 4)
    return raw


@triton.jit
def after_wait(raw, DEPENDENT: tl.constexpr):
    """Return what was loaded before waiting for the previous kernel.

    Without this, the compiler would move it through shared memory, and so wait for it, before x is asked for.
    """
    if DEPENDENT:
        PACK: tl.constexpr = 32 // raw.dtype.primitive_bitwidth
        raw = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [raw], raw.dtype, False, PACK)
    return raw


@triton.jit
def load_channels(x, k0, R: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, G: tl.constexpr):
    """Load channels k0.. of the first R (of ROWS) rows of x: [G, ROWS, BK/G]."""
    r, k = tl.arange(0, ROWS)[None, :, None], tl.arange(0, BK // G)[None, None, :]
    k = k0 + tl.arange(0, G)[:, None, None] * (BK // G) + k
    mask = (r < R) & (k < K)
    return tl.load(x + r * K + k) if R == ROWS and K % BK == 0 else tl.load(x + r * K + k, mask=mask, other=0.0)


@triton.jit
def multiply(
    raw,
    x,
    sums,
    scale,
    n0,
    k0,
    N: tl.constexpr,
    K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    KIND: tl.constexpr,
    HAS_FP8: tl.constexpr,
):
    """Return sums, [G, BN, ROWS] float32, plus a tile's products with x; in 8 bits without the rows' scales."""
    G: tl.constexpr = num_groups(KIND, BK)
    tile = raw
    if KIND != 0:
        tile = tl.permute(unpack(raw, KIND, x.dtype, HAS_FP8), (0, 2, 1, 3))
        tile = tl.reshape(tile, G, BN, BK // G)
    columns = tl.permute(in_pairs(x) if is_in_pairs(KIND, x.dtype) else x, (0, 2, 1))
    if INTERPRETED:  # it would multiply the bits of bfloat16 as integers
        tile, columns = tile.to(tl.float32), columns.to(tl.float32)
    if KIND < 3:
        sums = tl.dot(tile, columns, sums, input_precision="ieee")
    else:
        product = tl.dot(tile, columns, input_precision="ieee")
        if KIND == 3:
            sums += product * block_scales(scale, n0, k0, N, K, BN, BK, G)
        elif KIND == 4:
            sums += product * group_scales(scale, n0, k0, N, K, BN, BK)
        else:
            scales, minimums = group_minimums(scale, n0, k0, N, K, BN, BK, KIND)
            sums += product * scales
            sums -= minimums * tl.sum(x.to(tl.float32), 2)[:, None, :]
    return sums


@triton.jit
def block_scales(scale, n0, k0, N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, G: tl.constexpr):
    """Load the scales of blocks of 16 rows and 128 channels of a tile: [G, BN, 1]."""
    g, n = (k0 + tl.arange(0, G)[:, None, None] * (BK // G)) // 128, tl.arange(0, BN)[None, :, None]
    BLOCKS: tl.constexpr = (K + 127) // 128
    base = scale + (n0 // 16).to(tl.int64) * BLOCKS
    return tl.load(base + n // 16 * BLOCKS + g, mask=(n0 + n < N) & (g < BLOCKS), other=0.0)


@triton.jit
def group_scales(scale, n0, k0, N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Load the scales of a tile in 4 bits, for each of its groups: [G, BN, 1] float32."""
    g, n = k0 // 32 + tl.arange(0, BK // 32)[:, None, None], tl.arange(0, BN)[None, :, None]
    m = n0 // 8 % 2 * 8 + n
    mask = (g < K // 32) & (n0 + n < N)
    base = scale + (n0 // 16).to(tl.int64) * (K // 32 * 16)
    return tl.load(base + m // 16 * (K // 32 * 16) + g * 16 + m % 16, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def group_minimums(
    scale, n0, k0, N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KIND: tl.constexpr
):
    """Load the scales and minimums of a tile in uint4, for each of its groups: [G, BN, 1] float32 each."""
    GROUPS: tl.constexpr = KIND // 256  # of a record
    RECORD: tl.constexpr = record_bytes(KIND)
    ROW: tl.constexpr = K // 32 // GROUPS * RECORD  # bytes of a block's records
    g, n = k0 // 32 + tl.arange(0, BK // 32)[:, None, None], tl.arange(0, BN)[None, :, None]
    m = n0 // 8 % 2 * 8 + n
    mask = (g < K // 32) & (n0 + n < N)
    record = scale + (n0 // 16).to(tl.int64) * ROW + m // 16 * ROW + g // GROUPS * RECORD
    return record_scales(record, g % GROUPS, m % 16, mask, KIND)


@triton.jit
def record_scales(record, group, lane, mask, KIND: tl.constexpr):
    """Load the scales and minimums of groups in records of uint4, float32; their shape is the arguments'."""
    scales = tl.load((record + 2 * lane).to(tl.pointer_type(tl.float16)), mask=mask, other=0.0).to(tl.float32)
    if KIND % 8 == 6:
        minimums = scales * tl.load(record + 32 + lane, mask=mask, other=0).to(tl.float32)
    else:
        half = (record + 32 + 2 * lane).to(tl.pointer_type(tl.float16))
        minimums = tl.load(half, mask=mask, other=0.0).to(tl.float32)
        if KIND % 8 == 7:
            s = tl.load(record + 64 + group * 16 + lane, mask=mask, other=0).to(tl.int32)
            m = tl.load(record + 192 + group % 4 * 16 + lane, mask=mask, other=0).to(tl.int32)
            m = ((m >> (group // 4 * 4)) & 15) | ((s >> 6) << 4)
            s = s & 63
        else:
            s = tl.load(record + 64 + group * 32 + lane, mask=mask, other=0)
            m = tl.load(record + 80 + group * 32 + lane, mask=mask, other=0)
        minimums *= m.to(tl.float32)
        scales *= s.to(tl.float32)
    return scales, minimums


@triton.constexpr_function
def record_bytes(KIND):
    """Return the bytes of a record of uint4's scales."""
    return 48 if KIND % 8 == 6 else 256 if KIND % 8 == 7 else 64 + KIND // 8


@triton.constexpr_function
def scale_numbers(N, K, KIND):
    """Return the numbers in the scales of an (N, K) weight: how far the scales of a weight below it are."""
    if KIND > 4:
        record = 48 if KIND % 8 == 6 else 256 if KIND % 8 == 7 else 64 + KIND // 8
        return N // 16 * (K // (KIND // 8)) * record
    return N * (K // 32) if KIND == 4 else N // 16 * ((K + 127) // 128) if KIND == 3 else N


# 4 bytes as pairs of bfloat16, the first with the third and the second with the last. As the low bits of 0x43.., 7 bits
# are the number 128 + bits; a byte's upper bit goes into the number to subtract, 128 or 256. The results are exact.
BYTES = """{
.reg .b32 next, low, less, minus;
mov.b32 minus, 0xBF80BF80;
shr.u32 next, $2, 8;
lop3.b32 low, $2, 0x007F007F, 0x43004300, 0xEA;
lop3.b32 less, $2, 0x00800080, 0x43804380, 0x6A;
fma.rn.bf16x2 $0, less, minus, low;
lop3.b32 low, next, 0x007F007F, 0x43004300, 0xEA;
lop3.b32 less, next, 0x00800080, 0x43804380, 0x6A;
fma.rn.bf16x2 $1, less, minus, low;
}"""
# The lower and the upper halves of 4 bytes, likewise.
HALVES = """{
.reg .b32 one, less, a, b, c, d;
mov.b32 one, 0x3F803F80;
mov.b32 less, %s;
shr.u32 b, $4, 8;
shr.u32 c, $4, 4;
shr.u32 d, $4, 12;
lop3.b32 a, $4, 0x000F000F, 0x43004300, 0xEA;
lop3.b32 b, b, 0x000F000F, 0x43004300, 0xEA;
lop3.b32 c, c, 0x000F000F, 0x43004300, 0xEA;
lop3.b32 d, d, 0x000F000F, 0x43004300, 0xEA;
fma.rn.bf16x2 $0, a, one, less;
fma.rn.bf16x2 $1, b, one, less;
fma.rn.bf16x2 $2, c, one, less;
fma.rn.bf16x2 $3, d, one, less;
}"""


@triton.constexpr_function
def is_in_pairs(KIND, dtype):
    """Return whether `unpack` gives the second and third of four channels in exchange, as `in_pairs` does."""
    return (KIND == 1 or KIND >= 4) and dtype == tl.bfloat16 and not INTERPRETED


@triton.jit
def in_pairs(x):
    """Exchange the second and third of each four channels."""
    fours = tl.reshape(x, x.shape[0], x.shape[1], x.shape[2] // 4, 2, 2)
    return tl.reshape(tl.permute(fours, (0, 1, 2, 4, 3)), x.shape[0], x.shape[1], x.shape[2])


@triton.constexpr_function
def instructions(KIND):
    """Return what turns 4 bytes into bfloat16."""
    return BYTES if KIND < 4 else HALVES % ("0xC308C308" if KIND == 4 else "0xC300C300")  # -136 or -128


@triton.jit
def unpack(raw, KIND: tl.constexpr, dtype: tl.constexpr, HAS_FP8: tl.constexpr):
    """Return the channels of words given as bytes [..., 4], [..., P]: 4 bytes, or 8 half bytes (the low halves first).

    HAS_FP8: the GPU has instructions for fp8.
    """
    if KIND >= 4:
        if is_in_pairs(KIND, dtype):
            lower, upper = tl.inline_asm_elementwise(
                instructions(KIND), "=&r,=&r,=&r,=&r,r", [raw], (tl.bfloat16, tl.bfloat16), True, 4
            )
        else:
            ZERO: tl.constexpr = 8388616.0 if KIND == 4 else 8388608.0  # 2^23, and the level of a weight of zero
            lower, upper = number(raw & 15, ZERO).to(dtype), number(raw >> 4, ZERO).to(dtype)
        halves = tl.permute(tl.join(lower, upper), (0, 1, 2, 4, 3))
        channels = tl.reshape(halves, raw.shape[0], raw.shape[1], raw.shape[2], 8)
    elif KIND == 1:
        if is_in_pairs(KIND, dtype):
            channels = tl.inline_asm_elementwise(instructions(KIND), "=&r,=&r,r", [raw], tl.bfloat16, True, 4)
        else:
            channels = number(raw, 8388736.0).to(dtype)
    elif HAS_FP8:
        channels = raw.to(tl.float8e4nv, bitcast=True).to(tl.float16).to(tl.float32).to(dtype)
    else:
        # Sign, 4 bits of exponent, 3 of fraction: as float16's bits, 2^8 times too small.
        bits = raw.to(tl.uint16)
        half = (((bits & 128) << 8) | ((bits & 127) << 7)).to(tl.float16, bitcast=True)
        channels = tl.where((bits & 127) == 127, float("nan"), half.to(tl.float32) * 256.0).to(dtype)
    return channels


@triton.jit
def number(bits, ZERO: tl.constexpr):
    """Return integers below 2^23, plus 2^23, less ZERO, as float32: they need no slow conversion."""
    return (bits.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - ZERO


@triton.jit
def nan_of_words(words):
    """Return NaN for words of fp8 that contain one (a byte of 127 or 255), 0 for others: cheaper than byte by byte."""
    return tl.where((((words & 0x7F7F7F7F) + 0x01010101) & -0x7F7F7F80) != 0, float("nan"), 0.0)
