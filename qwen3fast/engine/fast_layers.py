"""The model's plain layers, changed in place to run by the fast forms of kernels/. Weights and names stay as they are.

N tokens   C active experts per token   E hidden_size
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from qwen3fast.kernels.attention import sdpa
from qwen3fast.kernels.compiling import is_compiling
from qwen3fast.kernels.experts import chosen_linear, run_gathered, run_grouped
from qwen3fast.kernels.grouped import grouped_linear
from qwen3fast.kernels.linear import Linear
from qwen3fast.model.attention import Attention
from qwen3fast.model.moe import Experts


class FastExperts(Experts):
    """Experts whose products read the weights of active experts in place."""

    def gathered(self, x_NE: Tensor, expert_NC: Tensor) -> Tensor:
        """Return the outputs of each token's active experts, (N, C, E), same dtype. expert_NC: int64, their numbers."""
        if x_NE.device.type == "cpu" and not is_compiling():  # uncompiled, it would copy the weights
            return self.grouped(x_NE, expert_NC)
        gate_up, down = (partial(chosen_linear, weight) for weight in (self.gate_up_proj, self.down_proj))
        return run_gathered(x_NE, expert_NC, gate_up, down)

    def grouped(self, x_NE: Tensor, expert_NC: Tensor) -> Tensor:
        """Return the result of `gathered`, computed with one product per expert for all of its tokens."""
        gate_up, down = (partial(grouped_linear, weight) for weight in (self.gate_up_proj, self.down_proj))
        return run_grouped(x_NE, expert_NC, self.gate_up_proj.shape[0], gate_up, down)


class FastAttention(Attention):
    """Attention that, without a cache, is compiled for CUDA devices without a look into PyTorch's."""

    def causal(self, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor) -> Tensor:
        """Return attention in which each token sees the tokens up to itself, (B, H, T, D)."""
        return sdpa(q_BHTD, k_BKTD, v_BKTD)


FAST: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: Linear,
    Experts: FastExperts,
    Attention: FastAttention,
}


def use_fast_layers(model: nn.Module) -> None:
    """Change the class of plain layers to their fast one's, which has the same parameters and returns the same results.

    The model stays usable without an engine. Layers of other classes (quantized ones, wrappers) do not change.
    """
    for module in model.modules():
        if type(module) in FAST:
            module.__class__ = FAST[type(module)]
