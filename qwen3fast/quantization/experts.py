"""Experts with packed weights; they replace `Experts` of model/moe.py.

On the CPU one C++ operation reads the bytes of active experts only, for any number of tokens, and quantizes activations
to 8 bits as in linear layers, except for fp8 and lossless. On CUDA devices a Triton kernel serves few tokens; for many
tokens the weights are dequantized first. The plain form does both in PyTorch.

N tokens (of weights: out_features of an expert)   X experts   C active experts per token   P = N*C pairs
E hidden_size   I moe_intermediate_size   K in_features
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from qwen3fast.kernels import cuda
from qwen3fast.kernels.compiling import is_compiling
from qwen3fast.kernels.cpu.structures import RowLimits
from qwen3fast.kernels.experts import run_gathered, run_grouped
from qwen3fast.kernels.grouped import grouped_linear
from qwen3fast.model.moe import Experts
from qwen3fast.quantization.formats import Format, quantize
from qwen3fast.quantization.layers import QuantizedLinear, can_use_operations
from qwen3fast.quantization.ordered import OrderedLinear


class QuantizedExperts(nn.Module):
    """The weights of all experts as two tall layers, which may have different formats.

    Each expert's rows follow the previous expert's. Where gate_up_proj is an OrderedLinear, gate_proj and up_proj of
    each expert have orders of their own. limits: see QuantizedLinear; here of tokens.
    """

    limits: RowLimits = RowLimits()

    def __init__(self, gate_up_proj: QuantizedLinear, down_proj: QuantizedLinear, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.gate_up_proj, self.down_proj = gate_up_proj, down_proj  # (X * 2I, E) and (X * E, I)

    @classmethod
    def of(cls, experts: Experts, format: Format) -> QuantizedExperts:
        """Quantize experts; from experts on `meta`, make empty ones to be loaded."""
        gate_up, down = experts.gate_up_proj, experts.down_proj
        return cls(_tall(gate_up, format), _tall(down, format), num_experts=len(down))

    def can_use_operation(self, x: Tensor) -> bool:
        """Return whether the C++ operation serves these weights on the device of x."""
        return all(can_use_operations(layer.format, x) for layer in (self.gate_up_proj, self.down_proj))

    def gathered(self, x_NE: Tensor, expert_NC: Tensor) -> Tensor:
        """Return the output of each token's active experts, (N, C, E); only their weights are read."""
        if self.can_use_operation(x_NE):
            return self._in_one_operation(x_NE, expert_NC)
        formats = (self.gate_up_proj.format, self.down_proj.format)
        has_kernel = cuda.can_packed_experts(x_NE) and all("cuda" in format.devices for format in formats)
        product = self._chosen_by_kernel if has_kernel else self._chosen
        gate_up, down = (partial(product, layer) for layer in (self.gate_up_proj, self.down_proj))
        return run_gathered(x_NE, expert_NC, gate_up, down)

    def grouped(self, x_NE: Tensor, expert_NC: Tensor) -> Tensor:
        """Return the same as `gathered`, in the way that is fast for many tokens."""
        if self.can_use_operation(x_NE):
            return self._in_one_operation(x_NE, expert_NC)
        gate_up, down = (partial(self._grouped, layer) for layer in (self.gate_up_proj, self.down_proj))
        return run_grouped(x_NE, expert_NC, self.num_experts, gate_up, down)

    def _in_one_operation(self, x_NE: Tensor, expert_NC: Tensor) -> Tensor:
        gate_up, down = self.operands()
        y_NCE: Tensor = torch.ops.qwen3fast.quantized_experts(x_NE.bfloat16(), expert_NC, gate_up, down, self.limits)
        return y_NCE.to(x_NE.dtype)

    def operands(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return gate_up and down as `torch.ops.qwen3fast.quantized_experts` takes them."""
        gate_up, down = ([*layer.format.operands(layer.packed)] for layer in (self.gate_up_proj, self.down_proj))
        if isinstance(self.gate_up_proj, OrderedLinear):
            gate_up.append(self.gate_up_proj.input_order)
        return gate_up, down

    def _chosen_by_kernel(self, layer: QuantizedLinear, x_PK: Tensor, expert_P: Tensor) -> Tensor:
        P, matrices, is_fp8 = len(x_PK), self.num_experts, layer.format.name == "fp8"
        if isinstance(layer, OrderedLinear):  # gate_proj and up_proj as two rows, each with its own order
            matrices = len(layer.input_order)
            expert_P = (2 * expert_P[:, None] + torch.arange(2, device=expert_P.device)).flatten()
            x_PK = x_PK.repeat_interleave(2, dim=0).gather(1, layer.input_order[expert_P].long())
        y_PN: Tensor = torch.ops.qwen3fast.packed_experts(x_PK, *layer.packed, expert_P, matrices, is_fp8)
        return y_PN.to(x_PK.dtype).view(P, -1)

    def _chosen(self, layer: QuantizedLinear, x_PK: Tensor, expert_P: Tensor) -> Tensor:
        rows = layer.out_features // self.num_experts
        row_PN = expert_P[:, None] * rows + torch.arange(rows, device=x_PK.device)
        weight_PNK = layer.rows(row_PN.flatten()).view(*row_PN.shape, -1)
        if is_compiling():
            return (weight_PNK * x_PK[:, None].float()).sum(dim=-1).to(x_PK.dtype)
        return torch.bmm(weight_PNK.to(x_PK.dtype), x_PK[..., None]).squeeze(-1)

    def _grouped(self, layer: QuantizedLinear, x_PK: Tensor, end_X: Tensor) -> Tensor:
        return grouped_linear(self.dequantize(layer, x_PK.dtype), x_PK, end_X)

    def dequantize(self, layer: QuantizedLinear, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the dequantized weights of `gate_up_proj` or `down_proj`, (X, N, K).

        Compiled, it is one pass without intermediate results; eagerly, one expert at a time keeps these small.
        """
        if is_compiling():
            weight_XNK: Tensor = layer.dequantize().to(dtype).unflatten(0, (self.num_experts, -1))
            return weight_XNK
        rows, in_features = layer.out_features // self.num_experts, layer.in_features
        stack = torch.empty(self.num_experts, rows, in_features, dtype=dtype, device=layer.weight_packed.device)
        row_XN = torch.arange(layer.out_features, device=stack.device).view(self.num_experts, rows)
        for expert, row_N in enumerate(row_XN):
            stack[expert] = layer.rows(row_N)
        return stack


def _tall(stack_XNK: Tensor, format: Format) -> QuantizedLinear:
    X, N, K = stack_XNK.shape
    if stack_XNK.is_meta:
        return QuantizedLinear(format.empty(X * N, K, stack_XNK.device), format)
    return QuantizedLinear(quantize(stack_XNK.view(X * N, K), format), format)
