"""Stacked weights: the layers of a block with the same input share one tall weight, for one product instead of several.

The layers keep their names and parameters, which become views of the stacked weight: no weight is stored twice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# Submodules of a block, and their stacked layers, from top to bottom.
STACKS = {"self_attn": ("q_proj", "k_proj", "v_proj"), "mlp": ("gate_proj", "up_proj")}


def can_stack(layers: Sequence[nn.Module]) -> bool:
    """Return whether the layers have one type, one format and no biases, and their parameters can be stacked."""
    kinds = {
        (
            type(layer),
            getattr(getattr(layer, "format", None), "name", None),  # int8 and fp8 have the same shapes and dtypes
            tuple((n, p.shape[1:], p.dtype, p.device) for n, p in layer.named_parameters()),
        )
        for layer in layers
    }
    return len(kinds) == 1 and all(getattr(layer, "bias", None) is None for layer in layers)


def stack(layers: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Return the layers' parameters, stacked in order, by name.

    The layers' own parameters become views of the stacked ones. Layers that are stacked already do not change.
    """
    stacked = {}
    for name, _ in layers[0].named_parameters():
        parts = [layer.get_parameter(name) for layer in layers]
        whole = _whole(parts)
        if whole is None:
            whole = torch.cat([part.detach() for part in parts])
            for layer, part in zip(layers, whole.split([len(part) for part in parts]), strict=True):
                setattr(layer, name, nn.Parameter(part, requires_grad=False))
        stacked[name] = whole
    return stacked


def stack_layers(model: nn.Module) -> None:
    """Stack all of a model's layers that can be stacked.

    The first layer keeps their weight, if it can use it (`stacked` of kernels/linear.py).
    """
    for module in list(model.modules()):
        for names in STACKS.values():
            layers = [layer for name in names if isinstance(layer := getattr(module, name, None), nn.Module)]
            if len(layers) == len(names) and can_stack(layers):
                whole = stack(layers)
                if hasattr(layers[0], "stacked"):
                    layers[0].stacked = whole["weight"]


def _whole(parts: Sequence[Tensor]) -> Tensor | None:
    """Return the tensor that these parts make up, if they are adjacent in the same memory; otherwise None."""
    first, offset = parts[0], parts[0].storage_offset()
    if any(part.untyped_storage()._cdata != first.untyped_storage()._cdata for part in parts):
        return None
    for part in parts:
        if part.storage_offset() != offset or not part.is_contiguous():
            return None
        offset += part.numel()
    return first.detach().as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride(), first.storage_offset())
