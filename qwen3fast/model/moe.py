"""Mixture of experts: a feed-forward layer of many experts, of which a router activates a few per token.

Few tokens (a decode step) read only the weights of their active experts. Many tokens (prefill) are sorted by expert,
and each expert's weights are read once. Rule of this file: no `.item()`, no shape that depends on data.

B batch   T tokens   N = B*T tokens   X experts   C active experts per token   P = N*C pairs of token and expert
E hidden_size   I moe_intermediate_size   O out_features   K in_features
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from qwen3fast.kernels.grouped import grouped_linear
from qwen3fast.kernels.linear import Linear
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

    def few(self, x_NE: Tensor, expert_NC: Tensor) -> Tensor:
        """Return the outputs of each token's active experts, (N, C, E), same dtype. expert_NC: int64, their numbers.

        Only the weights of these experts are read, once per pair.
        """
        gate_up, down = (partial(chosen_linear, weight) for weight in (self.gate_up_proj, self.down_proj))
        return run_few(x_NE, expert_NC, gate_up, down)

    def many(self, x_NE: Tensor, expert_NC: Tensor) -> Tensor:
        """Return the result of `few`, computed with one product per expert for all of its tokens."""
        gate_up, down = (partial(grouped_linear, weight) for weight in (self.gate_up_proj, self.down_proj))
        return run_many(x_NE, expert_NC, self.gate_up_proj.shape[0], gate_up, down)


# A product (P, O) of rows (P, K) with weights (O, K). The second argument is the expert of each row, (P,), or for rows
# sorted by expert the end of each expert's rows, (X,).
Product = Callable[[Tensor, Tensor], Tensor]


def run_few(x_NE: Tensor, expert_NC: Tensor, gate_up: Product, down: Product) -> Tensor:
    """Return the outputs of each token's active experts, (N, C, E), by products that take the expert of each row.

    expert_NC: int64, the experts' numbers.
    """
    N, C = expert_NC.shape
    expert_P = expert_NC.flatten()
    x_PE = x_NE[:, None].expand(N, C, -1).flatten(0, 1)
    gate_PI, up_PI = gate_up(x_PE, expert_P).chunk(2, dim=-1)
    return down(F.silu(gate_PI) * up_PI, expert_P).view(N, C, -1)


def run_many(x_NE: Tensor, expert_NC: Tensor, num_experts: int, gate_up: Product, down: Product) -> Tensor:
    """Return the result of `run_few` by products of rows that are sorted by expert; see kernels/grouped.py."""
    N, C = expert_NC.shape
    expert_P, order_P = expert_NC.flatten().sort(stable=True)
    end_X = torch.searchsorted(expert_P, torch.arange(num_experts, device=expert_P.device), right=True)
    gate_PI, up_PI = gate_up(x_NE[order_P // C], end_X).chunk(2, dim=-1)
    y_PE = down(F.silu(gate_PI) * up_PI, end_X)
    return y_PE[order_P.argsort()].view(N, C, -1)


class MoE(nn.Module):
    """A router and its experts. Source: Shazeer et al., arXiv:1701.06538; Qwen3 report, arXiv:2505.09388, section 2."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_chosen, self.is_renormalized = config.num_experts_per_tok, config.norm_topk_prob
        self.gate = Linear(config.hidden_size, config.num_experts, bias=False)
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
        # With more rows, grouping reads less. But a step on CUDA devices must not wait for the host to read the groups.
        is_few = T == 1 and (x_NE.device.type == "cuda" or B * self.num_chosen <= self.gate.weight.shape[0])
        y_NCE = self.experts.few(x_NE, expert_NC) if is_few else self.experts.many(x_NE, expert_NC)
        y_NE = (y_NCE.float() * share_NC[..., None]).sum(dim=1)
        return y_NE.to(x_BTE.dtype).view(x_BTE.shape)


def chosen_linear(weight_XOK: Tensor, x_PK: Tensor, expert_P: Tensor) -> Tensor:
    """Return x[p] @ weight[expert[p]].T for few rows, (P, O), same dtype. expert_P: int64.

    Compiled, it is a sum that reads the weights in place; eagerly, they are gathered first.
    """
    if is_compiling():
        return (weight_XOK[expert_P].float() * x_PK[:, None].float()).sum(dim=-1).to(x_PK.dtype)
    return torch.bmm(weight_XOK.index_select(0, expert_P), x_PK[..., None]).squeeze(-1)
