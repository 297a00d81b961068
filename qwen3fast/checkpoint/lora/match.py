"""Match the tensors of an adapter's file with the modules of a model.

N out_features   K in_features   R rank   V vocabulary   E hidden_size
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from qwen3fast.checkpoint.checks import refuse
from qwen3fast.checkpoint.lora.config import LoraConfig
from qwen3fast.model import Qwen3, RMSNorm
from qwen3fast.quantization.layers import QuantizedLinear

PREFIX = "base_model.model."  # PEFT's wrappers around the model
# Some versions of PEFT and some trainers write the adapter's name, "default" as a rule, into the tensors' names.
TENSOR_NAME = re.compile(r"base_model\.model\.(.+)\.lora_(embedding_)?([AB])(\.[^.]+)?(?(2)|\.weight)")
SAVED_NAME = re.compile(r"base_model\.model\.(.+?)(\.modules_to_save(\.[^.]+)?)?\.weight")
# PEFT writes the base model's weight itself beside an adapter of embedding or output projection.
COPY_NAME = re.compile(r"base_model\.model\.(lm_head|(?:model\.)?embed_tokens)\.base_layer\.weight")
Shape = tuple[int, ...]
PlainLayer = nn.Linear | nn.Embedding | RMSNorm
Layer = PlainLayer | QuantizedLinear


class LayerAdapter(NamedTuple):
    """One module's adapter: the names of its tensors in the file, and the scale of their product.

    whole: the name of a tensor that replaces the weight (`modules_to_save`); a and b are empty then.
    """

    module: str
    a: str
    b: str
    scale: float
    whole: str = ""


def layers_of(model: Qwen3) -> dict[str, PlainLayer]:
    """Return the modules that a merged adapter may change, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PlainLayer)}


def match_tensors(config: LoraConfig, layers: Mapping[str, Layer], shapes: dict[str, Shape]) -> list[LayerAdapter]:
    """Return the adapters whose tensors are in a file. shapes: of all of its tensors, by name.

    Raises: ValueError naming all tensors that are missing, unexpected or misshaped.
    """
    return _Matcher(config, layers, shapes).match()


class _Matcher:
    """Modules by an adapter's names for them, and the tensors found for each."""

    def __init__(self, config: LoraConfig, layers: Mapping[str, Layer], shapes: dict[str, Shape]) -> None:
        # Adapters of a Qwen3Model (for embeddings) leave "model." out, in the file and for the patterns of the config.
        is_bare = any(name.startswith((f"{PREFIX}layers.", f"{PREFIX}embed_tokens.")) for name in shapes)
        self._layers, self._shapes = layers, shapes
        self._modules = {module.removeprefix("model.") if is_bare else module: module for module in layers}
        self._targets = [own for own, module in self._modules.items() if not isinstance(layers[module], RMSNorm)]
        self._config = config.for_modules(self._targets)
        self._found: dict[str, dict[str, str]] = {}
        self._saved: dict[str, str] = {}
        self._problems: list[str] = []

    def match(self) -> list[LayerAdapter]:
        for name, shape in self._shapes.items():
            if (problem := self._place(name, shape)) is not None:
                self._problems.append(f"{name}: {problem}")
        for own in self._targets:
            if own in self._found or self._config.targets(own):
                sides = [side for side in "AB" if side not in self._found.get(own, {})]
                is_embedding = isinstance(self._layers[self._modules[own]], nn.Embedding)
                end = "lora_embedding_{}" if is_embedding else "lora_{}.weight"
                self._problems += [f"{PREFIX}{own}.{end.format(side)}: missing" for side in sides]
        for own in self._modules:
            if self._config.saves(own) and own not in self._saved:
                self._problems.append(f"{PREFIX}{own}.weight: missing, modules_to_save names it")
        if not self._shapes:
            self._problems.append("it holds no tensors")
        refuse(self._problems, "the adapter's tensors do not fit the model and adapter_config.json")
        saved = [LayerAdapter(self._modules[own], "", "", 1.0, name) for own, name in self._saved.items()]
        scale = self._config.scale
        return saved + [LayerAdapter(self._modules[own], s["A"], s["B"], scale(own)) for own, s in self._found.items()]

    def _place(self, name: str, shape: Shape) -> str | None:
        """Record the module that a tensor belongs to. Returns: the problem with it, if any."""
        match, saved, expected = TENSOR_NAME.fullmatch(name), SAVED_NAME.fullmatch(name), None
        if match is not None and match[1] in self._targets:
            layer = self._layers[self._modules[match[1]]]
            if isinstance(layer, nn.Embedding) == bool(match[2]):
                self._found.setdefault(match[1], {})[match[3]] = name
                expected = _expected_shape(layer, match[3], self._config.rank(match[1]))
        elif match is None and saved is not None and self._config.saves(saved[1]) and saved[1] in self._modules:
            self._saved[saved[1]] = name
            expected = _weight_shape(self._layers[self._modules[saved[1]]])
        if expected is None:
            return "unexpected, this model has no place for it"
        return None if shape == expected else f"shape {shape}, expected {expected}"


def _expected_shape(layer: Layer, side: str, rank: int) -> Shape:
    """Return the shape of A, (R, K) or for an embedding (R, V), or of B, (N, R) or for an embedding (E, R)."""
    rows, columns = _weight_shape(layer)
    if isinstance(layer, nn.Embedding):
        rows, columns = columns, rows
    return (rank, columns) if side == "A" else (rows, rank)


def _weight_shape(layer: Layer) -> Shape:
    """Return the shape of a layer's weight, dequantized."""
    if isinstance(layer, QuantizedLinear):
        return (layer.out_features, layer.in_features)
    weight: Tensor = layer.weight
    return tuple(weight.shape)
