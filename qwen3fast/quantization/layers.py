"""Layers with packed weights; each replaces the plain layer of the same name in a model.

K in_features   N out_features
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen3fast.kernels import cpu, cuda
from qwen3fast.kernels.cpu.ops import pack_scales
from qwen3fast.kernels.cpu.structures import RowLimits, bfloat16_scales
from qwen3fast.quantization.formats import LANES, Format, Packed

HIDDEN_ORDER = "hidden_order"
ORDERS = ("input_order", HIDDEN_ORDER)  # of channels; see ordered.py and folding.py
PARAMETER_NAMES = ("weight_packed", "weight_scale", *ORDERS)  # in checkpoints; their dtypes are the format's


def can_use_operations(format: Format, x: Tensor) -> bool:
    """Return whether the C++ operations serve weights of this format on the device of x."""
    return x.device.type == "cpu" and "cpu" in format.devices and cpu.is_loaded()


def load_operations(model: nn.Module) -> None:
    """Load the C++ operations for a model with quantized layers on the CPU; warn if there are none."""
    is_served = any(
        isinstance(layer, QuantizedLinear)
        and layer.weight_packed.device.type == "cpu"
        and "cpu" in layer.format.devices
        for layer in model.modules()
    )
    if is_served and not cpu.load():
        warnings.warn(
            "quantized layers run without the C++ operations, many times slower: install a wheel of qwen3fast for this "
            "machine, or a compiler (Debian, Ubuntu: apt-get install g++), which builds them at the first use",
            stacklevel=2,
        )


def fit_scales(model: nn.Module) -> bool:
    """Store scales of int4 in bytes, in place, where C++ operations read them and these are the same numbers.

    Elsewhere, make them bfloat16 again. Who uses the old tensors keeps them.
    Returns: whether any changed.
    """
    fitted: dict[nn.Parameter, nn.Parameter] = {}  # embedding and output projection may share theirs
    for layer in model.modules():
        if not isinstance(layer, QuantizedLinear | QuantizedEmbedding) or layer.format.name != "int4":
            continue
        if (scale := layer.weight_scale) not in fitted:
            is_served = can_use_operations(layer.format, scale) and cuda.DEVICE_TYPE != "cpu"
            is_stored = scale.dtype == (torch.int8 if is_served else torch.bfloat16)
            other = None if is_stored else pack_scales(scale) if is_served else bfloat16_scales(scale)
            fitted[scale] = scale if other is None else nn.Parameter(other, requires_grad=False)
        layer.weight_scale = fitted[scale]
    return any(other is not scale for scale, other in fitted.items())


class QuantizedLinear(nn.Module):
    """A linear layer with its weight in a packed format (see formats.py).

    limits: the numbers of rows from which other forms take the C++ operation's place; engines set them where those are
    faster (engine/forms.py).
    """

    limits: RowLimits = RowLimits()

    def __init__(self, packed: Packed, format: Format, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.format = format
        self.weight_packed = nn.Parameter(packed.weight, requires_grad=False)
        self.weight_scale = nn.Parameter(packed.scale, requires_grad=False)
        self.register_parameter("bias", bias)

    @property
    def out_features(self) -> int:
        """Return N."""
        return self.weight_packed.shape[0] * LANES

    @property
    def in_features(self) -> int:
        """Return K."""
        return self.format.in_features(self.packed)

    def forward(self, x: Tensor) -> Tensor:
        """Return the product, (..., N) in the dtype of x, (..., K).

        The C++ operation also quantizes x to 8 bits, except for fp8 and lossless: in groups of 32 channels, by AMX's
        tiles of int8 in groups of 256, as are weights of fewer bits there. Other forms do not. In each form on the CPU,
        a row's result does not depend on the values in the rows beside it.
        """
        [y] = self.forward_together(x, [self])
        return y

    @classmethod
    def forward_together(cls, x: Tensor, layers: Sequence[QuantizedLinear]) -> list[Tensor]:
        """Return each layer's product with the same x, (..., K), from one call: one (..., N) per layer, same dtype."""
        if any(layer.limits != layers[0].limits for layer in layers):
            return [y for layer in layers for y in QuantizedLinear.forward_together(x, [layer])]
        if all(can_use_operations(layer.format, x) for layer in layers):
            y = torch.ops.qwen3fast.quantized_linear(
                x.bfloat16(),
                [layer.weight_packed for layer in layers],
                [layer.format.operands(layer.packed).scale for layer in layers],
                layers[0].limits,
            )
            parts = y.to(x.dtype).split([layer.out_features for layer in layers], dim=-1)
        elif cuda.can_packed_matvec(x) and all("cuda" in layer.format.devices for layer in layers):
            parts = [layer._few_rows(x) for layer in layers]
        else:
            parts = [F.linear(x, layer.format.dequantize(layer.packed).to(x.dtype)) for layer in layers]
        return [y if layer.bias is None else y + layer.bias for y, layer in zip(parts, layers, strict=True)]

    def _few_rows(self, x: Tensor) -> Tensor:
        x_MK, is_fp8 = x.reshape(-1, x.shape[-1]), self.format.name == "fp8"
        y_CMN: Tensor = torch.ops.qwen3fast.packed_matvec(x_MK, self.weight_packed, self.weight_scale, is_fp8)
        return y_CMN.sum(0).to(x.dtype).view(*x.shape[:-1], -1)

    @property
    def packed(self) -> Packed:
        """Return the weight as its format stores it."""
        return Packed(self.weight_packed, self.weight_scale)

    def rows(self, row_R: Tensor) -> Tensor:
        """Return dequantized rows of the weight, (R, K) float32. row_R: int64."""
        return self.format.rows(self.packed, row_R)

    def dequantize(self) -> Tensor:
        """Return the dequantized weight, (N, K) float32."""
        return self.rows(torch.arange(self.out_features, device=self.weight_packed.device))


class QuantizedEmbedding(nn.Module):
    """A token embedding with packed rows; it may share them with the output projection."""

    def __init__(self, linear: QuantizedLinear, dtype: torch.dtype) -> None:
        super().__init__()
        self.format, self.dtype = linear.format, dtype
        self.weight_packed, self.weight_scale = linear.weight_packed, linear.weight_scale

    def forward(self, token_BT: Tensor) -> Tensor:
        """Return the rows of token_BT, int64 ids: (B, T, K) in `dtype`."""
        packed = Packed(self.weight_packed, self.weight_scale)
        if self.dtype == torch.bfloat16 and can_use_operations(self.format, token_BT):
            rows: Tensor = torch.ops.qwen3fast.quantized_rows(*self.format.operands(packed), token_BT.flatten())
        else:
            rows = self.format.rows(packed, token_BT.flatten())
        return rows.to(self.dtype).view(*token_BT.shape, -1)
