"""Weights in 8 and 4 bits: how numbers are rounded, and the order in which the bytes lie in memory and on disk.

All formats are symmetric: weight = (byte - zero) * scale with zero 128 or 8, or the byte's float8 number * scale. Rows
lie in blocks of 16, side by side, and four neighbouring channels of a row side by side in 32 bits: a step then streams
through memory once, in order, and one vector instruction takes 16 rows.

    N out_features   K in_features
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qwen3fast.kernels import cpu

LANES = 16  # rows in a block
GROUP = 32  # channels that share a scale in 4 bits
WEIGHTS_AT_ONCE = 2**18  # quantised together: what the passes over them write stays in the processor's cache
# Shares of the group's largest weight that the range ends at; the one with the least squared error is taken.
INT4_RANGES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)


class Packed(NamedTuple):
    """A quantised (N, K) weight.

    int8: weight (N/16, K/4, 16, 4) uint8; scale (N,) float32, one a row.
    fp8:  the same, the bytes of float8_e4m3fn numbers.
    int4: weight (N/16, K/8, 16, 4) uint8, channel 8j+i in the low half and 8j+4+i in the high half of byte i;
          scale (N/16, K/32, 16) bfloat16, one for 32 channels of a row.
    """

    weight: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Format:
    """One way to store weights. `quantize` takes (N, K) in any float dtype, N a multiple of 16, K of 32; `rows` gives
    the weights of some rows, (R, K) in float32, for their int64 numbers (R,)."""

    name: str
    bits: int
    quantize: Callable[[Tensor], Packed]
    rows: Callable[[Packed, Tensor], Tensor]
    devices: tuple[str, ...] = ("cpu", "cuda")  # what there are kernels for

    def dequantize(self, packed: Packed) -> Tensor:
        """The whole weight, (N, K) float32."""
        return self.rows(packed, torch.arange(packed.weight.shape[0] * LANES, device=packed.weight.device))

    def empty(self, out_features: int, in_features: int, device: torch.device | str = "cpu") -> Packed:
        """Uninitialised tensors of a (N, K) weight."""
        blocks = out_features // LANES
        weight = torch.empty(blocks, in_features * self.bits // 32, LANES, 4, dtype=torch.uint8, device=device)
        if self.bits == 8:
            return Packed(weight, torch.empty(out_features, dtype=torch.float32, device=device))
        return Packed(weight, torch.empty(blocks, in_features // GROUP, LANES, dtype=torch.bfloat16, device=device))


def fits(out_features: int, in_features: int) -> bool:
    """Whether a weight of this shape can be packed; all published Qwen3 shapes can."""
    return out_features % LANES == 0 and in_features % GROUP == 0


def quantize_int8(weight_NK: Tensor) -> Packed:
    """8 bits, one scale a row: the row's largest weight becomes +-127."""
    weight = weight_NK.float()
    scale_N = weight.abs().amax(dim=1) / 127
    byte_NK = torch.round(weight / scale_N.clamp(min=1e-30)[:, None]).clamp(-127, 127).add_(128).to(torch.uint8)
    return pack_int8(byte_NK, scale_N)


def pack_int8(byte_NK: Tensor, scale_N: Tensor) -> Packed:
    """8 bits from bytes (uint8; 128 stands for zero) and a scale for each row."""
    return Packed(_side_by_side(byte_NK), scale_N.float())


def rows_int8(packed: Packed, row_R: Tensor) -> Tensor:
    """Rows of the weight, (R, K) in float32."""
    return (_row_bytes(packed, row_R).float() - 128) * packed.scale[row_R, None]


def quantize_fp8(weight_NK: Tensor) -> Packed:
    """float8_e4m3fn, one scale a row: the row's largest weight becomes +-448, the format's largest number."""
    weight = weight_NK.float()
    scale_N = weight.abs().amax(dim=1) / torch.finfo(torch.float8_e4m3fn).max
    number_NK = (weight / scale_N.clamp(min=1e-30)[:, None]).to(torch.float8_e4m3fn)
    return Packed(_side_by_side(number_NK.view(torch.uint8)), scale_N)


def rows_fp8(packed: Packed, row_R: Tensor) -> Tensor:
    """Rows of the weight, (R, K) in float32."""
    return _row_bytes(packed, row_R).contiguous().view(torch.float8_e4m3fn).float() * packed.scale[row_R, None]


