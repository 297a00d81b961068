"""Tiles of weights: reading each format and multiplying it with up to 8 rows, in one form for all formats.

A tile is BN rows by BK channels of a weight. With so few rows, a product is bound by reading the weight: the sums run
on ordinary cores in float32, and a row's result does not depend on the number of rows. Plain weights are loaded as
[1, BN, BK]; packed weights (see quantization/formats.py) as words [1, words, BN] of P channels each, adjacent in memory
in this order.

Triton uses the layout of the last load. For packed weights this must be the words' load, after the loads of x and of
scales; otherwise the whole tile goes through shared memory.

    R rows of x   N out_features   K in_features   P channels in a 32-bit word
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen3fast.kernels.cpu.structures import SHORT_RECORD, SHORT_SPAN, span_and_record

LANES = 16  # rows in a block of packed weights, as in quantization/formats.py
GROUP = 32  # channels that share a scale in 4 bits
# How a weight is stored: kinds below INT4 have 8 bits or more. FP8_BLOCK has a scale per 16 rows and 128 channels.
# Kinds of uint4 hold its layout of scales as well: 8 * span + 5 with minimums, + 6 with zero points, + 7 with minimums
# whose numbers have 6 bits; each layout has kernels of its own.
PLAIN, INT8, FP8, FP8_BLOCK, INT4, UINT4 = 0, 1, 2, 3, 4, 5
ZERO_RECORD = 3 * LANES
# Weights in a tile; more would not fit into registers. Chosen by compiling: no kernel spills (tests hold this).
TILE = {1: 8192, 2: 8192, 4: 4096, 8: 4096}
LARGEST_BK = {1: 4096, 2: 4096, 4: 1024, 8: 1024}
SMALLEST_BK = 1024


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


def tile_shape(num_rows: int, in_features: int, kind: int, num_tiles: int = 1) -> tuple[int, int]:
    """Return (BN, BK): all channels at once if this wastes little of a tile, otherwise equal parts.

    num_tiles: number of weights that a program multiplies x with at the same time.
    """
    rows = triton.next_power_of_2(num_rows)
    size, largest = TILE[rows] // num_tiles, LARGEST_BK[rows]
    BK = triton.next_power_of_2(in_features)
    if kind != PLAIN:
        BN = LANES // 2
        return BN, min(BK, size // BN)
    if largest < BK or 4 * in_features < 3 * BK:
        BK = next((part for part in (2048, 1024) if part <= largest and in_features % part == 0), SMALLEST_BK)
    return max(1, size // BK), BK


@triton.jit
def load_weights(w, n0, k0, N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, P: tl.constexpr):
    """Load the tile at row n0 and channel k0: [1, BN, BK], or words [1, BK/P, BN]; 0 beyond the weight."""
    n = tl.arange(0, BN)
    if P == 1:
        k = k0 + tl.arange(0, BK)
        at = (n * K)[None, :, None] + k[None, None, :]
        mask = (n0 + n < N)[None, :, None] & (k < K)[None, None, :]
        base = w + n0.to(tl.int64) * K
    else:
        j = k0 // P + tl.arange(0, BK // P)
        at = (j * 16)[None, :, None] + (n0 // 8 % 2 * 8 + n)[None, None, :]
        mask = (n0 + n < N)[None, None, :] & (j < K // P)[None, :, None]
        base = w + (n0 // 16).to(tl.int64) * (K // P * 16)
    if N % BN == 0 and K % BK == 0:
        raw = tl.load(base + at, eviction_policy="evict_first")
    else:
        raw = tl.load(base + at, mask=mask, other=0, eviction_policy="evict_first")
    return raw


@triton.jit
def load_channels(x, k0, R: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, P: tl.constexpr):
    """Load channels k0.. of the first R (of ROWS) rows of x as float32 [ROWS, 1, BK], or [ROWS, BK/P, 1, P]."""
    r = tl.arange(0, ROWS)
    if P == 1:
        k = k0 + tl.arange(0, BK)
        at = (r * K)[:, None, None] + k[None, None, :]
        mask = (r < R)[:, None, None] & (k < K)[None, None, :]
    else:
        j, p = k0 // P + tl.arange(0, BK // P), tl.arange(0, P)
        at = (r * K)[:, None, None, None] + (j * P)[None, :, None, None] + p[None, None, None, :]
        mask = (r < R)[:, None, None, None] & (j < K // P)[None, :, None, None]
    part = tl.load(x + at) if R == ROWS and K % BK == 0 else tl.load(x + at, mask=mask, other=0.0)
    return part.to(tl.float32)


@triton.jit
def sum_channels(x, P: tl.constexpr):
    """Sum over the channels of what `load_channels` gives, times a tile or not: [ROWS, BN or 1]."""
    sums = tl.sum(x, 2) if P == 1 else tl.sum(tl.sum(x, 3), 1)
    return sums


@triton.jit
def multiply(
    w,
    x,
    scale,
    n0,
    k0,
    N: tl.constexpr,
    K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    KIND: tl.constexpr,
    P: tl.constexpr,
):
    """Load a tile and multiply it with x: sums for `finish`, float32, in 8 bits without the rows' scales."""
    if KIND == 3:
        scales = block_scales(scale, n0, k0, K, BK)
    elif KIND == 4:
        scales = group_scales(scale, n0, k0, N, K, BN, BK)
    elif KIND > 4:
        scales, minimums = group_minimums(scale, n0, k0, N, K, BN, BK, KIND)
    raw = load_weights(w, n0, k0, N, K, BN, BK, P)
    if KIND == 0:
        sums = tl.sum(raw.to(tl.float32) * x, 2)
    else:
        sums = tl.sum(unpack(raw, KIND) * x, 3)  # over the channels of a word: within a thread
        if KIND == 2 or KIND == 3:
            sums = sums * 256.0 + nan_of_words(raw)  # see `_byte`
        if KIND == 3 or KIND == 4:
            sums *= scales
        elif KIND > 4:
            sums = sums * scales - tl.sum(x, 3) * minimums
    return sums


