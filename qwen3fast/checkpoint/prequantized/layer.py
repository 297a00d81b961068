"""One prequantized linear layer -> its plain weight, or one of our formats; some rows at a time.

N out_features   K in_features   n some rows
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qwen3fast.checkpoint.prequantized import awq, compressed_tensors, fp8, gptq
from qwen3fast.checkpoint.prequantized.compressed_config import COMPRESSED
from qwen3fast.checkpoint.prequantized.format import ExpectedTensor, PrequantizedFormat
from qwen3fast.checkpoint.prequantized.levels import Levels
from qwen3fast.quantization.formats import LANES, Format, Packed, pack_by_rows, row_slices

_READERS: dict[str, Any] = {"fp8": fp8, "awq": awq, "gptq": gptq, COMPRESSED: compressed_tensors}


class PrequantizedLayer:
    """The tensors of one layer, by the ends of their names; it dequantizes or converts them."""

    def __init__(self, stored: PrequantizedFormat, shape: tuple[int, int], tensors: dict[str, Tensor]) -> None:
        self.stored, self.shape, self.tensors = stored, shape, tensors
        self.device = next(iter(tensors.values())).device

    def plain(self, dtype: torch.dtype) -> Tensor:
        """Return the weight, (N, K), computed in float32 and rounded to `dtype` once.

        Raises: ValueError for tensors that contradict each other.
        """
        result_NK = torch.empty(self.shape, dtype=dtype, device=self.device)
        for rows in row_slices(*self.shape):
            result_NK[rows] = self._weight(rows)
        return result_NK

    def packed(self, format: Format, order_K: Tensor | None = None) -> Packed:
        """Return the weight in one of our formats: with the stored numbers if it has them, otherwise quantized again.

        format: as `PrequantizedFormat.as_format` returns it. order_K: the order of channels that the result has, of
        `input_order`; without it, levels in groups that are scattered over the channels are quantized again.
        Raises: ValueError for tensors that contradict each other, or quantization_config.
        """
        return pack_by_rows(*self.shape, format, self.device, lambda rows: self._pack(rows, format, order_K))

    def input_order(self, format: Format) -> Tensor | None:
        """Return the order of channels, (K,) int32, in which groups are neighbors and the format can hold the levels.

        None: the format cannot, or groups are neighbors as they are.
        """
        if not (self.stored.has_scattered_groups and self.stored.keeps_numbers(format.name)):
            return None
        levels = self._levels(slice(0, LANES))
        return None if levels.has_sorted_groups else levels.group_K.argsort(stable=True).to(torch.int32)

    def _pack(self, rows: slice, format: Format, order_K: Tensor | None) -> Packed:
        if self.stored.is_float and self.stored.keeps_numbers(format.name):
            return self._floats(rows).as_fp8(format.has_blocks)
        if not self.stored.is_float:
            levels = self._levels(rows) if order_K is None else self._levels(rows).in_order(order_K)
            is_in_groups = not self.stored.has_scattered_groups or levels.has_sorted_groups
            if self.stored.keeps_numbers(format.name) and is_in_groups:
                is_affine = format.name == "uint4"
                return levels.as_uint4(format.layout_of(self.shape[1]).span) if is_affine else levels.as_int4()
            if format.name == "int8" and self.stored.bits == 8 and levels.is_int8():
                return levels.as_int8()
        return format.quantize(self._weight(rows))

    def _weight(self, rows: slice) -> Tensor:
        return (self._floats(rows) if self.stored.is_float else self._levels(rows)).weight()

    def _floats(self, rows: slice) -> fp8.Floats:
        scale = self.tensors["weight_scale_inv" if self.stored.method == "fp8" else "weight_scale"]
        return fp8.Floats.of(self.tensors["weight"], scale, rows, self.stored.has_blocks)

    def _levels(self, rows: slice) -> Levels:
        levels: Levels = _READERS[self.stored.method].levels(self.stored, self.tensors, rows)
        return levels


def expected_tensors(stored: PrequantizedFormat, *shape: int) -> dict[str, ExpectedTensor]:
    """Return the tensors of a layer (N, K), or of stacked experts (X, N, K), by the ends of their names."""
    if len(shape) == 3:
        return fp8.expected_stacks(*shape) if stored.method == "fp8" else {}
    tensors: dict[str, ExpectedTensor] = _READERS[stored.method].expected_tensors(stored, *shape)
    return tensors
