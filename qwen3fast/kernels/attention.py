"""Attention over a KV cache: one function for the model, and the table of forms that it chooses from.

Each form has a condition on dtypes, sizes and the device; the first form whose condition holds is used. All forms
return the result of the plain form, the last of the table, up to rounding. Compiled code holds one form, chosen when it
was compiled; only prefill on CPUs chooses at run time, see kernels/cpu/prefill.py. Steps in one C++ operation, and
fused steps on CUDA devices, have attention of their own.

B batch rows   T query tokens   L cache positions read   R slots   S positions of a slot
H query heads   K key/value heads   D head_dim
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3fast.kernels import cpu, cuda
from qwen3fast.kernels.compiling import is_compiling
from qwen3fast.kernels.define import define

# One layer's KV cache, `model.kv_cache.CacheLayer`; it cannot be imported, as the model imports this file.
Cache = Any


class AttentionForm(NamedTuple):
    """A way to compute `cached_attention`: its condition, for a query and a cache, and its function.

    has_mask: True if it needs a mask, False if it takes none; None if either will do.
    """

    name: str
    serves: Callable[[Tensor, Cache], bool]
    run: Callable[[Tensor, Cache, Tensor, Tensor | None], Tensor]
    has_mask: bool | None = None


def cached_attention(q_BTHD: Tensor, cache: Cache, position_BT: Tensor, mask_BTL: Tensor | None) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v over what each query may see of the cache: (B, H, T, D), the query's dtype.

    position_BT: int64, where the queries stand; their keys and values are in the cache already.
    mask_BTL: bool, True where query t may see position l, up to its own: the first L positions of the cache are read.
    It may be None in steps where `finds_used_length` and in chunks where `finds_used_length_of_chunks`. Without rows
    (`cache.row_B` is None: decode) batch row b is slot b; with rows (prefill) the T queries of a batch row stand at
    consecutive positions, and the queries of a single batch row at the last of the L positions.
    cache.sdpa_from, cache.tiles_from: see kernels/cpu/prefill.py.
    """
    for form in FORMS:
        if form.serves(q_BTHD, cache) and form.has_mask in (None, mask_BTL is not None):
            return form.run(q_BTHD, cache, position_BT, mask_BTL)
    raise AssertionError("the last form serves everything")


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


def _plain(q_BTHD: Tensor, cache: Cache, position_BT: Tensor, mask_BTL: Tensor | None) -> Tensor:
    assert mask_BTL is not None, "this form needs a mask"
    k_BKLD, v_BKLD = cache.read(q_BTHD.shape[0], mask_BTL.shape[-1], q_BTHD.dtype)
    return attend(q_BTHD, k_BKLD, v_BKLD, mask_BTL)


def _flash_prefill(q_BTHD: Tensor, cache: Cache, position_BT: Tensor, mask_BTL: Tensor | None) -> Tensor:
    assert mask_BTL is not None, "the mask says how many positions are read"
    return attend_last(q_BTHD, *cache.read(q_BTHD.shape[0], mask_BTL.shape[-1], q_BTHD.dtype))


def _split_decode(q_BTHD: Tensor, cache: Cache, position_BT: Tensor, mask_BTL: Tensor | None) -> Tensor:
    y_BHTD: Tensor = torch.ops.qwen3fast.split_attention(
        q_BTHD, cache.k_RKSD, cache.v_RKSD, position_BT, cache.k_scale_RKS, cache.v_scale_RKS
    )
    return y_BHTD


def _cpp_decode(q_BTHD: Tensor, cache: Cache, position_BT: Tensor, mask_BTL: Tensor | None) -> Tensor:
    y_BHTD: Tensor = torch.ops.qwen3fast.decode_attention(
        q_BTHD, cache.k_RKSD, cache.v_RKSD, position_BT, cache.k_scale_RKS, cache.v_scale_RKS
    )
    return y_BHTD


def _cpp_prefill(q_BTHD: Tensor, cache: Cache, position_BT: Tensor, mask_BTL: Tensor | None) -> Tensor:
    y_BTHD: Tensor = torch.ops.qwen3fast.prefill_attention(
        q_BTHD,
        cache.k_RKSD,
        cache.v_RKSD,
        position_BT,
        cache.row_B,
        cache.k_scale_RKS,
        cache.v_scale_RKS,
        cache.sdpa_from,
        cache.tiles_from,
    )
    return y_BTHD.transpose(1, 2)


def _chunk_prefill(q_BTHD: Tensor, cache: Cache, position_BT: Tensor, mask_BTL: Tensor | None) -> Tensor:
    y_BTHD = torch.ops.qwen3fast.chunk_attention(
        q_BTHD, cache.k_RKSD, cache.v_RKSD, position_BT, cache.row_B, cache.k_scale_RKS, cache.v_scale_RKS
    )
    y_BHTD: Tensor = y_BTHD.transpose(1, 2)
    return y_BHTD


FORMS = (
    AttentionForm(
        "cpp_decode", lambda q, cache: cache.row_B is None and cpu.can_decode_attention(q, cache.k_RKSD), _cpp_decode
    ),
    AttentionForm(
        "cpp_prefill",
        lambda q, cache: cache.row_B is not None and cpu.can_prefill_attention(q, cache.k_RKSD),
        _cpp_prefill,
    ),
    AttentionForm("split_decode", lambda q, cache: cache.row_B is None and cuda.can_split_attention(q), _split_decode),
    AttentionForm(
        "chunk_prefill",
        lambda q, cache: cache.row_B is not None and cuda.can_chunk_attention(q.device, q.shape[-1]),
        _chunk_prefill,
        has_mask=False,
    ),
    AttentionForm(
        "flash_prefill",
        lambda q, cache: cache.row_B is not None and q.shape[0] == 1 and cuda.can_flash_attention(q),
        _flash_prefill,
        has_mask=True,
    ),
    AttentionForm("plain", lambda q, cache: True, _plain),
)
