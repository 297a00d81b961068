"""Linear layers in the form that suits device, dtype and number of rows.

M rows   N out_features   K in_features
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen3fast.kernels import cpu
from qwen3fast.kernels.compiling import is_compiling
from qwen3fast.kernels.cpu.structures import RowLimits


class Linear(nn.Linear):
    """An `nn.Linear` that may run in C++ or, with one row, as a compiled reduction.

    limits: the numbers of rows from which other forms take the place of the C++ operation's own; engines set them where
    these are faster (engine/forms.py).
    stacked: the weights of this layer and of those that read the same input, where engines keep them as one
    (model/stacking.py); None elsewhere.
    """

    limits: RowLimits = RowLimits()
    stacked: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ weight.T + bias, (..., N) in the dtype of x, (..., K)."""
        return linear(x, self.weight, self.bias, self.limits)

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        """Move or convert the parameters, for `to` and its like: they leave `stacked`, whose memory becomes free."""
        self.stacked = None
        return super()._apply(*arguments, **options)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy takes over: its weight is its own, in other memory than `stacked`."""
        return {name: value for name, value in vars(self).items() if name != "stacked"}

    @classmethod
    def forward_together(cls, x: Tensor, layers: Sequence[Linear]) -> list[Tensor]:
        """Return each layer's product with the same x, (..., K): in compiled code from one, where they are stacked."""
        whole_NK = layers[0].stacked
        if is_compiling() and whole_NK is not None and whole_NK.device == x.device:
            return list(F.linear(x, whole_NK).split([layer.out_features for layer in layers], dim=-1))
        return [layer(x) for layer in layers]


def linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None, limits: RowLimits | None = None) -> Tensor:
    """Return x @ weight.T + bias, (..., N), same dtype. x: (..., K). limits: of the C++ operation.

    The form depends on the number of rows, the device, and whether code is compiled (kernels/compiling.py). The
    reduction must run compiled: eagerly it would materialize an (M, N, K) product. With more than one row, it would
    read the weight once per row.
    """
    if cpu.can_linear(x, weight_NK):
        y: Tensor = torch.ops.qwen3fast.linear(x, weight_NK, limits or ())
        return y if bias_N is None else y + bias_N
    is_one_row = x.numel() == x.shape[-1]
    if is_one_row and is_compiling() and x.device.type == "cpu":
        return matvec_as_reduction(x, weight_NK, bias_N)
    return F.linear(x, weight_NK, bias_N)


def matvec_as_reduction(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """Return the same product as multiply-and-sum in float32, which Inductor turns into one vectorized C++ loop.

    x: (..., K). Returns (..., N), same dtype.
    """
    x_M1K = x.reshape(-1, 1, x.shape[-1])
    y_MN = (weight_NK.float() * x_M1K.float()).sum(dim=-1).to(x.dtype)
    y = y_MN.view(*x.shape[:-1], weight_NK.shape[0])
    return y if bias_N is None else y + bias_N
