"""Routed experts as one operation, `torch.ops.qwen3fast.quantized_experts` (experts.cpp).

The experts' numbers are read when it runs: compiled code does not depend on them. Neither does it depend on the number
of tokens, from which other forms take over where these were measured to be faster (kernels/forms.py).

N tokens   C experts per token   E hidden_size
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3fast.kernels.cpu.library import functions
from qwen3fast.kernels.cpu.ops import quantized_linear
from qwen3fast.kernels.cpu.structures import RowLimits, address, packed_linear, require
from qwen3fast.kernels.define import define


def quantized_experts(
    x_NE: Tensor, expert_NC: Tensor, gate_up: list[Tensor], down: list[Tensor], limits: Sequence[int] = ()
) -> Tensor:
    """Return down(silu(gate(x)) * up(x)) of the routed experts, (N, C, E) bfloat16.

    x_NE: bfloat16. expert_NC: int64. gate_up, down: packed bytes and scales of all experts' weights one below the
    other, gate before up in each, as `Packed` in quantization/formats.py. gate_up may have a third tensor, (2X, E)
    int32: the input channel of each column, for gate and up of each expert. limits: `RowLimits` of N, as a
    sequence of numbers; empty for the C++ operation alone, which any order of channels needs.
    Raises: ValueError for other dtypes, inconsistent shapes, or a number outside the experts or channels.
    """
    N, E = x_NE.shape
    require(x_NE.dtype == torch.bfloat16, "quantized_experts: x must be bfloat16")
    require(
        expert_NC.dtype == torch.int64 and expert_NC.dim() == 2 and len(expert_NC) == N,
        "quantized_experts: expert must be (N, C) int64",
    )
    try:
        first, second = packed_linear(*gate_up[:2]), packed_linear(*down)
    except ValueError as err:
        raise ValueError(f"quantized_experts: {err}") from None
    require(
        first.K == E and second.N % E == 0,
        f"quantized_experts: weights must fit x's {E} channels",
    )
    X = second.N // E
    require(
        first.N == 2 * X * second.K, f"quantized_experts: gate_up must have {2 * X * second.K} rows, it has {first.N}"
    )
    for order in gate_up[2:]:
        first.order = address("quantized_experts: an order", order, torch.int32, 2 * X, E)
    form = RowLimits(*limits).form_at(N)
    if form and len(gate_up) == 2 and bool((expert_NC.clamp(0, X - 1) == expert_NC).all()):
        at = RowLimits()._replace(**{form: 0})  # also of experts that only a few tokens chose
        return experts_one_by_one(x_NE, expert_NC, [tensor.unflatten(0, (X, -1)) for tensor in (*gate_up, *down)], at)
    x_NE, expert_NC = x_NE.contiguous(), expert_NC.contiguous()
    y_NCE = x_NE.new_empty(*expert_NC.shape, E)
    pointers = (x_NE.data_ptr(), expert_NC.data_ptr(), byref(first), byref(second), y_NCE.data_ptr())
    sizes = (N, expert_NC.shape[1], torch.get_num_threads())
    if not functions().qwen3fast_quantized_experts(*pointers, *sizes):
        problem = f"a number of {expert_NC.tolist()} is not one of the {X} experts'"
        is_order = bool((expert_NC.clamp(0, X - 1) == expert_NC).all())
        raise ValueError(f"quantized_experts: {'an order has other numbers than channels' if is_order else problem}")
    return y_NCE


def experts_one_by_one(x_NE: Tensor, expert_NC: Tensor, weights: Sequence[Tensor], limits: Sequence[int]) -> Tensor:
    """Return the result of `quantized_experts` by products of each expert's rows: see `quantized_linear`.

    weights: packed bytes and scales of gate and up, and of down, each with the experts as first dimension.
    """
    y_NCE = x_NE.new_empty(*expert_NC.shape, x_NE.shape[1])
    for expert in expert_NC.unique().tolist():
        gate_up, gate_up_scale, down, down_scale = ([tensor[expert]] for tensor in weights)
        n, c = torch.where(expert_NC == expert)
        gate, up = quantized_linear(x_NE[n], gate_up, gate_up_scale, limits).chunk(2, dim=-1)
        y_NCE[n, c] = quantized_linear(F.silu(gate) * up, down, down_scale, limits)
    return y_NCE


def _shape(x: Tensor, expert: Tensor, *others: object) -> Tensor:
    return x.new_empty((*expert.shape, x.shape[-1]))


_SCHEMA = "quantized_experts(Tensor x, Tensor expert, Tensor[] gate_up, Tensor[] down, int[] limits=[]) -> Tensor"
define(_SCHEMA, quantized_experts, _shape)
