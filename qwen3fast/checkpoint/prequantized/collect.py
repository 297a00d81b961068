"""Gather the tensors of prequantized layers, which come one by one from several files."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from qwen3fast.checkpoint.prequantized.format import ExpectedTensor, PrequantizedFormat
from qwen3fast.checkpoint.prequantized.layer import PrequantizedLayer, expected_tensors


class _Place(NamedTuple):
    """A tensor's place in a layer: the name of the plain weight, the end of the tensor's name, the expected tensor."""

    weight: str
    end: str
    expected: ExpectedTensor


class PrequantizedLayers:
    """Layers that may be stored in a format; the names of their tensors decide. None: no layer is.

    Attributes:
        stored: names of the plain weights that come in the format.
    """

    def __init__(
        self,
        stored: PrequantizedFormat | None,
        weights: dict[str, tuple[int, ...]],
        names: Collection[str],
        device: torch.device,
    ) -> None:
        """weights: names and shapes of plain weights that may be stored so. names: of all tensors that will come.

        A shape (X, N, K) is one of stacked experts, which become one tall layer (X * N, K).
        """
        self._stored, self._weights, self._device = stored, weights, device
        self._places: dict[str, _Place] = {}
        self._missing: dict[str, set[str]] = {}  # by weight
        self._tensors: dict[str, dict[str, Tensor]] = {}
        self.stored: set[str] = set()
        for weight, shape in weights.items():
            prefix = weight.removesuffix("weight")
            for end, tensor in expected_tensors(stored, *shape).items() if stored is not None else ():
                name = prefix + end
                self._places[name] = _Place(weight, end, tensor)
                if name in names and name != weight:
                    self.stored.add(weight)
                if not tensor.is_optional or name in names:
                    self._missing.setdefault(weight, set()).add(name)

    def expected(self, name: str, dtype: str) -> ExpectedTensor | None:
        """Return the expected tensor of this name and dtype; None if it belongs to no prequantized layer."""
        place = self._places.get(name)
        if place is None or (name == place.weight and dtype not in place.expected.dtypes):
            return None  # in fp8 the quantized weight has the plain weight's name
        return place.expected

    def awaits(self, name: str) -> bool:
        """Return whether a tensor has not come yet."""
        return name in self._missing[self._places[name].weight]

    def weight_of(self, name: str) -> str | None:
        """Return the plain weight that a tensor of this name belongs to."""
        return self._places[name].weight if name in self._places else None

    def put(self, name: str, tensor: Tensor) -> tuple[str, PrequantizedLayer] | None:
        """Keep a tensor.

        Returns: the plain weight's name and the layer with the last of its tensors, otherwise None.
        """
        assert self._stored is not None, "only prequantized layers have tensors to keep"
        weight, end, _ = self._places[name]
        tensors = self._tensors.setdefault(weight, {})
        tensors[end] = tensor
        self._missing[weight].discard(name)
        if self._missing[weight]:
            return None
        on_device = {end: t.to(self._device) for end, t in self._tensors.pop(weight).items()}
        *stack, N, K = self._weights[weight]
        if stack:
            N, on_device = stack[0] * N, {f"weight{end}": t.flatten(0, 1) for end, t in on_device.items()}
        return weight, PrequantizedLayer(self._stored, (N, K), on_device)

    def unfinished(self) -> dict[str, list[str]]:
        """Return the weights with some of their tensors, and for each the names of the missing tensors."""
        missing = {weight: self._missing[weight] for weight in self._tensors}
        return {weight: [name for name in self._places if name in names] for weight, names in missing.items()}

    def describe(self, name: str) -> str:
        """Return the shape and dtypes that are expected under a name, in words."""
        tensor = self._places[name].expected
        return f"shape {tensor.shape}, {' or '.join(tensor.dtypes)}"
