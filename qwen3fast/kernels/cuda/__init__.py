"""For CUDA devices: the Triton kernels of this folder as operations, `torch.ops.qwen3fast.*`, and FlexAttention.

Where Triton is missing, callers use their PyTorch forms. Not yet run on a GPU.
"""

from __future__ import annotations

import importlib.util
import os
import threading
from typing import Literal

import torch
from torch import Tensor

from qwen3fast.kernels.cuda.flex_decode import flex_decode as flex_decode

# What decode steps attend with; read when an engine's steps are compiled. "sdpa": PyTorch's attention over the whole
# bucket, until a GPU run has shown which is faster; over what is used of it: "flex", "split" (Triton).
decode_attention: Literal["sdpa", "flex", "split"] = "sdpa"
MAX_ROWS = 64  # of packed_matvec; more rows are bound by arithmetic, and PyTorch's products serve them

_loading = threading.Lock()
_is_loaded = False


def load() -> bool:
    """Register the operations, once in a process. Returns: whether they can be used, that is, Triton is installed."""
    global _is_loaded
    with _loading:
        if not _is_loaded and importlib.util.find_spec("triton") is not None:
            from qwen3fast.kernels.cuda.decode_step import ops as decode_step
            from qwen3fast.kernels.cuda.packed_experts import packed_experts
            from qwen3fast.kernels.cuda.packed_matvec import packed_matvec
            from qwen3fast.kernels.cuda.split_attention import split_attention

            custom_op = torch.library.custom_op
            custom_op("qwen3fast::packed_matvec", packed_matvec, mutates_args=(), device_types="cuda").register_fake(
                _packed_matvec_shape
            )
            custom_op("qwen3fast::packed_experts", packed_experts, mutates_args=(), device_types="cuda").register_fake(
                _packed_experts_shape
            )
            custom_op(
                "qwen3fast::split_attention", split_attention, mutates_args=(), device_types="cuda"
            ).register_fake(lambda q, *others: q.new_empty(q.shape[0], q.shape[2], 1, q.shape[3]))
            decode_step.register()
            _is_loaded = True
        return _is_loaded


def use_fused_step() -> bool:
    """Return whether decode steps may run in the kernels of `decode_step`; QWEN3FAST_FUSED_STEP=0 switches them off."""
    return os.environ.get("QWEN3FAST_FUSED_STEP", "1") != "0"


def can_split_attention(q_BTHD: Tensor) -> bool:
    """Whether `torch.ops.qwen3fast.split_attention` is to serve this query."""
    head_dim = q_BTHD.shape[-1]
    is_served = q_BTHD.shape[1] == 1 and head_dim >= 16 and head_dim & (head_dim - 1) == 0
    return decode_attention == "split" and is_served and q_BTHD.device.type == "cuda" and load()


def can_flex_attention(q_BTHD: Tensor) -> bool:
    """Whether `flex_decode` is to serve this query."""
    return decode_attention == "flex" and q_BTHD.shape[1] == 1 and q_BTHD.device.type == "cuda"


def can_flash_attention(q_BTHD: Tensor) -> bool:
    """Whether PyTorch's FlashAttention serves these queries. Source: its checks in sdp_utils.cpp."""
    return (
        q_BTHD.device.type == "cuda"
        and q_BTHD.dtype in (torch.bfloat16, torch.float16)
        and q_BTHD.shape[-1] % 8 == 0
        and q_BTHD.shape[-1] <= 256
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(q_BTHD.device) >= (8, 0)
    )


def can_packed_matvec(x: Tensor) -> bool:
    """Whether `torch.ops.qwen3fast.packed_matvec` serves this product."""
    return x.device.type == "cuda" and x.numel() <= MAX_ROWS * x.shape[-1] and load()


def can_packed_experts(x: Tensor) -> bool:
    """Whether `torch.ops.qwen3fast.packed_experts` serves products of rows on this device."""
    return x.device.type == "cuda" and load()


def _packed_matvec_shape(x: Tensor, packed: Tensor, scale: Tensor, is_fp8: bool) -> Tensor:
    from qwen3fast.kernels.cuda.packed_matvec import num_parts

    blocks, words = packed.shape[:2]
    return x.new_empty((num_parts(blocks, words), x.shape[0], blocks * packed.shape[2]), dtype=torch.float32)


def _packed_experts_shape(
    x: Tensor, packed: Tensor, scale: Tensor, expert: Tensor, num_experts: int, is_fp8: bool
) -> Tensor:
    from qwen3fast.kernels.cuda.packed_matvec import num_parts

    blocks, words = packed.shape[0] // num_experts, packed.shape[1]
    parts = num_parts(blocks * x.shape[0], words)
    return x.new_empty((parts, x.shape[0], blocks * packed.shape[2]), dtype=torch.float32)
