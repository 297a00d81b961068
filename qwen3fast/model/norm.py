"""RMSNorm: scale each vector to a root mean square of 1, then by a learned weight."""

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root-mean-square normalization over the last dimension.

    Statistics are computed in float32 and the result is cast back *before* it is multiplied by the weight, as in
    Hugging Face's implementation: the other order gives other bits in bfloat16.
    Source: Zhang and Sennrich, arXiv:1910.07467, equation 4.
    """

    def __init__(self, size: int, eps: float) -> None:
        """size: of the last dimension. eps: added to the mean square, which may be 0."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x, (..., size) in any float dtype. Returns: same shape and dtype."""
        x_float32 = x.float()
        mean_square = x_float32.square().mean(dim=-1, keepdim=True)
        return (x_float32 * torch.rsqrt(mean_square + self.eps)).to(x.dtype) * self.weight
