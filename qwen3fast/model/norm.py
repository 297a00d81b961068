"""RMSNorm: scale each vector to unit root-mean-square, then by a learned weight."""

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension.

    Statistics are computed in float32 and cast back *before* the weight is applied, the order of the Hugging Face
    implementation: multiplying first would round differently in bfloat16.
    Source: Zhang and Sennrich, arXiv:1910.07467, equation 4.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., size), any float dtype. Returns the same shape and dtype."""
        x_float32 = x.float()
        mean_square = x_float32.square().mean(dim=-1, keepdim=True)
        return (x_float32 * torch.rsqrt(mean_square + self.eps)).to(x.dtype) * self.weight