def _side_by_side(byte_NK: Tensor) -> Tensor:
    """A byte for each weight, in the order of 8-bit formats."""
    N, K = byte_NK.shape
    return byte_NK.view(N // LANES, LANES, K // 4, 4).transpose(1, 2).contiguous()


def _row_bytes(packed: Packed, row_R: Tensor) -> Tensor:
    return packed.weight[row_R // LANES, :, row_R % LANES].flatten(1)


def quantize_int4(weight_NK: Tensor) -> Packed:
    """4 bits, one scale for 32 channels. The range is -8..7, its long side on the side of the group's largest weight.

    Cutting the largest weights off a little often rounds the others better: the best of `INT4_RANGES` is taken, by
    squared error, for each group. A group with NaN or infinity becomes NaN.
    """
    N, K = weight_NK.shape
    group = weight_NK.float().view(N, K // GROUP, GROUP)
    largest = group.gather(2, group.abs().argmax(dim=2, keepdim=True))
    best_scale, best_level = torch.zeros_like(largest), torch.full_like(group, 8, dtype=torch.uint8)
    best_error = torch.full_like(largest, torch.inf)
    for share in INT4_RANGES:
        scale = (largest * (-share / 8)).to(torch.bfloat16).float()
        level = torch.round(group / torch.where(scale == 0, 1.0, scale)).clamp_(-8, 7)
        error = _sum_of_halves((level * scale - group).square_())
        is_better = error < best_error
        best_error = torch.where(is_better, error, best_error)
        best_scale = torch.where(is_better, scale, best_scale)
        best_level = torch.where(is_better, level.add_(8).to(torch.uint8), best_level)
    # NaN and infinity in a group make all of it NaN: they must not turn into ordinary numbers.
    best_scale = torch.where(group.isfinite().all(dim=2, keepdim=True), best_scale, torch.nan)
    return pack_int4(best_level.view(N, K), best_scale.view(N, K // GROUP))


def _sum_of_halves(x: Tensor) -> Tensor:
    """Sums over the last dimension, a power of two, kept: in an order that does not depend on the machine."""
    while (half := x.shape[-1] // 2) > 0:
        x = x[..., :half] + x[..., half:]
    return x


def pack_int4(level_NK: Tensor, scale_NG: Tensor) -> Packed:
    """4 bits from levels (uint8, 0 to 15; 8 stands for zero) and a scale for each 32 channels, rounded to bfloat16."""
    N, K = level_NK.shape
    # (block, row, 8 channels, half, 4 channels): the second four channels go to the high halves.
    low, high = level_NK.view(N // LANES, LANES, K // 8, 2, 4).unbind(3)
    scale = scale_NG.view(N // LANES, LANES, K // GROUP).transpose(1, 2)
    return Packed((low | high << 4).transpose(1, 2).contiguous(), scale.to(torch.bfloat16).contiguous())


def rows_int4(packed: Packed, row_R: Tensor) -> Tensor:
    """Rows of the weight, (R, K) in float32."""
    byte = packed.weight[row_R // LANES, :, row_R % LANES]  # (R, K/8, 4)
    level = torch.stack([byte & 15, byte >> 4], dim=2).view(len(row_R), -1, GROUP).float() - 8
    scale = packed.scale[row_R // LANES, :, row_R % LANES].float()
    return (level * scale[..., None]).flatten(1)


FORMATS = {
    "int8": Format("int8", 8, quantize_int8, rows_int8),
    "int4": Format("int4", 4, quantize_int4, rows_int4),
    "fp8": Format("fp8", 8, quantize_fp8, rows_fp8, devices=("cuda",)),
}


def quantize(weight_NK: Tensor, format: Format) -> Packed:
    """Quantise an (N, K) weight in any float dtype, N a multiple of 16, K of 32.

    With `format.quantize`, some blocks of rows at a time, or in C++, which gives the same numbers in a pass.
    """
    N, K = weight_NK.shape
    is_served = weight_NK.dtype == torch.bfloat16 and weight_NK.device.type == "cpu" and "cpu" in format.devices
    if is_served and cpu.is_loaded():
        packed = format.empty(N, K)
        cpu.round_weight(weight_NK.contiguous(), *packed)
        return packed
    return pack_by_rows(N, K, format, weight_NK.device, lambda rows: format.quantize(weight_NK[rows]))


def pack_by_rows(N: int, K: int, format: Format, device: torch.device, pack: Callable[[slice], Packed]) -> Packed:
    """A whole packed weight from what `pack` gives for some rows (whole blocks) of it."""
    result = format.empty(N, K, device)
    for rows in row_slices(N, K):
        for whole, piece in zip(result, pack(rows), strict=True):
            first = rows.start * whole.shape[0] // N
            whole[first : first + piece.shape[0]] = piece
    return result


def row_slices(N: int, K: int) -> Iterator[slice]:
    """All rows of an (N, K) weight, some blocks at a time."""
    rows = max(1, WEIGHTS_AT_ONCE // K // LANES) * LANES
    for start in range(0, N, rows):
        yield slice(start, min(start + rows, N))
