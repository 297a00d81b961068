"""Attention of a prompt's chunk over the used positions of the KV cache, whose number is read on the device.

A CUDA graph of a chunk that does not begin its prompt must serve every beginning. PyTorch's attention takes its lengths
from shapes, which a graph fixes; this kernel reads the queries' positions, and the rows of the cache, from memory.
Source: Dao, "FlashAttention-2", arXiv:2307.08691; online softmax: arXiv:1805.02867.

    B batch rows   T query tokens   R rows of the cache   S positions   H query heads   K key/value heads   D head_dim
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen3fast.kernels.cuda.decode_step.launch import current
from qwen3fast.kernels.cuda.split_attention import attend_block, num_stages
from qwen3fast.kernels.define import define


def chunk_attention(
    q_BTHD: Tensor,
    k_RKSD: Tensor,
    v_RKSD: Tensor,
    position_BT: Tensor,
    row_B: Tensor,
    k_scale_RKS: Tensor | None = None,
    v_scale_RKS: Tensor | None = None,
) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v over positions 0..position_BT of the rows row_B: (B, T, H, D), q's dtype.

    position_BT, row_B: int64; positions ascend in each row. Keys and values: any float dtype, or int8 with float32
    scales; contiguous. D: a power of two, at least 16.
    """
    B, T, H, D = q_BTHD.shape
    K, S = k_RKSD.shape[1:3]
    q_BTHD, position_BT = q_BTHD.contiguous(), position_BT.contiguous()
    y_BTHD = torch.empty_like(q_BTHD)
    is_quantized = k_scale_RKS is not None
    scales = (k_scale_RKS, v_scale_RKS) if is_quantized else (y_BTHD, y_BTHD)  # not read then
    queries, block = tile_shape(q_BTHD.dtype, is_quantized)
    arguments = (q_BTHD, k_RKSD, v_RKSD, *scales, position_BT, row_B, y_BTHD, T, S, D**-0.5)
    sizes = {"H": H, "G": H // K, "D": D, "QUERIES": queries, "BLOCK": block, "IS_QUANTIZED": is_quantized}
    grid, stages = (triton.cdiv(T, queries), B * H), num_stages(q_BTHD.dtype)
    with current(q_BTHD.device):
        chunk_kernel[grid](*arguments, **sizes, num_warps=4, num_stages=stages)
    return y_BTHD


define(
    "chunk_attention(Tensor q, Tensor k, Tensor v, Tensor position, Tensor row, Tensor? k_scale=None, "
    "Tensor? v_scale=None) -> Tensor",
    chunk_attention,
    lambda q, *others: q.new_empty(q.shape),
    "CompositeExplicitAutograd",
)


def tile_shape(dtype: torch.dtype, is_quantized: bool) -> tuple[int, int]:
    """Return how many queries a program takes, and how many positions at a time.

    Chosen by compiling: larger ones would not fit into registers (int8: on sm_100 144 bytes were spilled) or, in
    float32, into shared memory.
    """
    queries, block = (32, 32) if dtype == torch.float32 else (64, 64)
    return queries, block // 2 if is_quantized else block


@triton.jit(do_not_specialize=["T"])  # one form for all chunks
def chunk_kernel(
    q,
    k,
    v,
    k_scale,
    v_scale,
    position,
    row,
    y,
    T,
    S,
    scale,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_QUANTIZED: tl.constexpr,
):
    """Program (i, h): queries i*QUERIES.. of head h % H of batch row h // H; the longest first."""
    i, b, h = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1) // H, tl.program_id(1) % H
    t, d = i * QUERIES + tl.arange(0, QUERIES), tl.arange(0, D)
    is_real = t < T
    at = tl.load(position + b * T + t, mask=is_real, other=-1)
    place = ((b.to(tl.int64) * T + t[:, None]) * H + h) * D + d[None, :]
    query = tl.load(q + place, mask=is_real[:, None], other=0.0)
    length = tl.max(at, 0) + 1
    first_key = (tl.load(row + b) * (H // G) + h // G) * S
    most = tl.full([QUERIES], -1e30, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    values = tl.zeros([QUERIES, D], tl.float32)
    for first in range(0, length, BLOCK):
        s = first + tl.arange(0, BLOCK)
        vector, is_used, seen = first_key + s, s < length, s[None, :] <= at[:, None]
        most, total, values = attend_block(
            query, k, v, k_scale, v_scale, vector, is_used, seen, scale, most, total, values, D, IS_QUANTIZED
        )
    result = values / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(y + place, result.to(y.dtype.element_ty), mask=is_real[:, None])
