"""Several linear layers that read the same input, such as query, key and value."""

from __future__ import annotations

from torch import Tensor, nn


def linears(x: Tensor, *layers: nn.Module) -> list[Tensor]:
    """Return the outputs, (..., out_features) each, of several layers for one x, (..., in_features).

    Layers of one type that has a class method `forward_together` share a call: quantized layers then quantize x once.
    """
    kind = type(layers[0])
    if hasattr(kind, "forward_together") and all(type(layer) is kind for layer in layers):
        outputs: list[Tensor] = kind.forward_together(x, list(layers))
        return outputs
    return [layer(x) for layer in layers]
