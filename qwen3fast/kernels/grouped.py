"""Linear layers of all experts in one call: rows sorted by expert, each group times its own weight.

It is an operation, `torch.ops.qwen3fast.grouped_linear`, as the number of rows per group is unknown when code is
compiled.

P rows   X experts   N out_features   K in_features
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3fast.kernels.define import define


def grouped_linear(weight_XNK: Tensor, x_PK: Tensor, end_X: Tensor) -> Tensor:
    """Return x @ weight[e].T for the rows of each expert e, (P, N), same dtype.

    end_X: the end of each expert's rows, int64. The weight of an expert without rows is not read.
    Where `waits_for_device`, the host reads `end_X`; so it does on a CPU, where that costs nothing.
    """
    y_PN: Tensor = torch.ops.qwen3fast.grouped_linear(x_PK, weight_XNK, end_X)
    return y_PN


def waits_for_device(device: torch.device, dtype: torch.dtype, in_features: int) -> bool:
    """Return whether the host waits for a CUDA device in products of this dtype and size, which no graph may hold.

    PyTorch has a kernel for compute capability 9.x and 10.x in bfloat16; elsewhere it, too, reads the groups on the
    host. Source: _grouped_mm_cuda in its GroupedBlas.cpp.
    """
    if device.type != "cuda":
        return False
    has_kernel = torch.cuda.get_device_capability(device)[0] in (9, 10)
    return not (has_kernel and dtype == torch.bfloat16 and in_features % 8 == 0)


def _product(x_PK: Tensor, weight_XNK: Tensor, end_X: Tensor) -> Tensor:
    is_aligned = x_PK.shape[1] % 8 == 0 and weight_XNK.is_contiguous()
    if x_PK.device.type == "cuda" and x_PK.dtype == torch.bfloat16 and is_aligned:
        grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm  # PyTorch 2.9 has no public name for it
        return grouped_mm(x_PK, weight_XNK.transpose(1, 2), offs=end_X.int()).contiguous()
    y_PN, start = x_PK.new_empty(x_PK.shape[0], weight_XNK.shape[1]), 0
    for expert, end in enumerate(end_X.tolist()):
        if end > start:
            torch.mm(x_PK[start:end], weight_XNK[expert].T, out=y_PN[start:end])
        start = end
    return y_PN


def _shape(x_PK: Tensor, weight_XNK: Tensor, end_X: Tensor) -> Tensor:
    return x_PK.new_empty(x_PK.shape[0], weight_XNK.shape[1])


define("grouped_linear(Tensor x, Tensor weight, Tensor end) -> Tensor", _product, _shape, "CompositeExplicitAutograd")
