"""The outputs of each token's active experts, by products that read the weights of active experts only.

Few tokens (a decode step) read the weights in place, once per pair of token and expert. Many tokens (prefill) are
sorted by expert, and each expert's weights are read once. Rule of this file: no `.item()`, no shape that depends on
data.

N tokens   X experts   C active experts per token   P = N*C pairs of token and expert
E hidden_size   I moe_intermediate_size   O out_features   K in_features
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3fast.kernels.compiling import is_compiling

# A product (P, O) of rows (P, K) with weights (O, K). The second argument is the expert of each row, (P,), or for rows
# sorted by expert the end of each expert's rows, (X,).
Product = Callable[[Tensor, Tensor], Tensor]


def run_gathered(x_NE: Tensor, expert_NC: Tensor, gate_up: Product, down: Product) -> Tensor:
    """Return the outputs of each token's active experts, (N, C, E), by products that take the expert of each row.

    expert_NC: int64, the experts' numbers.
    """
    N, C = expert_NC.shape
    expert_P = expert_NC.flatten()
    x_PE = x_NE[:, None].expand(N, C, -1).flatten(0, 1)
    gate_PI, up_PI = gate_up(x_PE, expert_P).chunk(2, dim=-1)
    return down(F.silu(gate_PI) * up_PI, expert_P).view(N, C, -1)


def run_grouped(x_NE: Tensor, expert_NC: Tensor, num_experts: int, gate_up: Product, down: Product) -> Tensor:
    """Return the result of `run_gathered` by products of rows that are sorted by expert; see grouped.py."""
    N, C = expert_NC.shape
    expert_P, order_P = expert_NC.flatten().sort(stable=True)
    end_X = torch.searchsorted(expert_P, torch.arange(num_experts, device=expert_P.device), right=True)
    gate_PI, up_PI = gate_up(x_NE[order_P // C], end_X).chunk(2, dim=-1)
    y_PE = down(F.silu(gate_PI) * up_PI, end_X)
    return y_PE[order_P.argsort()].view(N, C, -1)


def chosen_linear(weight_XOK: Tensor, x_PK: Tensor, expert_P: Tensor) -> Tensor:
    """Return x[p] @ weight[expert[p]].T for few rows, (P, O), same dtype. expert_P: int64.

    Compiled, it is a sum that reads the weights in place; eagerly, they are gathered first.
    """
    if is_compiling():
        return (weight_XOK[expert_P].float() * x_PK[:, None].float()).sum(dim=-1).to(x_PK.dtype)
    return torch.bmm(weight_XOK.index_select(0, expert_P), x_PK[..., None]).squeeze(-1)
