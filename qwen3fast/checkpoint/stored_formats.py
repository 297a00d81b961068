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
from qwen3fast.quantization.formats import FOR_CPUS, GROUP, SHORT_NL4, Format
from qwen3fast.quantization.fp8 import scale_shape
from qwen3fast.quantization.layers import HIDDEN_ORDER, ORDERS, QuantizedEmbedding, QuantizedLinear
from qwen3fast.quantization.ordered import OrderedLinear, empty_order
from qwen3fast.quantization.uint4 import Layout, is_layout

UINT5 = get_format("uint5")
# Formats that their tensors' shapes tell apart from all others.
WITH_OTHER_SHAPES = (
    *FOR_CPUS.values(),
    SHORT_NL4,
    UINT5.with_layout(lambda _: Layout(GROUP, has_zero=True)),
    UINT5.with_layout(lambda _: Layout(GROUP)),
)


class StoredShape(NamedTuple):
    """A tensor in a file; dtype: as safetensors spells it."""

    shape: tuple[int, ...]
    dtype: str


def use_stored_formats(model: Qwen3, folder: Path) -> None:
    """Replace empty quantized layers of a model (on meta) that the folder holds in another format, or with an order.

    Orders of hidden units become parameters of the model.
    Raises: FileNotFoundError or ValueError for missing or damaged files.
    """
    weights, scales, orders = _packed_in(folder)
    for name, module in list(model.named_modules()):
        if isinstance(module, FeedForward) and f"{name}.{HIDDEN_ORDER}" in orders:
            module.register_parameter(HIDDEN_ORDER, empty_order(module.down_proj.in_features))
        if not isinstance(module, QuantizedLinear | QuantizedEmbedding) or f"{name}.weight_scale" not in scales:
            continue
        sizes = module.weight_packed.shape[0] * 16, module.weight_packed.shape[1] * 32 // module.format.bits
        format = _format_of(weights.get(f"{name}.weight_packed"), scales[f"{name}.weight_scale"], sizes, module.format)
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


def _format_of(weight: StoredShape | None, stored: StoredShape, sizes: tuple[int, int], own: Format) -> Format | None:
    """Return the format that an (N, K) weight and its scales belong to; None if it is the layer's own, or none."""
    for format in WITH_OTHER_SHAPES:
        if format.fits(*sizes) and weight is not None and stored.dtype == "U8":
            shapes = [tuple(tensor.shape) for tensor in format.empty(*sizes, "meta")]
            if shapes == [weight.shape, stored.shape]:
                return None if format == own else format
    if stored.dtype == "U8" and is_layout(stored.shape, *sizes):
        layout = Layout.of_shape(stored.shape, sizes[1])
        return get_format("uint4").with_layout(lambda _: layout)
    if stored.dtype == "F32" and stored.shape == scale_shape(*sizes, has_blocks=True):
        return get_format("fp8").with_blocks()
    if stored.dtype == "F32" and len(stored.shape) == 1 and own.bits != 8:
        return get_format("int8")
    if stored.dtype == "BF16" and len(stored.shape) == 3 and own.name != "int4":
        return get_format("int4")
    return None


def _packed_in(folder: Path) -> tuple[dict[str, StoredShape], dict[str, StoredShape], set[str]]:
    """Return packed weights and scales in the files by name, and the names of orders of channels."""
    weights: dict[str, StoredShape] = {}
    scales: dict[str, StoredShape] = {}
    orders = set()
    for file, names in tensors_by_file(folder).items():
        with open_tensors(file) as tensors:
            for name in {*names} & {*tensors.keys()}:
                if name.endswith((".weight_packed", ".weight_scale")):
                    stored = tensors.get_slice(name)
                    found = scales if name.endswith("scale") else weights
                    found[name] = StoredShape(tuple(stored.get_shape()), stored.get_dtype())
                elif name.endswith(ORDERS):
                    orders.add(name)
    return weights, scales, orders


def main_format(model: nn.Module) -> str | None:
    """Return the format that config.json names, None for a plain model: the most frequent one that fits all its layers.

    Scales per row are of int8 or fp8, which only the name tells apart: beside fp8, it is the name of their format.
    Raises: ValueError if layers of both formats have scales per row, and for formats that are not saved.
    """
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear | QuantizedEmbedding)]
    formats = [layer.format for layer in layers]
    for format in formats:
        if format.is_lossless:
            raise ValueError(f"{format.name} weights are not saved; the checkpoint that they come from has the same")
    names = [format.name for format in formats]
    by_rows = {format.name for format in formats if format.bits == 8 and not format.has_blocks}
    if len(by_rows) > 1:
        both = " and ".join(sorted(by_rows))
        raise ValueError(f"a model with layers in {both} cannot be saved: a file would not tell the two formats apart")
    if "fp8" in names and by_rows:
        return by_rows.pop()
    channels = {layer.weight_packed.shape[1] * 32 // layer.format.bits for layer in layers}
    fitting = [name for name in names if all(K % get_format(name).multiple == 0 for K in channels)]
    if names and not fitting and FOR_CPUS.keys() >= set(names):  # such as a file in Q5_0 alone
        return "uint4"  # fits them; the tensors tell the rest
    return Counter(fitting or names).most_common(1)[0][0] if names else None
