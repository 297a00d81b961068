"""The formats of packed weights: how they are quantized; packed.py describes the order of their bytes.

int8 and int4 are symmetric: weight = (level - zero) * scale with zero 128 or 8; so is int6 (int6.py). In fp8, weight =
float8 number * scale (fp8.py). uint4 and uint5 have a minimum or a zero point per group (uint4.py). Levels of nl4 are
looked up in a table (nl4.py). lossless has all bits of bfloat16 (lossless.py).

    N out_features   K in_features
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from qwen3fast.kernels import cpu
from qwen3fast.kernels.cpu.lossless import MAX_CHANNELS, MULTIPLE, packed_shape
from qwen3fast.kernels.cpu.ops import quantize_weight
from qwen3fast.kernels.cpu.structures import INT6_SPAN, NL4_SPAN, RECORD, SHORT_SPAN, bfloat16_scales, in_features_of
from qwen3fast.quantization.fp8 import quantize_fp8, quantize_fp8_blocks, rows_fp8, scale_shape
from qwen3fast.quantization.int6 import int6_shape, quantize_int6, rows_int6
from qwen3fast.quantization.lossless import LOSSLESS, pack_lossless, rows_lossless
from qwen3fast.quantization.nl4 import nl4_shape, quantize_nl4, rows_nl4
from qwen3fast.quantization.packed import (
    GROUP,
    LANES,
    Packed,
    by_blocks,
    bytes_of_rows,
    least_scales,
    levels_of_rows,
    pack_bytes,
    pack_halves,
    short_scales,
    sum_of_halves,
)
from qwen3fast.quantization.uint4 import Layout, quantize_uint4, rows_uint4, scales_uint4

__all__ = ["ALL_FORMATS", "FORMATS", "GROUP", "LANES", "SAVED_FORMATS", "Format", "Packed", "fits", "quantize"]

WEIGHTS_AT_ONCE = 2**18  # quantized together: results of each pass stay in the processor's cache
IN_CPP = ("int8", "int4")  # formats that quantize_weight.cpp quantizes to
# Ends of the range, as shares of the group's largest weight; the one with the least squared error is taken.
INT4_RANGES = (1.0, 1.06, 0.94, 0.88, 0.82, 0.76)


@dataclass(frozen=True)
class Format:
    """A way to store weights.

    Attributes:
        bits: per weight, without scales.
        quantize: packs a weight (N, K) in any float dtype; N is a multiple of 16, K of `multiple`.
        rows: dequantizes some rows, (R, K) float32, given their int64 numbers (R,).
        is_affine: has a minimum or a zero point per group of channels.
        layout_of: the layout of an affine format's scales, given K.
        has_blocks: of fp8, whether scales are of blocks, not of rows.
        devices: types of devices that there are kernels for.
        multiple: of K.
    """

    name: str
    bits: int
    quantize: Callable[[Tensor], Packed]
    rows: Callable[[Packed, Tensor], Tensor]
    is_affine: bool = False
    layout_of: Callable[[int], Layout] = Layout.default
    has_blocks: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")
    multiple: int = GROUP

    @property
    def is_lossless(self) -> bool:
        """Return whether the format keeps all bits of weights in bfloat16."""
        return self.name == LOSSLESS

    def fits(self, out_features: int, in_features: int) -> bool:
        """Return whether a weight of this shape can be packed."""
        if self.is_lossless and in_features > MAX_CHANNELS:
            return False
        return fits(out_features, in_features) and in_features % self.multiple == 0

    def in_features(self, packed: Packed) -> int:
        """Return K of a packed weight."""
        return in_features_of(packed.weight) if self.is_lossless else packed.weight.shape[1] * 32 // self.bits

    def with_layout(self, layout_of: Callable[[int], Layout]) -> Format:
        """Return this (affine) format with another layout of scales."""
        assert self.is_affine, "other formats have one layout"
        quantize = partial(quantize_uint4, layout_of=layout_of, bits=self.bits)
        return replace(self, layout_of=layout_of, quantize=quantize, multiple=GROUP)

    def with_blocks(self) -> Format:
        """Return this format (fp8) with a scale per block of 16 rows and 128 channels."""
        assert self.name == "fp8", "other formats have no such blocks"
        return replace(self, has_blocks=True, quantize=quantize_fp8_blocks)

    def operands(self, packed: Packed) -> Packed:
        """Return a weight as C++ operations take it: scales of fp8's rows are a column, unlike int8's."""
        is_column = self.name == "fp8" and packed.scale.dim() == 1
        return Packed(packed.weight, packed.scale[:, None]) if is_column else packed

    def dequantize(self, packed: Packed) -> Tensor:
        """Return the whole weight, (N, K) float32."""
        return self.rows(packed, torch.arange(packed.weight.shape[0] * LANES, device=packed.weight.device))

    def steps(self, packed: Packed) -> tuple[Tensor, Tensor]:
        """Return step and minimum of each group in 4 bits, (N, K/32) float32: weight = level * step - minimum."""
        assert self.name in ("int4", "uint4"), "other formats have no such groups"
        row_N = torch.arange(packed.weight.shape[0] * LANES, device=packed.weight.device)
        if self.is_affine:
            return scales_uint4(packed, row_N)
        step_NG = bfloat16_scales(packed.scale).transpose(1, 2).flatten(0, 1).float()
        return step_NG, step_NG * 8

    def empty(self, out_features: int, in_features: int, device: torch.device | str = "cpu") -> Packed:
        """Return uninitialized tensors of an (N, K) weight."""
        if self.is_lossless:  # without exceptions, whose number weights tell
            shapes = (packed_shape(out_features, in_features), (out_features * RECORD,))
            return Packed(*(torch.zeros(shape, dtype=torch.uint8, device=device) for shape in shapes))
        blocks = out_features // LANES
        weight = torch.empty(blocks, in_features * self.bits // 32, LANES, 4, dtype=torch.uint8, device=device)
        if self.bits == 8:
            shape = scale_shape(out_features, in_features, self.has_blocks)
            return Packed(weight, torch.empty(shape, dtype=torch.float32, device=device))
        if self.is_affine:
            records = self.layout_of(in_features).shape(out_features, in_features)
            return Packed(weight, torch.empty(records, dtype=torch.uint8, device=device))
        if self.name in ("int6", "nl4"):
            sizes = out_features, in_features
            # The channels of one of nl4's records are the multiple.
            records = int6_shape(*sizes) if self.bits == 6 else nl4_shape(*sizes, self.multiple)
            return Packed(weight, torch.empty(records, dtype=torch.uint8, device=device))
        return Packed(weight, torch.empty(blocks, in_features // GROUP, LANES, dtype=torch.bfloat16, device=device))


def fits(out_features: int, in_features: int) -> bool:
    """Return whether a weight of this shape can be quantized (all released Qwen3 can)."""
    return out_features % LANES == 0 and in_features % GROUP == 0


def quantize_int8(weight_NK: Tensor) -> Packed:
    """Quantize to 8 bits with one scale per row: the row's largest weight becomes +-127."""
    weight = weight_NK.float()
    scale_N = weight.abs().amax(dim=1) / 127
    level_NK = (weight / scale_N.clamp(min=1e-30)[:, None]).round_().clamp_(-127, 127)
    return pack_int8(level_NK.add_(128).to(torch.uint8), scale_N)


