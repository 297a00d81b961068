"""The tensors of a published layer come one by one, from several files: kept until a layer has all of its own."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from qwen3fast.checkpoint.prequantized.format import PrequantizedFormat
from qwen3fast.checkpoint.prequantized.layer import PrequantizedLayer, parts
from qwen3fast.checkpoint.prequantized.part import Part


class _Place(NamedTuple):
    """What a tensor of a checkpoint is: a part of what takes the place of a weight."""

    weight: str  # name of the plain weight
    end: str  # of the part's own name
    part: Part


class PrequantizedLayers:
    """Layers, some of which may be stored as `stored` says; which are, the tensors tell. None: no layer is."""

    def __init__(
        self,
        stored: PrequantizedFormat | None,
        weights: dict[str, tuple[int, ...]],
        names: Collection[str],
        device: torch.device,
    ) -> None:
        """weights: names and shapes of plain weights that may be stored so. names: of all tensors that will come."""
        self._stored, self._weights, self._device = stored, weights, device
        self._places: dict[str, _Place] = {}
        self._waited_for: dict[str, set[str]] = {}  # by weight
        self._tensors: dict[str, dict[str, Tensor]] = {}
        for weight, (N, K) in weights.items():
            prefix = weight.removesuffix("weight")
            for end, part in parts(stored, N, K).items() if stored is not None else ():
                name = prefix + end
                self._places[name] = _Place(weight, end, part)
                if not part.is_optional or name in names:
                    self._waited_for.setdefault(weight, set()).add(name)

    def part(self, name: str, dtype: str) -> Part | None:
        """What a tensor of this name and dtype (safetensors' name) must be; None if it is no part of such a layer."""
        place = self._places.get(name)
        if place is None or (name == place.weight and dtype not in place.part.dtypes):
            return None  # in fp8, numbers have the name that a plain weight has, too
        return place.part

    def awaits(self, name: str) -> bool:
        """Whether a part has not come yet."""
        return name in self._waited_for[self._places[name].weight]

    def weight_of(self, name: str) -> str | None:
        """The weight that a tensor of this name is a part of."""
        return self._places[name].weight if name in self._places else None

    def put(self, name: str, tensor: Tensor) -> tuple[str, PrequantizedLayer] | None:
        """Keep a tensor. Returns: the plain weight's name and the layer, with the last of its tensors."""
        assert self._stored is not None, "there are parts of published layers only"
        weight, end, _ = self._places[name]
        tensors = self._tensors.setdefault(weight, {})
        tensors[end] = tensor
        self._waited_for[weight].discard(name)
        if self._waited_for[weight]:
            return None
        on_device = {end: t.to(self._device) for end, t in self._tensors.pop(weight).items()}
        N, K = self._weights[weight]
        return weight, PrequantizedLayer(self._stored, (N, K), on_device)

    def unfinished(self) -> dict[str, list[str]]:
        """Weights of which some parts have come, and the names of those that have not."""
        missing = {weight: self._waited_for[weight] for weight in self._tensors}
        return {weight: [name for name in self._places if name in names] for weight, names in missing.items()}

    def describe(self, name: str) -> str:
        """What is expected under the name of a part."""
        part = self._places[name].part
        return f"shape {part.shape}, {' or '.join(part.dtypes)}"
