"""Each expert's own matrices, as most checkpoints store them -> the stacked parameters of a layer's experts.

`....mlp.experts.7.gate_proj.weight`, `up_proj` and `down_proj` become `....mlp.experts.gate_up_proj` and `down_proj`
(see model/moe.py). Checkpoints that hold the stacked tensors do not need this file.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qwen3fast.quantization.formats import Format, Packed, put_rows
from qwen3fast.quantization.layers import QuantizedLinear
from qwen3fast.quantization.ordered import OrderedLinear

Shape = tuple[int, ...]
PROJECTIONS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}  # stacked: one after the other


@dataclass(frozen=True)
class ExpertSlice:
    """The place of one expert's matrix: rows of one matrix of a stacked parameter, from `first_row` on."""

    target: str
    expert: int
    first_row: int
    shape: Shape


class ExpertStacks:
    """Stacked parameters that are filled slice by slice.

    Attributes:
        slices: the place of each expert's matrix, by the name that a checkpoint gives it.
    """

    def __init__(self, parameters: dict[str, Shape], device: torch.device, dtype: torch.dtype) -> None:
        """parameters: names and shapes of all parameters of a model; experts' parameters get slices."""
        self._parameters, self._device, self._dtype = parameters, device, dtype
        self._stacks: dict[str, Tensor] = {}
        self._packed: dict[str, Packed] = {}
        self._orders: dict[str, Tensor] = {}  # of input channels
        self._missing: dict[str, set[str]] = {}
        self._names: dict[str, list[str]] = {}  # of a stack's slices
        self.slices: dict[str, ExpertSlice] = {}
        for target, shape in parameters.items():
            prefix, _, stacked = target.rpartition(".")
            if not prefix.endswith(".mlp.experts"):
                continue
            num_experts, rows, columns = shape
            rows //= len(PROJECTIONS[stacked])
            for expert in range(num_experts):
                for i, projection in enumerate(PROJECTIONS[stacked]):
                    name = f"{prefix}.{expert}.{projection}.weight"
                    self.slices[name] = ExpertSlice(target, expert, i * rows, (rows, columns))
                    self._names.setdefault(target, []).append(name)

    def put(self, name: str, tensor: Tensor) -> tuple[str, Tensor] | None:
        """Copy one expert's matrix to its place.

        Returns: the name and the tensor of a parameter whose last slice this was, otherwise None.
        """
        place = self.slices[name]
        if place.target not in self._stacks:
            shape = self._parameters[place.target]
            self._stacks[place.target] = torch.empty(shape, dtype=self._dtype, device=self._device)
            self._missing[place.target] = set(self._names[place.target])
        stack, missing = self._stacks[place.target], self._missing[place.target]
        stack[place.expert, place.first_row : place.first_row + place.shape[0]] = tensor
        missing.discard(name)
        return None if missing else (place.target, self._stacks.pop(place.target))

    def put_packed(
        self, name: str, packed: Packed, format: Format, order_K: Tensor | None
    ) -> tuple[str, QuantizedLinear] | None:
        """Copy one expert's packed matrix to its place: a stack is one tall weight, expert after expert.

        order_K: of its input channels, if it has one.
        Returns: the name and the layer of a stack whose last slice this was, otherwise None.
        """
        place = self.slices[name]
        num_experts, rows, columns = self._parameters[place.target]
        if place.target not in self._packed:
            self._packed[place.target] = format.empty(num_experts * rows, columns, self._device)
            self._missing[place.target] = set(self._names[place.target])
        first_row = place.expert * rows + place.first_row
        put_rows(self._packed[place.target], num_experts * rows, first_row, packed)
        if order_K is not None:
            matrices = num_experts * rows // place.shape[0]
            own_K = torch.arange(columns, dtype=torch.int32, device=self._device)
            orders = self._orders.setdefault(place.target, own_K.repeat(matrices, 1))
            orders[first_row // place.shape[0]] = order_K
        missing = self._missing[place.target]
        missing.discard(name)
        if missing:
            return None
        whole, order_MK = self._packed.pop(place.target), self._orders.pop(place.target, None)
        layer = QuantizedLinear(whole, format) if order_MK is None else OrderedLinear(whole, format, order_MK)
        return place.target, layer

    def unfinished(self) -> dict[str, list[str]]:
        """Return the parameters with some of their slices, and for each the names of the missing slices."""
        begun = (*self._stacks, *self._packed)
        return {t: [name for name in self._names[t] if name in self._missing[t]] for t in begun}