@triton.jit
def finish(sums, P: tl.constexpr):
    """Return the sums of all tiles, [ROWS, BN]; packed weights have separate sums per word until here."""
    if P != 1:
        sums = tl.sum(sums, 1)
    return sums


@triton.jit
def block_scales(scale, n0, k0, K: tl.constexpr, BK: tl.constexpr):
    """Load the scales of blocks of 128 channels, for each word of a tile, whose rows share them: [1, BK/4, 1]."""
    j = k0 // 4 + tl.arange(0, BK // 4)[None, :, None]
    base = scale + (n0 // 16).to(tl.int64) * ((K + 127) // 128)
    return tl.load(base + j // 32, mask=j < K // 4, other=0.0)


@triton.jit
def group_scales(scale, n0, k0, N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Load the scales of a tile in 4 bits, for each of its words: [1, BK/8, BN] float32."""
    j, n = k0 // 8 + tl.arange(0, BK // 8), tl.arange(0, BN)
    at = (j // 4 * 16)[None, :, None] + (n0 // 8 % 2 * 8 + n)[None, None, :]
    mask = (j < K // 8)[None, :, None] & (n0 + n < N)[None, None, :]
    base = scale + (n0 // 16).to(tl.int64) * (K // 32 * 16)
    return tl.load(base + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def group_minimums(
    scale, n0, k0, N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KIND: tl.constexpr
):
    """Load the scales and minimums of a tile in uint4, for each of its words: [1, BK/8, BN] float32 each."""
    WORDS: tl.constexpr = KIND // 64  # of a record
    RECORD: tl.constexpr = record_bytes(KIND)
    j, n = (k0 // 8 + tl.arange(0, BK // 8))[None, :, None], (n0 // 8 % 2 * 8 + tl.arange(0, BN))[None, None, :]
    mask = (j < K // 8) & (n0 + n - n0 // 8 % 2 * 8 < N)
    record = scale + (n0 // 16).to(tl.int64) * (K // 8 // WORDS * RECORD) + j // WORDS * RECORD
    return record_scales(record, j % WORDS // 4, n, mask, KIND)


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


@triton.jit
def unpack(words, KIND: tl.constexpr):
    """Return the channels of 32-bit words, [..., P] float32: 4 bytes, or 8 half bytes (the low halves first).

    Numbers of fp8 are 2^8 times too small, and 1.875 or -1.875 instead of NaN; others are at most 1.75.
    """
    # The axis of the first join counts most: [..., a, b, c] is channel 4a + 2b + c.
    if KIND >= 4:
        ZERO: tl.constexpr = 8388616.0 if KIND == 4 else 8388608.0  # 2^23, and the level of a weight of zero
        pairs = tl.join(
            tl.join(
                tl.join(_half(words, 0, ZERO), _half(words, 4, ZERO)),
                tl.join(_half(words, 16, ZERO), _half(words, 20, ZERO)),
            ),
            tl.join(
                tl.join(_half(words, 8, ZERO), _half(words, 12, ZERO)),
                tl.join(_half(words, 24, ZERO), _half(words, 28, ZERO)),
            ),
        )
        channels = tl.reshape(pairs, words.shape[0], words.shape[1], words.shape[2], 8)
    else:
        pairs = tl.join(
            tl.join(_byte(words, 0, KIND), _byte(words, 16, KIND)),
            tl.join(_byte(words, 8, KIND), _byte(words, 24, KIND)),
        )
        channels = tl.reshape(pairs, words.shape[0], words.shape[1], words.shape[2], 4)
    return channels


@triton.jit
def _half(words, SHIFT: tl.constexpr, ZERO: tl.constexpr):
    """Return 4 bits less ZERO as float32. As the low bits of 2^23, they need no slow integer conversion."""
    return (((words >> SHIFT) & 15) | 0x4B000000).to(tl.float32, bitcast=True) - ZERO


@triton.jit
def _byte(words, SHIFT: tl.constexpr, KIND: tl.constexpr):
    """Return 8 bits as float32: an integer with zero point 128, or what `unpack` says of fp8."""
    bits = (words >> SHIFT) & 255
    if KIND == 1:
        number = (bits | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0
    else:
        # Sign, 4 bits of exponent, 3 of fraction: as float16's bits, 2^8 times too small.
        half = (((bits & 128) << 8) | ((bits & 127) << 7)).to(tl.uint16).to(tl.float16, bitcast=True)
        number = half.to(tl.float32)
    return number


@triton.jit
def nan_of_words(words):
    """Return NaN for words of fp8 that contain one (a byte of 127 or 255), 0 for others: cheaper than byte by byte."""
    return tl.where((((words & 0x7F7F7F7F) + 0x01010101) & -0x7F7F7F80) != 0, float("nan"), 0.0)
