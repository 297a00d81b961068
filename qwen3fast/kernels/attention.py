"""Attention over a KV cache: one function for the model, which chooses the first form that serves.

All forms return the result of the plain form, `attend`, up to rounding. Compiled code holds one form, chosen when it
was compiled; only prefill on CPUs chooses at run time, see kernels/cpu/prefill.py. Steps in one C++ operation, and
fused steps on CUDA devices, have attention of their own.

B batch rows   T query tokens   L cache positions read   R slots   S positions of a slot
H query heads   K key/value heads   D head_dim
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3fast.kernels import cpu, cuda
from qwen3fast.kernels.compiling import is_compiling
from qwen3fast.kernels.define import define

# One layer's KV cache, `model.kv_cache.CacheLayer`; it cannot be imported, as the model imports this file.
Cache = Any


def cached_attention(q_BTHD: Tensor, cache: Cache, position_BT: Tensor, mask_BTL: Tensor | None) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v over what each query may see of the cache: (B, H, T, D), the query's dtype.

    position_BT: int64, where the queries stand; their keys and values are in the cache already.
    mask_BTL: bool, True where query t may see position l, up to its own: the first L positions of the cache are read.
    It may be None in steps where `finds_used_length` and in chunks where `finds_used_length_of_chunks`. Without rows
    (`cache.row_B` is None: decode) batch row b is slot b; with rows (prefill) the T queries of a batch row stand at
    consecutive positions, and the queries of a single batch row at the last of the L positions.
    cache.sdpa_from: see kernels/cpu/prefill.py.
    """
    y: Tensor
    ops, is_step = torch.ops.qwen3fast, cache.row_B is None
    memory, scales = (cache.k_RKSD, cache.v_RKSD), (cache.k_scale_RKS, cache.v_scale_RKS)
    if is_step and cpu.can_decode_attention(q_BTHD, cache.k_RKSD):
        y = ops.decode_attention(q_BTHD, *memory, position_BT, *scales)
        return y
    if not is_step and cpu.can_prefill_attention(q_BTHD, cache.k_RKSD):
        y = ops.prefill_attention(q_BTHD, *memory, position_BT, cache.row_B, *scales, cache.sdpa_from)
        return y.transpose(1, 2)
    if is_step and cuda.can_split_attention(q_BTHD):
        y = ops.split_attention(q_BTHD, *memory, position_BT, *scales)
        return y
    if not is_step and mask_BTL is None and cuda.can_chunk_attention(q_BTHD.device, q_BTHD.shape[-1]):
        y = ops.chunk_attention(q_BTHD, *memory, position_BT, cache.row_B, *scales)
        return y.transpose(1, 2)
    assert mask_BTL is not None, "the other forms need a mask, which says how many positions are read"
    k_BKLD, v_BKLD = cache.read(q_BTHD.shape[0], mask_BTL.shape[-1], q_BTHD.dtype)
    if not is_step and q_BTHD.shape[0] == 1 and cuda.can_flash_attention(q_BTHD):
        return attend_last(q_BTHD, k_BKLD, v_BKLD)
    return attend(q_BTHD, k_BKLD, v_BKLD, mask_BTL)


def finds_used_length(device: torch.device, head_dim: int) -> bool:
    """Return whether decode attention on this device stops at each query's position without a mask."""
    return cuda.can_split(device, head_dim)


def finds_used_length_of_chunks(device: torch.device, head_dim: int) -> bool:
    """Return whether attention of a prompt's chunk on this device reads the length from position_BT, without a mask."""
    return cuda.can_chunk_attention(device, head_dim)


def attend(q_BTHD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, mask_BTL: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v over the positions that the mask allows: (B, H, T, D), same dtype.

    mask_BTL: bool, True where query t may see position l.
    """
    B, T, H, D = q_BTHD.shape
    if T == 1:
        # One query: the G heads of a group become the "tokens" of a smaller attention that reads each key once.
        q_BKGD = q_BTHD.view(B, k_BKLD.shape[1], -1, D)
        return sdpa(q_BKGD, k_BKLD, v_BKLD, mask_BTL[:, None]).reshape(B, H, 1, D)
    return sdpa(q_BTHD.transpose(1, 2), k_BKLD, v_BKLD, mask_BTL[:, None])


def sdpa(q_BHTD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, mask_B1TL: Tensor | None = None) -> Tensor:
    """Return PyTorch's attention with grouped heads, (B, H, T, D), same dtype; causal without a mask.

    Causal attention on CUDA devices is FlashAttention where that serves the dtype: cuDNN's, which PyTorch prefers on
    some, is planned for each length. Otherwise, compiled for a CUDA device, it is an operation that is not traced:
    PyTorch would choose between its kernels by sizes, and compile them for a part of the sizes that vary.
    """
    if mask_B1TL is None and cuda.can_flash_attention(q_BHTD):
        return _flash(q_BHTD, k_BKLD, v_BKLD)
    if is_compiling() and q_BHTD.device.type == cuda.DEVICE_TYPE:
        y_BTHD: Tensor = torch.ops.qwen3fast.sdpa(q_BHTD, k_BKLD, v_BKLD, mask_B1TL)
        return y_BTHD.transpose(1, 2)
    return _sdpa(q_BHTD, k_BKLD, v_BKLD, mask_B1TL)


def _sdpa(q_BHTD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, mask_B1TL: Tensor | None) -> Tensor:
    is_causal, is_grouped = mask_B1TL is None, q_BHTD.shape[1] != k_BKLD.shape[1]
    return F.scaled_dot_product_attention(
        q_BHTD, k_BKLD, v_BKLD, attn_mask=mask_B1TL, is_causal=is_causal, enable_gqa=is_grouped
    )


define(
    "sdpa(Tensor q, Tensor k, Tensor v, Tensor? mask) -> Tensor",
    lambda *tensors: _sdpa(*tensors).transpose(1, 2).contiguous(),
    lambda q, *others: q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]),
    key="CompositeExplicitAutograd",
)


def attend_last(q_BTHD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor) -> Tensor:
    """Return `attend` for T queries at the last T of L positions, each of which sees all positions up to its own.

    This is FlashAttention on CUDA devices, which stores neither scores nor a mask. PyTorch's public functions do not
    serve: `is_causal` of scaled_dot_product_attention aligns the queries with the first positions, with `sdpa_kernel`
    as well; and `torch.nn.attention.bias.causal_lower_right`, which calls this same operator, cannot be traced with
    sizes that vary (torch 2.11 to 2.15: Dynamo refuses its constructor).
    Source: arXiv:2205.14135.
    """
    return _flash(q_BTHD.transpose(1, 2), k_BKLD, v_BKLD)


def _flash(q_BHTD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor) -> Tensor:
    y_BHTD: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q_BHTD, k_BKLD, v_BKLD, is_causal=True)[0]
    return y_BHTD
