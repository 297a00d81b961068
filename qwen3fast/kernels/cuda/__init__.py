"""Triton kernels for CUDA devices, as operations `torch.ops.qwen3fast.*`.

Without Triton, callers use their PyTorch forms. Not yet run on a GPU.
"""

from __future__ import annotations

import importlib.util
import threading
from typing import Literal

import torch
from torch import Tensor

from qwen3fast.checks import checked_variable

# The form of attention in decode steps, read when steps are compiled. "split": a Triton kernel over the used
# positions, whose number is read on the device; "sdpa": PyTorch's attention over the whole bucket, slower in the first
# run of a prototype on a GPU.
decode_attention: Literal["sdpa", "split"] = "split"
DEVICE_TYPE = "cuda"  # of tensors that the operations support; tests of traced code replace it by "meta"
MAX_HEAD_DIM = 128  # of attention kernels; Qwen3 has no larger one
MAX_ROWS = 64  # of packed_matvec; more rows are bound by arithmetic and use PyTorch's products

_loading = threading.Lock()
_is_loaded = False  # plain flags, which torch.compile can read
_has_flash = False


def load(device: torch.device | None = None) -> bool:
    """Register the operations, once per process, and check the capability of a CUDA device, before steps are compiled.

    Returns: whether the operations can be used (Triton is installed).
    """
    global _has_flash, _is_loaded
    with _loading:
        if device is not None and device.type == "cuda":
            has_it, capability = torch.backends.cuda.is_flash_attention_available, torch.cuda.get_device_capability
            _has_flash = has_it() and capability(device) >= (8, 0)
        if not _is_loaded and importlib.util.find_spec("triton") is not None:
            from qwen3fast.kernels.cuda import chunk_attention, packed_experts, packed_matvec, split_attention  # noqa: F401
            from qwen3fast.kernels.cuda.decode_step import ops  # noqa: F401  each of these modules defines operations

            _is_loaded = True
        return _is_loaded


def use_fused_step() -> bool:
    """Return whether steps may use the kernels of `decode_step`; QWEN3FAST_FUSED_STEP=0 switches them off."""
    return checked_variable("QWEN3FAST_FUSED_STEP") == "1"


def can_split_attention(q_BTHD: Tensor) -> bool:
    """Return whether `torch.ops.qwen3fast.split_attention` serves this query."""
    return q_BTHD.shape[1] == 1 and can_split(q_BTHD.device, q_BTHD.shape[-1])


def can_split(device: torch.device, head_dim: int) -> bool:
    """Return whether `split_attention` serves queries of this size on this device; call `load` first."""
    return decode_attention == "split" and can_chunk_attention(device, head_dim)


def can_chunk_attention(device: torch.device, head_dim: int) -> bool:
    """Return whether `torch.ops.qwen3fast.chunk_attention` serves queries of this size on this device."""
    # Larger heads would need more shared memory than most GPUs have for a program.
    is_served = 16 <= head_dim <= MAX_HEAD_DIM and head_dim & (head_dim - 1) == 0
    return is_served and device.type == DEVICE_TYPE and _is_loaded


def can_flash_attention(q_BTHD: Tensor) -> bool:
    """Return whether PyTorch's FlashAttention serves these queries. Source: its checks in sdp_utils.cpp."""
    is_half = q_BTHD.dtype in (torch.bfloat16, torch.float16)
    is_served = q_BTHD.device.type == DEVICE_TYPE and q_BTHD.shape[-1] % 8 == 0 and q_BTHD.shape[-1] <= 256
    return _has_flash and is_half and is_served


def can_packed_matvec(x: Tensor) -> bool:
    """Return whether `torch.ops.qwen3fast.packed_matvec` serves this product: a decode step's, x (B, 1, K).

    Chunks of a prompt have more tokens; they share one compiled form, which does not depend on their number.
    """
    is_step = x.dim() == 3 and x.shape[1] == 1 and x.shape[0] <= MAX_ROWS
    return x.device.type == DEVICE_TYPE and is_step and _is_loaded


def can_packed_experts(x: Tensor) -> bool:
    """Return whether `torch.ops.qwen3fast.packed_experts` serves products of rows on this device."""
    return x.device.type == DEVICE_TYPE and _is_loaded
