"""`qwen3fast_sample` and `qwen3fast_process_logits` of ops.h: tokens of rows of logits.

B rows   V vocabulary   W words of 32 bits, ceil(V / 32)
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Structure, byref

import torch
from torch import Tensor

from qwen3fast.kernels.cpu.library import functions
from qwen3fast.kernels.cpu.structures import ProcessingPointers, SamplingPointers, address, require

_SAMPLING = (torch.float32, torch.int64, torch.float32, torch.float32, torch.int64, torch.int64)
_PROCESSING = (*[torch.float32] * 3, torch.bool, torch.int32, torch.float32, torch.int32)


def sample(logits_BV: Tensor, rows: Sequence[Tensor] | None) -> Tensor:
    """Return a token per row, (B,) int64; -1 where the logits hold NaN or +inf, or only -inf.

    logits_BV: float32. rows: the fields of `SamplerRows`, (B,) each; None for greedy.
    Raises: ValueError for other tensors.
    """
    B, V = _shape("sample", logits_BV)
    logits_BV, token_B = logits_BV.contiguous(), torch.empty(B, dtype=torch.int64, device="cpu")
    sampling = None if rows is None else byref(sampling_pointers(rows, B))
    functions().qwen3fast_sample(logits_BV.data_ptr(), sampling, token_B.data_ptr(), B, V, torch.get_num_threads())
    return token_B


def sampling_pointers(rows: Sequence[Tensor], count: int) -> Structure:
    """Return the addresses of the fields of `SamplerRows`, (count,) each. Raises: ValueError for other tensors."""
    fields = zip(SamplingPointers._fields_, rows, _SAMPLING, strict=True)
    return SamplingPointers(*(address(f"sample: {field[0]}", x, dtype, count) for field, x, dtype in fields))


def process_logits(logits_BV: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """Return the logits after penalties, bias and mask, (B, V) float32.

    logits_BV: float32. rows: the fields of `ProcessorRows`. Raises: ValueError for other tensors.
    """
    B, V = _shape("process_logits", logits_BV)
    shapes = [*[(B,)] * 3, *[(B, V)] * 3, (B, -(-V // 32))]
    fields = zip(ProcessingPointers._fields_, rows, _PROCESSING, shapes, strict=True)
    pointers = ProcessingPointers(
        *(address(f"process_logits: {field[0]}", x, dtype, *shape) for field, x, dtype, shape in fields)
    )
    logits_BV, y_BV = logits_BV.contiguous(), torch.empty(B, V, dtype=torch.float32, device="cpu")
    functions().qwen3fast_process_logits(
        logits_BV.data_ptr(), byref(pointers), y_BV.data_ptr(), B, V, torch.get_num_threads()
    )
    return y_BV


def _shape(name: str, logits_BV: Tensor) -> tuple[int, int]:
    B, V = logits_BV.shape
    require(
        logits_BV.dtype == torch.float32 and logits_BV.device.type == "cpu" and V > 0,
        f"{name}: logits must be (B, V) float32, on the CPU",
    )
    return B, V
