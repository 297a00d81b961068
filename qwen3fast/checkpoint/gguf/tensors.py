"""One tensor of a GGUF file, memory-mapped: as stored, as numbers, or packed in one of our formats.

N out_features   K in_features   R rows
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwen3fast.checkpoint.gguf.levels import KEPT
from qwen3fast.quantization.formats import LANES, Format, Packed, put_rows

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NUMBERS_AT_ONCE = 2**20  # converted together: intermediate results stay in the processor's caches


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file. data: its bytes. shape: in PyTorch's order. type: by GGUF's name, such as "Q4_0"."""

    file: str
    name: str
    shape: tuple[int, ...]
    type: str
    data: np.ndarray

    @classmethod
    def of_file(
        cls, file: str, name: str, shape: tuple[int, ...], type_number: int, data: np.ndarray, offset: int
    ) -> StoredTensor:
        """Return the tensor that a header describes; data: all bytes of the file; offset: of the tensor's first byte.

        Raises: ValueError for an unknown type, a shape that it cannot have, or bytes that are not there.
        """
        gguf = import_gguf()
        try:
            kind = gguf.GGMLQuantizationType(type_number)
            block, size = gguf.GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError) as err:
            raise ValueError(f"tensor {name!r} has the unknown type {type_number}") from err
        if shape[-1] % block:
            raise ValueError(f"tensor {name!r}: {kind.name} comes in blocks of {block}, but its rows have {shape[-1]}")
        end = offset + math.prod(shape) // block * size
        if end > len(data):
            raise ValueError(f"tensor {name!r} ends at byte {end}, the file at {len(data)}")
        return cls(file, name, shape, kind.name, data[offset:end])

    @property
    def is_float(self) -> bool:
        """Return whether its numbers are floats rather than levels and scales."""
        return self.type in FLOATS

    def refusal(self) -> str | None:
        """Return why it cannot be read, None if it can."""
        try:
            self._numbers(self._rows()[:1])
        except NotImplementedError:
            return f"{self.name} in {self.file}: type {self.type} is not supported"
        return None

    def plain(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the whole tensor. On the CPU, in the dtype of the file, it is the mapped pages."""
        if self.is_float:
            return torch.from_numpy(self.data).view(FLOATS[self.type]).view(self.shape).to(device, dtype)
        result = torch.empty(math.prod(self.shape[:-1]), self.shape[-1], dtype=dtype, device=device)
        for start, rows in self._parts():
            result[start : start + len(rows)] = self._numbers(rows)
        return result.view(self.shape)

    def packed(self, format: Format, device: torch.device) -> Packed:
        """Return the weight (N, K) in one of our formats; N must be a multiple of 16, K of 32.

        Stacked experts (X, N, K) count as one tall weight (X * N, K).

        Types in `KEPT` keep their levels in the format named there; others are dequantized and quantized again.
        """
        N, K = math.prod(self.shape[:-1]), self.shape[-1]
        result, kept = format.empty(N, K), next((k for k in KEPT.get(self.type, ()) if k.format == format), None)
        for start, rows in self._parts():
            part = format.quantize(self._numbers(rows)) if kept is None else kept.pack(rows)
            put_rows(result, N, start, part)
        release_pages(self.data)
        return Packed(*(tensor.to(device) for tensor in result))

    def numbers(self) -> Iterator[Tensor]:
        """Yield the numbers of some rows at a time, (R, K) float32."""
        for _, rows in self._parts():
            yield self._numbers(rows)

    def _rows(self) -> np.ndarray:
        """Return the bytes of each row, (rows, bytes of a row); all dimensions before the last count as rows."""
        return self.data.reshape(math.prod(self.shape[:-1]), -1)

    def _parts(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield some rows at a time: the number of the first one, and their bytes (R, bytes of a row)."""
        rows, step = self._rows(), max(1, NUMBERS_AT_ONCE // self.shape[-1] // LANES) * LANES
        for start in range(0, len(rows), step):
            yield start, np.ascontiguousarray(rows[start : start + step])

    def _numbers(self, rows: np.ndarray) -> Tensor:
        """Return the numbers of some rows, (R, K) float32."""
        if self.type in FLOATS:
            return torch.from_numpy(rows).view(FLOATS[self.type]).float()
        gguf = import_gguf()
        with np.errstate(all="ignore"):  # whatever a damaged scale results in
            return torch.from_numpy(gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[self.type]))


def release_pages(data: np.ndarray) -> None:
    """Take the pages of bytes that were read, and are mapped from a file, out of this process's memory.

    Pages at the ends, which hold other tensors as well, stay. It does nothing for other arrays.
    """
    mapped: Any = getattr(data, "_mmap", None)
    if mapped is None or not hasattr(mapped, "madvise"):
        return
    origin = np.frombuffer(mapped, np.uint8).__array_interface__["data"][0]
    first = data.__array_interface__["data"][0] - origin
    start, end = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, (first + data.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start:
        mapped.madvise(mmap.MADV_DONTNEED, start, end - start)


def import_gguf() -> Any:
    """Import the optional package. Raises: ImportError saying what to install."""
    try:
        import gguf
    except ImportError as err:
        raise ImportError("GGUF files need the package gguf; run: pip install 'qwen3fast[gguf]'") from err
    return gguf