def pack_int8(byte_NK: Tensor, scale_N: Tensor) -> Packed:
    """Pack 8-bit levels (uint8; 128 is zero) and one scale per row."""
    return Packed(pack_bytes(byte_NK), scale_N.float())


def rows_int8(packed: Packed, row_R: Tensor) -> Tensor:
    """Return rows of the weight, (R, K) float32."""
    return (bytes_of_rows(packed, row_R).float() - 128) * packed.scale[row_R, None]


def quantize_int4(weight_NK: Tensor) -> Packed:
    """Quantize to 4 bits with one scale per 32 channels: -8 is on the side of the group's largest weight.

    A range that ends below the largest weights often quantizes the others better: each group takes the one of
    `INT4_RANGES` with the least squared error. Bytes can hold the scales, see `bfloat16_scales`. A group with NaN or
    infinity becomes NaN.
    """
    N, K = weight_NK.shape
    weight = weight_NK.float()
    group = weight.view(N, K // GROUP, GROUP)
    scale, level = _best_int4(group, least_scales(weight)[:, None])
    # NaN and infinity in a group make all of it NaN: they must not turn into ordinary numbers.
    scale = torch.where(group.isfinite().all(dim=2, keepdim=True), scale, torch.nan)
    return pack_int4(level.view(N, K), scale.view(N, K // GROUP))


def _best_int4(group: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scales, (..., 1) float32, and levels, (..., 32) uint8, of groups of weights (..., 32), float32.

    least: sizes that the scales have at least, (..., 1).
    """
    largest = group.gather(-1, group.abs().argmax(dim=-1, keepdim=True))
    best_scale, best_level = torch.zeros_like(largest), torch.full_like(group, 8, dtype=torch.uint8)
    best_error = torch.full_like(largest, torch.inf)
    for share in INT4_RANGES:
        scale = short_scales(largest * (-share / 8), least)
        level = torch.round(group / torch.where(scale == 0, 1.0, scale)).clamp_(-8, 7)
        error = sum_of_halves((level * scale - group).square_())
        is_better = error < best_error
        best_error = torch.where(is_better, error, best_error)
        best_scale = torch.where(is_better, scale, best_scale)
        best_level = torch.where(is_better, level.add_(8).to(torch.uint8), best_level)
    return best_scale, best_level


def pack_int4(level_NK: Tensor, scale_NG: Tensor) -> Packed:
    """Pack 4-bit levels (uint8, 0 to 15; 8 is zero) and one scale per 32 channels, rounded to bfloat16."""
    return Packed(pack_halves(level_NK), by_blocks(scale_NG).to(torch.bfloat16))


def rows_int4(packed: Packed, row_R: Tensor) -> Tensor:
    """Return rows of the weight, (R, K) float32."""
    level = levels_of_rows(packed, row_R).float() - 8
    scale = bfloat16_scales(packed.scale[row_R // LANES, :, row_R % LANES]).float()
    return (level * scale[..., None]).flatten(1)


FORMATS = {
    "int8": Format("int8", 8, quantize_int8, rows_int8),
    "int4": Format("int4", 4, quantize_int4, rows_int4),
    "uint4": Format("uint4", 4, quantize_uint4, rows_uint4, is_affine=True),
    "fp8": Format("fp8", 8, quantize_fp8, rows_fp8),
}
QUANTIZE_UINT5 = partial(quantize_uint4, layout_of=Layout.short, bits=5)
# What GGUF's types of 5 and 6 bits and IQ4_XS are kept in; there are no kernels for other devices.
FOR_CPUS = {
    "int6": Format("int6", 6, quantize_int6, rows_int6, devices=("cpu",), multiple=INT6_SPAN),
    "uint5": Format("uint5", 5, QUANTIZE_UINT5, rows_uint4, True, Layout.short, devices=("cpu",), multiple=SHORT_SPAN),
    "nl4": Format("nl4", 4, quantize_nl4, rows_nl4, devices=("cpu",), multiple=NL4_SPAN),
}
# nl4 as IQ4_NL of GGUF has it: a scale in float16 per 32 channels.
SHORT_NL4 = replace(FOR_CPUS["nl4"], quantize=partial(quantize_nl4, span=GROUP), multiple=GROUP)
SAVED_FORMATS = FORMATS | FOR_CPUS  # which checkpoints may be in
# With the one that quantizes nothing.
ALL_FORMATS = SAVED_FORMATS | {
    LOSSLESS: Format(LOSSLESS, 12, pack_lossless, rows_lossless, devices=("cpu",), multiple=MULTIPLE),
}


def quantize(weight_NK: Tensor, format: Format) -> Packed:
    """Quantize an (N, K) weight in any float dtype; N is a multiple of 16, K of `format.multiple`.

    It calls `format.quantize` for some blocks of rows at a time, or C++, which returns the same numbers in one pass.
    """
    N, K = weight_NK.shape
    if format.is_lossless:
        return format.quantize(weight_NK)
    is_on_cpu = weight_NK.dtype == torch.bfloat16 and weight_NK.device.type == "cpu"
    if is_on_cpu and format.name in IN_CPP and cpu.is_loaded():
        packed = format.empty(N, K)
        quantize_weight(weight_NK.contiguous(), *packed)
        return packed
    return pack_by_rows(N, K, format, weight_NK.device, lambda rows: format.quantize(weight_NK[rows]))


def put_rows(whole: Packed, N: int, first_row: int, part: Packed) -> None:
    """Copy some packed rows to their place in a packed weight of N rows, from `first_row` (a multiple of 16) on."""
    for tensor, piece in zip(whole, part, strict=True):
        first = first_row * tensor.shape[0] // N
        tensor[first : first + piece.shape[0]] = piece


def pack_by_rows(N: int, K: int, format: Format, device: torch.device, pack: Callable[[slice], Packed]) -> Packed:
    """Return a whole packed weight, calling `pack` for some rows (whole blocks) at a time."""
    result = format.empty(N, K, device)
    for rows in row_slices(N, K):
        put_rows(result, N, rows.start, pack(rows))
    return result


def row_slices(N: int, K: int) -> Iterator[slice]:
    """Yield slices of all rows of an (N, K) weight, some blocks at a time."""
    rows = max(1, WEIGHTS_AT_ONCE // K // LANES) * LANES
    for start in range(0, N, rows):
        yield slice(start, min(start + rows, N))
