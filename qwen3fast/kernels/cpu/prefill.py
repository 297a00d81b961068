"""Attention of a chunk of a prompt over the KV cache: in C++ (prefill_attention.cpp), or PyTorch's own form.

The operation chooses between them by the sizes of the call, from limits that were measured (kernels/forms.py): code
that is compiled around it serves all sizes.

B batch rows   T query tokens   L cache positions read   R slots   S positions of a slot
H query heads   K key/value heads   D head_dim
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3fast.kernels.cpu import tiles
from qwen3fast.kernels.cpu.library import functions
from qwen3fast.kernels.cpu.structures import LANES, NEVER, checked_cache, checked_positions, require
from qwen3fast.kernels.define import define

# Chunks of up to so many tokens share a limit. Longer ones have the last.
CHUNKS = (32, 128, 512)


def prefill_attention(
    q_BTHD: Tensor,
    k_RKSD: Tensor,
    v_RKSD: Tensor,
    position_BT: Tensor,
    row_B: Tensor,
    k_scale_RKS: Tensor | None = None,
    v_scale_RKS: Tensor | None = None,
    sdpa_from: Sequence[int] = (),
    tiles_from: Sequence[int] = (),
) -> Tensor:
    """Return attention of each query over positions 0..its own of slot row_B: (B, T, H, D) bfloat16.

    position_BT, row_B: int64. sdpa_from, tiles_from: for each of CHUNKS, the used length from which PyTorch's form
    serves, or else AMX's tiles; empty for never.
    """
    (B, T, H, D), (_, K, S, _) = q_BTHD.shape, k_RKSD.shape
    layer = checked_cache("prefill_attention", q_BTHD, k_RKSD, v_RKSD, k_scale_RKS, v_scale_RKS)
    require(D % (2 * LANES) == 0, "prefill_attention: D a multiple of 32")
    q, position = q_BTHD.contiguous(), checked_positions("prefill_attention", position_BT, B * T)
    row, rows = row_B.contiguous(), row_B.tolist()
    require(
        row.dtype == torch.int64 and row.numel() == B and all(0 <= r < len(k_RKSD) for r in rows),
        "prefill_attention: a row of the cache for each batch row, int64",
    )
    for lengths in (sdpa_from, tiles_from):
        require(len(lengths) in (0, len(CHUNKS)), f"prefill_attention: a form needs {len(CHUNKS)} lengths, or none")
    if sdpa_from and B > 1:  # a row's form does not depend on the lengths beside it
        each = zip(q.split(1), position.view(B, T).split(1), row.split(1), strict=True)
        rest = (k_scale_RKS, v_scale_RKS, sdpa_from, tiles_from)
        return torch.cat([prefill_attention(x, k_RKSD, v_RKSD, at, r, *rest) for x, at, r in each])
    if sdpa_from:
        used = min(int(position.max()) + 1, S)
        if used >= sdpa_from[chunk_class(T)]:
            k_1KLD, v_1KLD = _read(k_RKSD, k_scale_RKS, rows[0], used), _read(v_RKSD, v_scale_RKS, rows[0], used)
            return sdpa_prefill(q, k_1KLD, v_1KLD, position.view(B, T))
    y_BTHD = q.new_empty(q.shape)
    functions().qwen3fast_prefill_attention(
        q.data_ptr(),
        byref(layer),
        position.data_ptr(),
        row.data_ptr(),
        y_BTHD.data_ptr(),
        *(B, T, H, K, S, D),
        tile_length(tiles_from, T),
        torch.get_num_threads(),
    )
    return y_BTHD


def chunk_class(tokens: int) -> int:
    """Return the index in CHUNKS of the smallest that holds so many tokens; otherwise of the last."""
    return next((i for i, size in enumerate(CHUNKS) if tokens <= size), len(CHUNKS) - 1)


def tile_length(tiles_from: Sequence[int], tokens: int) -> int:
    """Return the used length from which tiles serve chunks of so many tokens; NEVER where there are none."""
    return tiles_from[chunk_class(tokens)] if tiles_from and tiles.are_usable() else NEVER


def sdpa_prefill(q_BTHD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, position_BT: Tensor) -> Tensor:
    """Return PyTorch's attention of queries at these positions: (B, T, H, D), contiguous, the query's dtype.

    A first chunk, whose queries are all L positions, needs no mask and computes half of the products.
    """
    T, L = q_BTHD.shape[1], k_BKLD.shape[2]
    position_L = torch.arange(L, device=position_BT.device)
    q_BHTD = q_BTHD.transpose(1, 2)
    if T == L and bool((position_BT == position_L).all()):
        y_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BKLD, v_BKLD, is_causal=True, enable_gqa=True)
    else:
        mask_B1TL = (position_L <= position_BT[..., None])[:, None]
        y_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BKLD, v_BKLD, attn_mask=mask_B1TL, enable_gqa=True)
    return y_BHTD.transpose(1, 2).contiguous()


def _read(x_RKSD: Tensor, scale_RKS: Tensor | None, row: int, length: int) -> Tensor:
    """Return keys or values of a slot at the first positions, (1, K, L, D) bfloat16."""
    x_1KLD = x_RKSD[row : row + 1, :, :length]
    if scale_RKS is None:
        return x_1KLD
    return (x_1KLD * scale_RKS[row : row + 1, :, :length, None]).to(torch.bfloat16)


def _shape(q: Tensor, *others: Tensor | None, **named: object) -> Tensor:
    return q.new_empty(q.shape)


define(
    "prefill_attention(Tensor q, Tensor k, Tensor v, Tensor position, Tensor row, Tensor? k_scale=None, "
    "Tensor? v_scale=None, int[] sdpa_from=[], int[] tiles_from=[]) -> Tensor",
    prefill_attention,
    _shape,
)
