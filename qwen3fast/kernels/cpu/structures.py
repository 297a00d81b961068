"""The structures of ops.h, built from tensors. The caller keeps the tensors alive."""

from __future__ import annotations

from ctypes import Structure
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from qwen3fast.kernels.cpu.library import structures

# `Linear`, `Sampling` and `Processing` of ops.h are of pointers; the others have the same names there.
_declared = structures()
LinearPointers, SamplingPointers, ProcessingPointers = (_declared[n] for n in ("Linear", "Sampling", "Processing"))
Cache, Layer, LowRank, Adapters, Ends, Sizes = (
    _declared[name] for name in ("Cache", "Layer", "LowRank", "Adapters", "Ends", "Sizes")
)
LANES = 16  # channels are processed in vectors of this many
GROUP = 32  # channels that share a scale
MANY_ROWS = 8  # of products in bfloat16, from which rows are lanes, see linear.cpp
ZERO_RECORD = 3 * LANES  # bytes of uint4's scales with a zero point; see quantized.cpp
BYTE_SCALES = LANES  # bytes of a line of int4's scales in bytes
SHORT_SPAN, SHORT_RECORD = 256, 16 * LANES  # with minimums whose numbers have 6 bits
HALF_GROUP = 16  # channels that share a scale in 6 bits
INT6_SPAN, INT6_RECORD = 256, 18 * LANES  # of int6's scales
NL4_SPAN, NL4_RECORD, NL4_SHORT_RECORD = 256, 10 * LANES, 2 * LANES  # of nl4's scales; a short record is of 32 channels
# What levels of nl4 stand for: kvalues_iq4nl of ggml-common.h, in github.com/ggml-org/ggml.
NL4_TABLE = torch.tensor([-127.0, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], device="cpu")
# Bits, span and bytes of the records of 6 and 5 bits. No weight of 4 bits has as many words and bytes.
RECORDS = (
    (6, INT6_SPAN, INT6_RECORD),
    (5, SHORT_SPAN, SHORT_RECORD),
    (5, GROUP, ZERO_RECORD),
    (5, GROUP, 4 * LANES + GROUP),
)
FP8_SPAN = 128  # channels of fp8's blocks, which share a scale
CODED = 128  # channels that are coded together in 12 bits each, see lossless.h
LOSSLESS_BITS = 12  # per number
CODED_WORDS = CODED * LOSSLESS_BITS // 16
RECORD = 8  # bytes of the record of such a row
NEVER = 2**31 - 1  # a size from which a form is used that is not to be used


class Tiles(IntEnum):
    """`Tiles` of ops.h: whether products are made by tiles, in bfloat16, or in int8 where the weight allows it."""

    NONE = 0
    BFLOAT16 = 1
    INT8 = 2


class RowLimits(NamedTuple):
    """The numbers of rows from which other forms of a product serve, each until the next; of equal ones, the last does.

    dequantized: PyTorch's product, with the dequantized weight where the weight is quantized.
    """

    int8_tiles: int = NEVER
    tiles: int = NEVER
    dequantized: int = NEVER

    def form_at(self, rows: int) -> str | None:
        """Return the form that multiplies so many rows, as the field is called; None for the C++ operation's own."""
        begun = [(limit, index) for index, limit in enumerate(self) if limit <= rows]
        return self._fields[max(begun)[1]] if begun else None

    def tiles_at(self, rows: int) -> Tiles:
        """Return the tiles that multiply so many rows, on a processor that has tiles."""
        return {"int8_tiles": Tiles.INT8, "tiles": Tiles.BFLOAT16}.get(self.form_at(rows) or "", Tiles.NONE)


def has_int8_tiles(linear: Structure) -> bool:
    """Return whether `Tiles.INT8` multiplies this weight in int8; of fewer bits, it is quantized again for that."""
    return bool((linear.bits < 8 or (linear.bits == 8 and linear.span == 0)) and linear.K % 64 == 0)


class NotServedError(ValueError):
    """An error for tensors that are in order, but that an operation does not serve; a plainer form does."""


def require(condition: bool, message: str, error: type[ValueError] = ValueError) -> None:
    """Check a condition. Raises: an error with this message if it does not hold."""
    if not condition:
        raise error(message)


def is_array(tensor: Tensor, dtype: torch.dtype, *shape: int) -> bool:
    """Return whether a tensor is of this dtype and shape, contiguous and on the CPU, as C++ reads it."""
    return tensor.dtype == dtype and tensor.shape == shape and tensor.is_contiguous() and tensor.device.type == "cpu"


