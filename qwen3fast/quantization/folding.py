"""Orders of input channels of down_proj, folded into the rows of gate_proj and up_proj: no step gathers for them.

The hidden units of a feed-forward layer can be in any order. It is exact, since the groups of all formats lie along
rows. No other order can be folded: the layers before read or write the residual stream, which has one order, or, before
o_proj, hold whole heads. Its order crosses these, and a row of v_proj serves several query heads.

F hidden units   N out_features   X experts   B blocks of rows   P records of a row
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qwen3fast.kernels.cpu.structures import bits_of, is_nl4, span_and_record
from qwen3fast.model import FeedForward
from qwen3fast.quantization.experts import QuantizedExperts
from qwen3fast.quantization.formats import LANES, Packed
from qwen3fast.quantization.layers import HIDDEN_ORDER, QuantizedLinear
from qwen3fast.quantization.ordered import OrderedLinear
from qwen3fast.quantization.uint4 import Layout


def fold_orders(model: nn.Module) -> None:
    """Sort the hidden units of each feed-forward layer or expert by down_proj's order, if it has one, in place.

    down_proj then has no order. A feed-forward layer keeps it as a parameter, `hidden_order`, (F,) int32, for adapters:
    their matrices are for the hidden units of the checkpoint. Experts, which have no adapters, do not.
    """
    for module in model.modules():
        if not isinstance(module, FeedForward | QuantizedExperts) or not isinstance(module.down_proj, OrderedLinear):
            continue
        down = module.down_proj
        order_F = down.input_order
        if isinstance(module, FeedForward):
            _sort_rows(module.gate_proj, order_F)
            _sort_rows(module.up_proj, order_F)
            module.register_parameter(HIDDEN_ORDER, order_F)
        else:
            X, F = order_F.shape
            first_X2 = torch.arange(0, 2 * X * F, F, device=order_F.device).view(X, 2)  # rows of gate_proj and up_proj
            _sort_rows(module.gate_up_proj, (first_X2[..., None] + order_F[:, None]).flatten())
        module.register_module("down_proj", QuantizedLinear(down.packed, down.format, getattr(down, "bias", None)))


def _sort_rows(layer: nn.Module, row_N: Tensor) -> None:
    """Change the order of a layer's rows in place; row_N: the row that comes to each place."""
    if isinstance(layer, QuantizedLinear):
        packed = _sorted(layer.packed, row_N)
        layer.weight_packed = nn.Parameter(packed.weight, requires_grad=False)
        layer.weight_scale = nn.Parameter(packed.scale, requires_grad=False)
    for name in ("weight", "bias"):
        if isinstance(whole := getattr(layer, name, None), Tensor):
            layer.register_parameter(name, nn.Parameter(whole[row_N], requires_grad=False))


def _sorted(packed: Packed, row_N: Tensor) -> Packed:
    weight, scale = _sorted_lanes(packed.weight, row_N, 2), packed.scale
    if scale.dim() == 1:
        return Packed(weight, scale[row_N])
    if scale.dtype != torch.uint8:
        return Packed(weight, _sorted_lanes(scale, row_N, 2))
    # Bytes of numbers in float16, see int6.py, nl4.py and uint4.py.
    has_one = bits_of(*packed) == 6 or is_nl4(*span_and_record(*packed)) or Layout.of(packed).has_zero
    head = 2 * LANES if has_one else 4 * LANES
    numbers = _sorted_lanes(scale[..., :head].unflatten(2, (-1, LANES, 2)), row_N, 3).flatten(2)
    levels = _sorted_lanes(scale[..., head:].unflatten(2, (-1, LANES)), row_N, 3).flatten(2)
    return Packed(weight, torch.cat([numbers, levels], dim=2))


def _sorted_lanes(x: Tensor, row_N: Tensor, lanes: int) -> Tensor:
    """Return x, (B, ..., 16, ...) with the rows of a block along dimension `lanes`, with its rows sorted."""
    row_first = x.movedim(lanes, 1).flatten(0, 1)[row_N]
    result: Tensor = row_first.unflatten(0, (-1, LANES)).movedim(1, lanes).contiguous()
    return result
