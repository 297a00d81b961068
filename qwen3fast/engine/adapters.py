"""LoRA adapters beside a model's linear layers, chosen per batch row: several adapters share one base model.

The model itself does not change. A second model shares its weights and all of its modules except the linear layers of
its blocks, which add the product of each row's adapter (kernels/low_rank.py). Steps without adapters run the first one.

R rows of the cache   S adapter slots   K in_features   N out_features
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qwen3fast.engine.staging import staged
from qwen3fast.kernels.low_rank import low_rank
from qwen3fast.model import Qwen3
from qwen3fast.model.linears import linears
from qwen3fast.quantization.layers import HIDDEN_ORDER

NO_ADAPTER = 0  # the slot of rows without an adapter; its matrices are zero
ADAPTED = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
Matrices = Mapping[str, tuple[Tensor, Tensor]]  # by a module's name: A (rank, K), and its scale * B (N, rank)
Module = TypeVar("Module", bound=nn.Module)


class AdaptedLinear(nn.Module):
    """A linear layer of any kind, to whose output each batch row's adapter is added.

    A call of one token per row is a decode step: row b has the adapter in slot decode_slot_R[b]. A call of more tokens
    per row is a part of one prompt per row: row b has the adapter in slot chunk_slot_R[b].
    """

    def __init__(self, base: Any, slots: int, rank: int, dtype: torch.dtype, rows: tuple[Tensor, Tensor]) -> None:
        """base: the layer. dtype: of activations. rows: decode_slot_R and chunk_slot_R, int64, of the engine."""
        super().__init__()
        self.base = base
        self.lora_A, self.lora_B = (
            nn.Parameter(torch.zeros(slots, rank, size, dtype=dtype, device=rows[0].device), requires_grad=False)
            for size in (base.in_features, base.out_features)
        )
        for name, slot in zip(("decode_slot_R", "chunk_slot_R"), rows, strict=True):
            self.register_buffer(name, slot, persistent=False)

    def forward(self, x_BTK: Tensor) -> Tensor:
        """Return the layer's output and the adapters' products, (B, T, N) in the dtype of x_BTK."""
        [y_BTN] = self.forward_together(x_BTK, [self])
        return y_BTN

    @classmethod
    def forward_together(cls, x_BTK: Tensor, layers: list[AdaptedLinear]) -> list[Tensor]:
        """Return the outputs, (B, T, N) each, of several layers for the same x_BTK."""
        outputs = linears(x_BTK, *(layer.base for layer in layers))
        return [y_BTN + layer._product(x_BTK) for layer, y_BTN in zip(layers, outputs, strict=True)]

    def _product(self, x_BTK: Tensor) -> Tensor:
        is_step = x_BTK.shape[1] == 1
        slots = self.get_buffer("decode_slot_R" if is_step else "chunk_slot_R")
        return low_rank(x_BTK, self.lora_A, self.lora_B, slots[: x_BTK.shape[0]])


class AdapterSlots:
    """The matrices of up to max_adapters adapters at fixed addresses, and a model that adds their products.

    Attributes:
        model: shares the weights of the base model; for steps in which a row has an adapter.
        layers: the adapted layers by name, in the order of the model. decode_slot_R, chunk_slot_R: the slots of the
            rows of decode steps, and of the prompts that are computed next.
        num_bytes: memory of all matrices.
    """

    def __init__(self, model: Qwen3, max_adapters: int, max_rank: int, decode_slot_R: Tensor) -> None:
        """Allocate the matrices, all zero. decode_slot_R: the slot of each row's adapter, int64, written by others."""
        self.max_adapters, self.max_rank = max_adapters, max_rank
        self.decode_slot_R = decode_slot_R
        self.chunk_slot_R = torch.zeros_like(decode_slot_R)
        self.layers: dict[str, AdaptedLinear] = {}
        self._hidden_orders: dict[str, Tensor] = {}  # of feed-forward layers whose hidden units are sorted, by name
        self.model, self.model.model = _copy(model), _copy(model.model)
        dtype, rows = model.model.norm.weight.dtype, (decode_slot_R, self.chunk_slot_R)
        self._arguments = (1 + max_adapters, max_rank, dtype, rows)
        blocks = [self._adapt(block, f"model.layers.{i}") for i, block in enumerate(model.model.layers)]
        self.model.model.layers = nn.ModuleList(blocks)
        self.num_bytes = sum(p.nbytes for layer in self.layers.values() for p in (layer.lora_A, layer.lora_B))

    def write(self, slot: int, matrices: Matrices) -> None:
        """Fill a slot with an adapter's matrices; ranks below max_rank are padded with zeros.

        matrices: of some of `layers`, by name; empty to clear the slot. Hidden units are numbered as in the checkpoint.
        """
        assert slot != NO_ADAPTER, "slot 0 is for rows without an adapter"
        for name, layer in self.layers.items():
            layer.lora_A[slot].zero_()
            layer.lora_B[slot].zero_()
            if name in matrices:
                a_RK, b_NR = self._in_hidden_order(name, *matrices[name])
                for memory, matrix in ((layer.lora_A, a_RK), (layer.lora_B, b_NR.T)):
                    on_host = matrix.to(memory.dtype).contiguous()  # as the copy must find it, not to wait
                    memory[slot, : len(a_RK)].copy_(staged(on_host, memory.device), non_blocking=True)

    def _in_hidden_order(self, name: str, a_RK: Tensor, b_NR: Tensor) -> tuple[Tensor, Tensor]:
        """Return a layer's matrices with hidden units in the order of the model's."""
        order_F = self._hidden_orders.get(name.rpartition(".")[0])
        if order_F is None:
            return a_RK, b_NR
        order_F = order_F.to(a_RK.device)
        return (a_RK[:, order_F], b_NR) if name.endswith(".down_proj") else (a_RK, b_NR[order_F])

    def _adapt(self, block: nn.Module, name: str) -> nn.Module:
        """Return a copy of a block that shares all of its modules except the adapted layers."""
        adapted = _copy(block)
        for part, names in ADAPTED.items():
            owner = _copy(block.get_submodule(part))
            if (order_F := getattr(owner, HIDDEN_ORDER, None)) is not None:
                self._hidden_orders[f"{name}.{part}"] = order_F
            for layer in names:
                base = getattr(owner, layer, None)
                if base is not None:  # a block with experts has no such feed-forward layers
                    self.layers[f"{name}.{part}.{layer}"] = AdaptedLinear(base, *self._arguments)
                    setattr(owner, layer, self.layers[f"{name}.{part}.{layer}"])
            setattr(adapted, part, owner)
        return adapted


def _copy(module: Module) -> Module:
    """Return a copy of a module that shares parameters and submodules; replacing one leaves the other's in place."""
    copied = copy.copy(module)
    copied._modules = dict(module._modules)
    return copied
