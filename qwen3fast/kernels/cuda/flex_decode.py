"""Decode attention by PyTorch's FlexAttention: its kernel for few queries, over the used blocks of the cache only.

PyTorch's own front end to it wants Dynamo; here the operation behind that is recorded as it is, so its names may change
from release to release. Run without Inductor, it is a plain form that computes every score.

    B rows   H query heads   K key/value heads   L cache positions read   D head_dim
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128  # positions that are read or left out together
# What the operation's lowering asks for: the front end's defaults for inference.
KERNEL_OPTIONS = {
    "BACKEND": "AUTO",
    "PRESCALE_QK": False,
    "ROWS_GUARANTEED_SAFE": True,  # every query sees a position
    "BLOCKS_ARE_CONTIGUOUS": True,
    "WRITE_DQ": True,
    "OUTPUT_LOGSUMEXP": False,
    "OUTPUT_MAX": False,
}


def flex_decode(q_BTHD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, position_B1: Tensor) -> Tensor:
    """One query a row, T = 1, over positions 0..position_B1 (int64; -1 as 0). Returns (B, H, 1, D)."""
    from torch._higher_order_ops.flex_attention import flex_attention  # slow to import
    from torch.nn.attention.flex_attention import BlockMask

    position_B1 = position_B1.clamp(min=0)
    B, L, D = len(q_BTHD), k_BKLD.shape[2], q_BTHD.shape[3]
    blocks = torch.arange((L + BLOCK - 1) // BLOCK, dtype=torch.int32, device=q_BTHD.device)
    used_B11 = (position_B1[..., None] // BLOCK + 1).to(torch.int32)
    mask = BlockMask.from_kv_blocks(
        used_B11,
        blocks.expand(B, 1, 1, -1),
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=_is_visible,  # type: ignore[arg-type]  # the operation passes it the positions, too
        seq_lengths=(1, L),
        compute_q_blocks=False,
    )
    q_BH1D = q_BTHD.transpose(1, 2)
    arguments = (_score, mask.as_tuple(), D**-0.5, KERNEL_OPTIONS, (), (position_B1[:, 0],))
    return flex_attention(q_BH1D, k_BKLD, v_BKLD, *arguments)[0]


def _score(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return score


def _is_visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor, position_B: Tensor) -> Tensor:
    return key <= position_B[b]
