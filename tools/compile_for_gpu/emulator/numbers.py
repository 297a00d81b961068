"""Numbers of PTX's types in registers, which are bits here: uint64, one entry per thread.

Types of two halves ("bf16x2") have numbers [2, threads], the lower half first.
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray  # of any type and shape

BITS = {"pred": 1, "b8": 8, "u8": 8, "s8": 8, "e4m3x2": 16, "f16x2": 32, "bf16x2": 32, "bf16": 16}
BITS |= {f"{kind}{size}": size for kind in "busf" for size in (16, 32, 64)}
FLOATS = ("f16", "bf16", "f16x2", "bf16x2", "f32", "f64")
NAN_OF_BF16 = 0x7FFF
# The types that instructions may name.
INTEGERS = "u16 s16 u32 s32 u64 s64"
REALS = " ".join(FLOATS)
PLAIN_BITS = "b8 b16 b32 b64"


def low_bits(bits: Array, count: int) -> Array:
    """Return the lowest bits."""
    return bits if count == 64 else bits & np.uint64((1 << count) - 1)


def decode(bits: Array, kind: str) -> Array:
    """Return numbers: float64 of halves and f64, float32, int64 of signed integers, otherwise uint64."""
    if kind.endswith("x2"):
        half = BITS[kind] // 2
        return np.stack([decode(bits, kind[:-2]), decode(bits >> np.uint64(half), kind[:-2])])
    bits = low_bits(bits, 8 if kind == "e4m3" else BITS[kind])
    if kind == "f32":
        return bits.astype(np.uint32).view(np.float32)
    if kind == "f64":
        return bits.view(np.float64)
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    if kind == "f16":
        return bits.astype(np.uint16).view(np.float16).astype(np.float64)
    if kind == "e4m3":
        return _decode_e4m3(bits)
    if kind.startswith("s"):
        unused = np.int64(64 - BITS[kind])
        return (bits.view(np.int64) << unused) >> unused
    return bits


def encode(numbers: Array, kind: str) -> Array:
    """Return the bits of numbers: floats are rounded to the nearest, halves to even; integers are cut off."""
    if kind.endswith("x2"):
        lower, upper = (encode(half, kind[:-2]) for half in numbers)
        return lower | (upper << np.uint64(BITS[kind] // 2))
    if kind == "f32":
        return numbers.astype(np.float32).view(np.uint32).astype(np.uint64)
    if kind == "f64":
        return numbers.astype(np.float64).view(np.uint64)
    if kind == "bf16":
        return _encode_bf16(numbers)
    if kind == "f16":
        return numbers.astype(np.float16).view(np.uint16).astype(np.uint64)
    bits = numbers.view(np.uint64) if numbers.dtype == np.int64 else numbers.astype(np.uint64)
    return low_bits(bits, BITS[kind])


def _decode_e4m3(bits: Array) -> Array:
    exponent, fraction = (bits >> np.uint64(3)) & np.uint64(15), (bits & np.uint64(7)).astype(np.float64)
    power = np.maximum(exponent.astype(np.int64), 1) - 7
    size = np.ldexp(np.where(exponent > 0, 1 + fraction / 8, fraction / 8), power)
    size = np.where((bits & np.uint64(127)) == 127, np.nan, size)  # there is no infinity
    return np.where(bits & np.uint64(128), -size, size)


def _encode_bf16(numbers: Array) -> Array:
    single = numbers.astype(np.float32)
    bits = single.view(np.uint32)
    if numbers.dtype == np.float64:  # rounding twice must not meet a tie that there is not: round to odd first
        is_inexact = np.isfinite(single) & (single != numbers) & (bits & np.uint32(1) == 0)
        is_far = np.abs(single.astype(np.float64)) > np.abs(numbers)
        bits = np.where(is_inexact, np.where(is_far, bits - np.uint32(1), bits + np.uint32(1)), bits)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(single), np.uint32(NAN_OF_BF16), rounded).astype(np.uint64)


def to_bytes(bits: Array, size: int) -> Array:
    """Return the lowest bytes of each register, [threads, size]."""
    return np.ascontiguousarray(bits, np.uint64).view(np.uint8).reshape(-1, 8)[:, :size]


def from_bytes(data: Array) -> Array:
    """Return registers of bytes [threads, at most 8]."""
    padded = np.zeros((len(data), 8), np.uint8)
    padded[:, : data.shape[1]] = data
    return padded.view(np.uint64).reshape(-1)
