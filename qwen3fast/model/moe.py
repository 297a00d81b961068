"""Mixture of experts: a feed-forward layer of many experts, of which a router activates a few per token.

These are the plain forms. An engine runs the same weights by the forms of kernels/experts.py (engine/fast_layers.py).

B batch   T tokens   N = B*T tokens   X experts   C active experts per token
E hidden_size   I moe_intermediate_size
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen3fast.model.config import ModelConfig


class Experts(nn.Module):
    """The weights of all experts, stacked; each expert is a SwiGLU as in feed_forward.py.

    Names and layout are as in transformers 5; loading stacks the tensors of checkpoints that store experts one by one.
    The quantized form is in quantization/experts.py.
    """

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        nn.init.normal_(self.gate_up_proj, std=0.02)
        nn.init.normal_(self.down_proj, std=0.02)

    def gathered(self, x_NE: Tensor, expert_NC: Tensor) -> Tensor:
        """Return the outputs of each token's active experts, (N, C, E), same dtype. expert_NC: int64, their numbers.

        It gathers the weights of these experts, once per token: right for a few tokens, as in a decode step.
        """
        gate_up_NCI = torch.einsum("ncie,ne->nci", self.gate_up_proj[expert_NC], x_NE)
        gate_NCI, up_NCI = gate_up_NCI.chunk(2, dim=-1)
        return torch.einsum("ncei,nci->nce", self.down_proj[expert_NC], F.silu(gate_NCI) * up_NCI)

    def grouped(self, x_NE: Tensor, expert_NC: Tensor) -> Tensor:
        """Return the result of `gathered`, reading each expert's weights once for all of its tokens, as in prefill."""
        y_NCE = x_NE.new_empty(*expert_NC.shape, x_NE.shape[1])
        for expert in expert_NC.unique().tolist():
            n, c = torch.where(expert_NC == expert)
            gate, up = F.linear(x_NE[n], self.gate_up_proj[expert]).chunk(2, dim=-1)
            y_NCE[n, c] = F.linear(F.silu(gate) * up, self.down_proj[expert])
        return y_NCE


class MoE(nn.Module):
    """A router and its experts. Source: Shazeer et al., arXiv:1701.06538; Qwen3 report, arXiv:2505.09388, section 2."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_chosen, self.is_renormalized = config.num_experts_per_tok, config.norm_topk_prob
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = Experts(config.num_experts, config.hidden_size, config.moe_intermediate_size)

    def route(self, x_NE: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights and numbers of each token's active experts: (N, C) float32, (N, C) int64.

        The weights are probabilities over all experts: they sum to 1 only if renormalized (`norm_topk_prob`).
        """
        share_NC, expert_NC = self.gate(x_NE).softmax(dim=-1, dtype=torch.float32).topk(self.num_chosen)
        if self.is_renormalized:
            share_NC = share_NC / share_NC.sum(dim=-1, keepdim=True)
        return share_NC, expert_NC

    def forward(self, x_BTE: Tensor) -> Tensor:
        """Return the weighted sum of each token's active experts: same shape and dtype as x_BTE."""
        B, T, _ = x_BTE.shape
        x_NE = x_BTE.flatten(0, 1)
        share_NC, expert_NC = self.route(x_NE)
        # With more rows, `grouped` reads fewer weights. On CUDA devices, steps never use it: it may copy the groups to
        # the host, which would wait for the device.
        is_few = T == 1 and (x_NE.device.type == "cuda" or B * self.num_chosen <= self.gate.weight.shape[0])
        y_NCE = self.experts.gathered(x_NE, expert_NC) if is_few else self.experts.grouped(x_NE, expert_NC)
        y_NE = (y_NCE.float() * share_NC[..., None]).sum(dim=1)
        return y_NE.to(x_BTE.dtype).view(x_BTE.shape)
