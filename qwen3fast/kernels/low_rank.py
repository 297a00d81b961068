"""The products of LoRA adapters beside linear layers: x @ A.T @ B.T, with the matrices of each batch row's adapter.

Source: LoRA, arXiv:2106.09685, equation 3; batches of several adapters: Punica, arXiv:2310.18547.

B batch rows   T tokens   S adapter slots   R rank   N out_features   K in_features
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwen3fast.kernels.compiling import is_compiling


def low_rank(x_BTK: Tensor, a_SRK: Tensor, b_SRN: Tensor, slot_B: Tensor) -> Tensor:
    """Return x[b] @ A[slot[b]].T @ B[slot[b]].T for each batch row b, (B, T, N) in the dtype of x.

    b_SRN: the transposed B of each slot. slot_B: int64. Compiled steps of one token per row are sums that read the
    matrices in place, in float32; otherwise each row's matrices are gathered first.
    """
    if x_BTK.shape[1] == 1 and is_compiling():
        return _sums(x_BTK, a_SRK, b_SRN, slot_B)
    x_BTR = torch.bmm(x_BTK, a_SRK.index_select(0, slot_B).transpose(1, 2))
    return torch.bmm(x_BTR, b_SRN.index_select(0, slot_B))


def _sums(x_B1K: Tensor, a_SRK: Tensor, b_SRN: Tensor, slot_B: Tensor) -> Tensor:
    """Return the same for one token per row, (B, 1, N)."""
    x_BR = (a_SRK[slot_B].float() * x_B1K.float()).sum(dim=-1)
    y_BN = (b_SRN[slot_B].float() * x_BR[..., None]).sum(dim=1)
    return y_BN[:, None].to(x_B1K.dtype)
