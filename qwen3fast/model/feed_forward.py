"""The feed-forward part of a block: a gated two-layer perceptron that looks at one position at a time."""

import torch.nn.functional as F
from torch import Tensor, nn

from qwen3fast.kernels.linear import Linear, linears


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). Source: Shazeer, arXiv:2002.05202, equation 6."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x_BTE: Tensor) -> Tensor:
        """x_BTE: (batch, tokens, hidden_size). Returns the same shape."""
        gate, up = linears(x_BTE, self.gate_proj, self.up_proj)
        x_BTE = self.down_proj(F.silu(gate) * up)
        return x_BTE
