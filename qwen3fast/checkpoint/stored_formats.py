"""The formats of the layers in a folder that `save_quantized` wrote: its tensors tell them, layer by layer.

config.json names the format of most layers. A model that was loaded from a mixture (such as Q4_K_M of GGUF) has
several formats, and uint4 and fp8 have several layouts of scales.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple

from torch import nn

from qwen3fast.checkpoint.safetensors import open_tensors, tensors_by_file
from qwen3fast.model import FeedForward, Qwen3
from qwen3fast.quantization.convert import get_format
from qwen3fast.quantization.formats import Format
from qwen3fast.quantization.fp8 import scale_shape
from qwen3fast.quantization.layers import HIDDEN_ORDER, ORDERS, QuantizedEmbedding, QuantizedLinear
from qwen3fast.quantization.ordered import OrderedLinear, empty_order
from qwen3fast.quantization.uint4 import Layout, is_layout


class StoredScale(NamedTuple):
    """The scales of a layer in a file; dtype: as safetensors spells it."""

    shape: tuple[int, ...]
    dtype: str


def use_stored_formats(model: Qwen3, folder: Path) -> None:
    """Replace empty quantized layers of a model (on meta) that the folder holds in another format, or with an order.

    Orders of hidden units become parameters of the model.
    Raises: FileNotFoundError or ValueError for missing or damaged files.
    """
    scales, orders = _scales_in(folder)
    for name, module in list(model.named_modules()):
        if isinstance(module, FeedForward) and f"{name}.{HIDDEN_ORDER}" in orders:
            module.register_parameter(HIDDEN_ORDER, empty_order(module.down_proj.in_features))
        if not isinstance(module, QuantizedLinear | QuantizedEmbedding) or f"{name}.weight_scale" not in scales:
            continue
        stored = scales[f"{name}.weight_scale"]
        sizes = module.weight_packed.shape[0] * 16, module.weight_packed.shape[1] * 32 // module.format.bits
        format = _format_of(stored, sizes, module.format)
        has_order = f"{name}.input_order" in orders
        if format is None and not has_order:
            continue
        format = format or module.format
        linear = QuantizedLinear(format.empty(*sizes, "meta"), format, getattr(module, "bias", None))
        if isinstance(module, QuantizedLinear):
            matrices = 2 * model.config.num_experts if ".experts." in name else 0
            model.set_submodule(name, OrderedLinear.empty_like(linear, matrices) if has_order else linear)
            continue
        model.set_submodule(name, QuantizedEmbedding(linear, module.dtype))
        if model.config.tie_word_embeddings:
            model.set_submodule("lm_head", linear)


def _format_of(stored: StoredScale, sizes: tuple[int, int], own: Format) -> Format | None:
    """Return the format that scales of an (N, K) weight belong to; None if it is the layer's own, or none."""
    if stored.dtype == "U8" and is_layout(stored.shape, *sizes):
        layout = Layout.of_shape(stored.shape, sizes[1])
        return get_format("uint4").with_layout(lambda _: layout)
    if stored.dtype == "F32" and stored.shape == scale_shape(*sizes, has_blocks=True):
        return get_format("fp8").with_blocks()
    if stored.dtype == "F32" and len(stored.shape) == 1 and own.bits == 4:
        return get_format("int8")
    if stored.dtype == "BF16" and len(stored.shape) == 3 and own.name != "int4":
        return get_format("int4")
    return None


def _scales_in(folder: Path) -> tuple[dict[str, StoredScale], set[str]]:
    """Return the scales in the files by name, and the names of orders of channels."""
    found, orders = {}, set()
    for file, names in tensors_by_file(folder).items():
        with open_tensors(file) as tensors:
            for name in {*names} & {*tensors.keys()}:
                if name.endswith(".weight_scale"):
                    stored = tensors.get_slice(name)
                    found[name] = StoredScale(tuple(stored.get_shape()), stored.get_dtype())
                elif name.endswith(ORDERS):
                    orders.add(name)
    return found, orders


def main_format(model: nn.Module) -> str | None:
    """Return the format that config.json names: the most frequent one of a model's layers; None for a plain model.

    Scales per row are of int8 or fp8, which only the name tells apart: beside fp8, it is the name of their format.
    Raises: ValueError if layers of both formats have scales per row, and for formats that are not saved.
    """
    formats = [m.format for m in model.modules() if isinstance(m, QuantizedLinear | QuantizedEmbedding)]
    for format in formats:
        if format.is_lossless:
            raise ValueError(f"{format.name} weights are not saved; the checkpoint that they come from has the same")
    names = [format.name for format in formats]
    by_rows = {format.name for format in formats if format.bits == 8 and not format.has_blocks}
    if len(by_rows) > 1:
        raise ValueError(f"a model with layers in {' and '.join(sorted(by_rows))} cannot be saved: they look alike")
    if "fp8" in names and by_rows:
        return by_rows.pop()
    return Counter(names).most_common(1)[0][0] if names else None
