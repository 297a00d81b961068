"""`qwen3fast_sample` of ops.h: a token for each row, from its logits."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import byref

import torch
from torch import Tensor

from qwen3fast.kernels.cpu.structures import SamplingPointers, require

_DTYPES = (torch.float32, torch.int64, torch.float32, torch.float32, torch.int64, torch.int64)


def sample(functions: ctypes.CDLL, logits_BV: Tensor, rows: Sequence[Tensor] | None) -> Tensor:
    """Return a token per row, (B,) int64; -1 where the logits hold NaN or +inf, or only -inf.

    functions: of ops.h. logits_BV: float32. rows: the fields of `SamplerRows`, (B,) each; None for greedy.
    Raises: ValueError for other tensors.
    """
    B, V = logits_BV.shape
    require(
        logits_BV.dtype == torch.float32 and logits_BV.device.type == "cpu" and V > 0,
        "sample: logits must be (B, V) float32, on the CPU",
    )
    logits_BV, token_B = logits_BV.contiguous(), torch.empty(B, dtype=torch.int64)
    sampling = None if rows is None else byref(sampling_pointers(rows, B))
    functions.qwen3fast_sample(logits_BV.data_ptr(), sampling, token_B.data_ptr(), B, V, torch.get_num_threads())
    return token_B


def sampling_pointers(rows: Sequence[Tensor], count: int) -> SamplingPointers:
    """Return the addresses of the fields of `SamplerRows`, (count,) each. Raises: ValueError for other tensors."""
    for tensor, dtype in zip(rows, _DTYPES, strict=True):
        require(
            tensor.dtype == dtype and tensor.is_contiguous() and tensor.shape == (count,),
            f"sample: sampling parameters must be ({count},), contiguous, in the dtypes of SamplerRows",
        )
    return SamplingPointers(*(tensor.data_ptr() for tensor in rows))
