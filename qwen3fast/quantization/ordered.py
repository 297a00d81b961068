"""Linear layers whose weight holds its input channels in another order: each layer gathers its input first.

GPTQ with `desc_act` quantizes channels by importance, and so scatters each group's over the input. With its columns
sorted by group, a weight fits the formats whose groups are neighbors, with the same levels.

K in_features   N out_features   R rows
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qwen3fast.model import Block
from qwen3fast.model.stacking import STACKS
from qwen3fast.quantization.formats import Format, Packed
from qwen3fast.quantization.layers import QuantizedLinear


class OrderedLinear(QuantizedLinear):
    """A quantized linear layer; column i of its packed weight is for input channel `input_order[i]`.

    shares_order: the layers of a block with the same input have this order, too; see `find_shared_orders`.
    """

    shares_order: bool = False

    def __init__(self, packed: Packed, format: Format, order_K: Tensor, bias: nn.Parameter | None = None) -> None:
        """order_K: int32, a permutation of 0 to K - 1."""
        super().__init__(packed, format, bias)
        self.input_order = nn.Parameter(order_K, requires_grad=False)

    @classmethod
    def empty_like(cls, linear: QuantizedLinear) -> OrderedLinear:
        """Return the same layer with an order, which is empty, to be loaded."""
        order_K = torch.empty(linear.in_features, dtype=torch.int32, device=linear.weight_packed.device)
        return cls(linear.packed, linear.format, order_K, getattr(linear, "bias", None))

    @classmethod
    def forward_together(cls, x: Tensor, layers: Sequence[QuantizedLinear]) -> list[Tensor]:
        """Return each layer's product with the same x, (..., K): (..., N) per layer. A shared order has one gather."""
        first = layers[0]
        assert isinstance(first, OrderedLinear), "layers of one type share a call"
        if len(layers) > 1 and not first.shares_order:
            return [layer(x) for layer in layers]
        return super().forward_together(x.index_select(-1, first.input_order), layers)

    def rows(self, row_R: Tensor) -> Tensor:
        """Return dequantized rows, (R, K) float32, their channels in the order of the input."""
        sorted_RK = super().rows(row_R)
        return sorted_RK.new_empty(sorted_RK.shape).index_copy_(1, self.input_order.long(), sorted_RK)


def add_empty_orders(model: nn.Module) -> None:
    """Replace the quantized layers of a model's blocks, except experts, by ones with an empty order, in place."""
    for name, module in list(model.named_modules()):
        if type(module) is QuantizedLinear and ".layers." in name and ".experts." not in name:
            model.set_submodule(name, OrderedLinear.empty_like(module))


def order_problems(model: nn.Module) -> list[str]:
    """Return a line per layer of a model whose `input_order` is not a permutation: products would read elsewhere."""
    layers = ((name, module.input_order) for name, module in model.named_modules() if isinstance(module, OrderedLinear))
    return [
        f"{name}.input_order: it must hold each number from 0 to {len(order_K) - 1} once"
        for name, order_K in layers
        if not order_K.sort().values.equal(torch.arange(len(order_K), dtype=order_K.dtype, device=order_K.device))
    ]


def find_shared_orders(model: nn.Module) -> None:
    """Set `shares_order` of the layers of a model's blocks (see STACKS); their weights must be loaded."""
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for parent, names in ((block.get_submodule(part), names) for block in blocks for part, names in STACKS.items()):
        layers = [layer for name in names if isinstance(layer := getattr(parent, name, None), OrderedLinear)]
        for layer in layers:
            is_shared = all(layer.input_order.equal(other.input_order) for other in layers)
            layer.shares_order = len(layers) == len(names) and is_shared