def address(name: str, tensor: Tensor, dtype: torch.dtype, *shape: int, error: type[ValueError] = ValueError) -> int:
    """Return where C++ reads a tensor. Raises: an error with its name and what it must be, unless it `is_array`."""
    if not is_array(tensor, dtype, *shape):
        raise error(f"{name} must be {shape} {str(dtype).removeprefix('torch.')}, contiguous, on the CPU")
    return tensor.data_ptr()


def packed_linear(packed: Tensor, scale: Tensor) -> Structure:
    """Return packed weights as quantized.cpp, fp8.cpp and lossless.h describe them.

    Raises: ValueError for tensors that are not.
    """
    is_packed = packed.dim() == 4 and is_array(packed, torch.uint8, *packed.shape[:2], LANES, 4)
    require(is_packed, "packed must be (N/16, K * bits / 32, 16, 4) uint8, contiguous")
    if scale.dtype == torch.uint8 and scale.dim() == 1:
        return _lossless_linear(packed, scale)
    bits = bits_of(packed, scale)
    N, K = packed.shape[0] * LANES, packed.shape[1] * 32 // bits
    require(K % GROUP == 0, f"packed must have K a multiple of {GROUP}")
    span, record = span_and_record(packed, scale)
    shapes = {
        torch.float32: {0: (N,), 4: (N // LANES, -(-K // span))}.get(record, (N, 1)),
        torch.bfloat16: (N // LANES, K // GROUP, LANES),
        torch.int8: (N // LANES, 1 + K // GROUP, LANES),
        torch.uint8: (N // LANES, K // span, record)
        if bits > 4 or is_record(span, record) or is_nl4(span, record)
        else None,
    }
    shape = shapes.get(scale.dtype)
    require(
        shape is not None and is_array(scale, scale.dtype, *shape) and (bits == 8 or span % GROUP == K % span == 0),
        "scale must be (N,) float32 for int8, (N, 1) or (N/16, K/128) for fp8; for 4 bits, (N/16, K/32, 16) bfloat16, "
        "(N/16, 1 + K/32, 16) int8, or (N/16, K/span, 48 or 64 + span, or 160 or 256 for a span of 256, or 32 "
        "for one of 32) uint8; for 5 bits, (N/16, K/256, 256) or (N/16, K/32, 48 or 96) uint8, for 6 bits "
        "(N/16, K/256, 288) uint8",
    )
    pointers = (packed.data_ptr(), scale.data_ptr())
    if scale.dtype == torch.int8:
        return LinearPointers(*pointers, N, K, bits, 0, BYTE_SCALES)
    return LinearPointers(*pointers, N, K, bits, span if record else 0, record)


def bits_of(packed: Tensor, scale: Tensor) -> int:
    """Return the bits of quantized weights, which are not lossless: 4, 5, 6 or 8."""
    if scale.dtype == torch.float32:
        return 8
    if scale.dtype != torch.uint8 or scale.dim() != 3:
        return 4
    for bits, span, record in RECORDS:
        if record == scale.shape[2] and packed.shape[1] * 32 == scale.shape[1] * span * bits:
            return bits
    return 4


def in_features_of(packed: Tensor) -> int:
    """Return K of a lossless weight. packed: its bytes, (N/16, W/2, 16, 4) for W words of 16 bits per row."""
    groups, rest = divmod(packed.shape[1] * 2, CODED_WORDS)
    return groups * CODED + rest


def _lossless_linear(packed: Tensor, scale: Tensor) -> Structure:
    N, K = packed.shape[0] * LANES, in_features_of(packed)
    require(
        K % (CODED // 2) == 0
        and is_array(scale, torch.uint8, *scale.shape)
        and len(scale) >= N * RECORD
        and len(scale) % 4 == 0,
        "lossless weights must have rows of whole groups of 128 channels and up to 64 more, and a record for each",
    )
    return LinearPointers(packed.data_ptr(), scale.data_ptr(), N, K, LOSSLESS_BITS)


def span_and_record(packed: Tensor, scale: Tensor) -> tuple[int, int]:
    """Return the channels that a record of scales covers, and its bytes for 16 rows: of uint4, uint5, int6 and nl4,
    and of fp8, whose scales have two dimensions; (32, 0) for other formats.
    """
    if scale.dtype == torch.float32 and scale.dim() == 2:
        N, K = packed.shape[0] * LANES, packed.shape[1] * 4
        return (K, 4 * LANES) if scale.shape == (N, 1) else (FP8_SPAN, 4)
    if scale.dtype != torch.uint8 or scale.dim() != 3 or not scale.shape[1]:
        return GROUP, 0
    return max(GROUP, packed.shape[1] * 32 // bits_of(packed, scale) // scale.shape[1]), scale.shape[2]


def is_record(span: int, record: int) -> bool:
    """Return whether a record of uint4's scales for so many channels may have so many bytes."""
    return record in (ZERO_RECORD, 4 * LANES + span) or (span, record) == (SHORT_SPAN, SHORT_RECORD)


def is_nl4(span: int, record: int) -> bool:
    """Return whether a record of scales for so many channels, of 4 bits, is of nl4."""
    return (span, record) in ((NL4_SPAN, NL4_RECORD), (GROUP, NL4_SHORT_RECORD))


def channels_of(bits: int) -> int:
    """Return the channels that share a scale in 4, 5 or 6 bits, and whose levels lie together."""
    return HALF_GROUP if bits == 6 else GROUP


def unpack_levels(byte: Tensor, bits: int) -> Tensor:
    """Return levels in 4, 5 or 6 bits, (R, K/C, C) uint8, with C `channels_of` these bits.

    byte: (R, K * bits / 32, 4), the bytes of some rows, as quantized.cpp describes them.
    """
    channels, more = channels_of(bits), bits - 4
    byte = byte.unflatten(1, (-1, channels * bits // 32))
    low = byte[:, :, : channels // 8]
    level = torch.stack([low & 15, low >> 4], dim=3).flatten(2, 3)  # four channels of each of C/4 parts
    if more:
        shift = torch.arange(0, channels // 4 * more, more, dtype=torch.uint8, device=byte.device)
        level = level | (byte[:, :, -1:] >> shift[:, None] & (1 << more) - 1) << 4
    return level.flatten(2)


def record_levels(tail: Tensor, groups: int) -> Tensor:
    """Return s and m of each group of records with minimums, (..., groups, 2, 16) uint8. tail: the bytes after dmin."""
    if tail.shape[-1] == groups * 2 * LANES:
        levels: Tensor = tail.unflatten(-1, (groups, 2, LANES))
        return levels
    first, low = tail.split([8 * LANES, 4 * LANES], dim=-1)
    first, low = first.unflatten(-1, (8, LANES)), low.unflatten(-1, (4, LANES))
    m = torch.cat([low & 15, low >> 4], dim=-2) | (first >> 6 << 4)
    return torch.stack([first & 63, m], dim=-2)


def bfloat16_scales(scale: Tensor) -> Tensor:
    """Return scales of int4 as bfloat16, (N/16, K/32, 16), or (R, K/32) of rows, from either way to store them.

    In bytes they are (N/16, 1 + K/32, 16) int8: a line of units, then a line per group. A unit is the exponent of a
    power of two, 127 for 1; a scale, relative to it, has a sign, 4 bits of exponent, of which 15 stands for 1, and 3
    bits of fraction. A unit of 0 makes all of a row 0.
    """
    if scale.is_floating_point():  # another dtype after `model.float()`
        return scale.to(torch.bfloat16)
    unit, byte = scale.view(torch.uint8).int().split([1, scale.shape[1] - 1], dim=1)
    size = torch.where(unit == 0, 0, (unit + (byte >> 3 & 15) - 15) << 7 | (byte & 7) << 4)
    bits: Tensor = (byte & 128) << 8 | size
    return bits.to(torch.int16).view(torch.bfloat16)


def cache(k_RKSD: Tensor, v_RKSD: Tensor, k_scale_RKS: Tensor | None, v_scale_RKS: Tensor | None) -> Structure:
    """Return keys and values of one layer.

    Raises: ValueError for tensors that are not as ops.h describes them.
    """
    is_quantized = k_RKSD.dtype == torch.int8
    is_served = is_quantized or k_RKSD.dtype == torch.bfloat16
    require(is_served, "keys and values must be bfloat16 or int8", NotServedError)
    R, K, S, D = k_RKSD.shape
    pointers = [address("keys and values", tensor, k_RKSD.dtype, R, K, S, D) for tensor in (k_RKSD, v_RKSD)]
    for scale in (k_scale_RKS, v_scale_RKS):
        require((scale is not None) == is_quantized, "scales of keys and values are for int8 only, and needed there")
        if scale is not None:
            pointers.append(address("scales of keys and values", scale, torch.float32, R, K, S))
    return Cache(*pointers)


def checked_cache(
    name: str, q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor | None, v_scale: Tensor | None
) -> Structure:
    require(q.dtype == torch.bfloat16, f"{name}: q must be bfloat16")
    require(k.shape[3] == q.shape[3] and q.shape[2] % k.shape[1] == 0, f"{name}: q must fit the cache's heads")
    try:
        return cache(k, v, k_scale, v_scale)
    except ValueError as err:
        raise ValueError(f"{name}: {err}") from None


def checked_positions(name: str, position: Tensor, count: int) -> Tensor:
    require(position.dtype == torch.int64 and position.numel() == count, f"{name}: an int64 position for each query")
    return position.contiguous()
