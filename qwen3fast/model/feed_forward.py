"""The feed-forward layer of a block: a gated perceptron that processes each token on its own.

B batch rows   T tokens   E hidden_size
"""

import torch.nn.functional as F
from torch import Tensor, nn

from qwen3fast.model.linears import linears


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). Source: Shazeer, arXiv:2002.05202, equation 6."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        """hidden_size: of input and output. intermediate_size: of gate and up."""
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x_BTE: Tensor) -> Tensor:
        """Return the output for each token: same shape and dtype."""
        gate, up = linears(x_BTE, self.gate_proj, self.up_proj)
        x_BTE = self.down_proj(F.silu(gate) * up)
        return x_BTE
