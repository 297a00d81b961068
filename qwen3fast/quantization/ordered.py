"""Linear layers whose weight holds its input channels in another order: each layer gathers its input first.

GPTQ with `desc_act` quantizes channels by importance, and so scatters each group's over the input. With its columns
sorted by group, a weight fits the formats whose groups are neighbors, with the same levels.

K in_features   N out_features   R rows   M matrices
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qwen3fast.model import Block, Qwen3
from qwen3fast.model.stacking import STACKS
from qwen3fast.quantization.formats import Format, Packed
from qwen3fast.quantization.layers import HIDDEN_ORDER, ORDERS, QuantizedLinear


class OrderedLinear(QuantizedLinear):
    """A quantized linear layer; column i of its packed weight is for input channel `input_order[i]`.

    Of the matrices of experts, which lie one below the other in a tall layer, each has an order of its own.
    shares_order: the layers of a block with the same input have this order, too; see `find_shared_orders`.
    """

    shares_order: bool = False

    def __init__(self, packed: Packed, format: Format, order_K: Tensor, bias: nn.Parameter | None = None) -> None:
        """order_K: int32, a permutation of 0 to K - 1; of experts (M, K), a permutation per matrix."""
        super().__init__(packed, format, bias)
        self.input_order = nn.Parameter(order_K, requires_grad=False)

    @classmethod
    def empty_like(cls, linear: QuantizedLinear, matrices: int = 0) -> OrderedLinear:
        """Return the same layer with an order, which is empty, to be loaded. matrices: M of experts; 0 for others."""
        order_K = empty_order(linear.in_features, matrices)
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
        sorted_RK, order_MK = super().rows(row_R), self.input_order.view(-1, self.in_features)
        channel_RK = order_MK[row_R // (self.out_features // len(order_MK))].long()
        return torch.empty_like(sorted_RK).scatter_(1, channel_RK, sorted_RK)


def empty_order(K: int, matrices: int = 0) -> nn.Parameter:
    """Return an order of K channels on meta, to be loaded. matrices: M of experts; 0 for others."""
    shape = (matrices, K) if matrices else (K,)
    return nn.Parameter(torch.empty(shape, dtype=torch.int32, device="meta"), requires_grad=False)


def add_empty_orders(model: Qwen3) -> None:
    """Replace the quantized layers of a model's blocks by ones with an empty order, in place; see folding.py."""
    for name, module in list(model.named_modules()):
        if type(module) is not QuantizedLinear or ".layers." not in name:
            continue
        if name.endswith(".mlp.down_proj"):
            mlp = model.get_submodule(name.rpartition(".")[0])
            mlp.register_parameter(HIDDEN_ORDER, empty_order(module.in_features))
        elif not name.endswith(".experts.down_proj"):
            matrices = 2 * model.config.num_experts if ".experts." in name else 0
            model.set_submodule(name, OrderedLinear.empty_like(module, matrices))


def order_problems(model: nn.Module) -> list[str]:
    """Return a line per order of a model that is not a permutation: products would read elsewhere."""
    orders = {n: p for n, p in model.named_parameters() if n.rpartition(".")[2] in ORDERS}
    return [
        f"{name}: it must hold each number from 0 to {order_K.shape[-1] - 1} once"
        for name, order_K in orders.items()
        if not order_K.sort().values.equal(torch.arange(order_K.shape[-1], device=order_K.device).expand_as(order_K))
    ]


def find_shared_orders(model: nn.Module) -> None:
    """Set `shares_order` of the layers of a model's blocks (see STACKS); their weights must be loaded."""
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for parent, names in ((block.get_submodule(part), names) for block in blocks for part, names in STACKS.items()):
        layers = [layer for name in names if isinstance(layer := getattr(parent, name, None), OrderedLinear)]
        for layer in layers:
            is_shared = all(layer.input_order.equal(other.input_order) for other in layers)
            layer.shares_order = len(layers) == len(names) and is_shared
