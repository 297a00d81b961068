"""Replace a model's layers by quantized ones: filled from its weights, or empty, to be loaded."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from huggingface_hub.utils.tqdm import tqdm
from torch import Tensor, nn

from qwen3fast.kernels import cpu
from qwen3fast.model import MoE, Qwen3
from qwen3fast.model.moe import Experts
from qwen3fast.quantization.experts import QuantizedExperts
from qwen3fast.quantization.formats import ALL_FORMATS, Format, fits, quantize
from qwen3fast.quantization.layers import QuantizedEmbedding, QuantizedLinear

DEQUANTIZE = "dequantize"  # the `quantization` that loads plain weights of a checkpoint that others quantized


def quantize_model(
    model: Qwen3,
    name: str | Format,
    dtype: torch.dtype,
    progress: bool = False,
    modules_to_not_convert: Collection[str] = (),
) -> None:
    """Replace the model's linear layers, experts and token embedding by quantized ones, in place, one after another.

    On the `meta` device the new layers are empty, for a checkpoint that is quantized already. Layers whose shape cannot
    be packed stay plain, and so do routers: they are small, and their choice of experts matters.

    name: of one of `ALL_FORMATS`, or a format. dtype: of activations, which the embedding returns.
    progress: show a bar.
    modules_to_not_convert: names of layers and experts that stay plain.
    Raises: ValueError for an unknown format.
    """
    format = name if isinstance(name, Format) else get_format(name)
    names = set(plain_modules(model, format)) - set(modules_to_not_convert)
    convertible = {n: module for n, module in model.named_modules() if n in names}
    layers: list[tuple[str, nn.Module]] = [(n, model.get_submodule(n)) for n in plain_experts(model)]
    layers = [(n, m) for n, m in layers if n not in modules_to_not_convert]
    layers += [(n, m) for n, m in convertible.items() if isinstance(m, nn.Linear)]
    for layer_name, layer in tqdm(layers, desc=f"quantizing to {format.name}", unit="layer", disable=not progress):
        if isinstance(layer, Experts):
            quantize_experts(model, format, layer_name)
        else:
            model.set_submodule(layer_name, _quantized(layer.weight, format, layer.bias))
    embedding = model.model.embed_tokens
    if model.config.tie_word_embeddings and isinstance(model.lm_head, QuantizedLinear):
        model.set_submodule("model.embed_tokens", QuantizedEmbedding(model.lm_head, dtype))
    elif "model.embed_tokens" in convertible:
        model.set_submodule("model.embed_tokens", QuantizedEmbedding(_quantized(embedding.weight, format), dtype))


def formats_of(model: Qwen3) -> list[str]:
    """Return the names of the formats that the model's quantized layers are in; an empty list without such layers."""
    layers = (module for module in model.modules() if isinstance(module, QuantizedLinear | QuantizedEmbedding))
    return sorted({layer.format.name for layer in layers})


def plain_modules(model: Qwen3, format: Format | None = None) -> tuple[str, ...]:
    """Return the names of plain layers that could be quantized: linear ones, without routers, and the embedding.

    format: None for any.
    """
    routers = {module.gate for module in model.modules() if isinstance(module, MoE)}
    plain = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding) and m not in routers]
    fit = fits if format is None else format.fits
    return tuple(name for name, module in plain if fit(*module.weight.shape))


def plain_experts(model: Qwen3) -> tuple[str, ...]:
    """Return the names of plain modules of experts."""
    return tuple(name for name, module in model.named_modules() if isinstance(module, Experts))


def prepare_quantization(name: str, device: torch.device, folder: Path | None = None) -> None:
    """Check that a format can run on a device, before any weight is read, and build its operations.

    folder: whose weights are in this format already; None if they are to be quantized.
    Raises: ValueError for an unknown format, or a device that it has no kernels for; for lossless, without the C++
    operations.
    """
    format = get_format(name)
    if device.type not in format.devices and folder is not None:
        raise ValueError(
            f"{folder} has weights in {name}, which run on {' and '.join(format.devices)} devices, not on {device}; "
            "use device='cpu', or load the checkpoint that they come from"
        )
    if device.type not in format.devices:
        others = [other.name for other in ALL_FORMATS.values() if device.type in other.devices]
        raise ValueError(
            f"quantization={name!r} runs on {' and '.join(format.devices)} devices, not on {device}; "
            + (f"there, use {' or '.join(others)}" if others else "use device='cpu'")
        )
    if device.type == "cpu" and not cpu.load() and format.is_lossless:
        raise ValueError(
            f"quantization={name!r} needs the C++ operations: install a wheel of qwen3fast for this machine, or a "
            "compiler (Debian, Ubuntu: apt-get install g++), which builds them"
        )


def quantize_assigned(model: Qwen3, name: str | Format, module_name: str) -> None:
    """Replace a linear layer or experts with all of their weights by quantized ones, unless they are to stay plain.

    Loaders call it for each module that was assigned a weight: only one layer is then in memory unquantized.
    Raises: ValueError for an unknown format.
    """
    module = model.get_submodule(module_name)
    format = name if isinstance(name, Format) else get_format(name)
    if not isinstance(module, nn.Linear):
        return quantize_experts(model, format, module_name)
    is_router = isinstance(model.get_submodule(module_name.rpartition(".")[0]), MoE)
    is_whole = not any(parameter.is_meta for parameter in module.parameters())
    if is_whole and not is_router and format.fits(*module.weight.shape):
        model.set_submodule(module_name, _quantized(module.weight, format, module.bias))


def quantize_experts(model: Qwen3, name: str | Format, module_name: str) -> None:
    """Replace a module by quantized experts, if it is `Experts` with all of their weights and can be packed.

    Raises: ValueError for an unknown format.
    """
    experts = model.get_submodule(module_name)
    format = name if isinstance(name, Format) else get_format(name)
    if isinstance(experts, Experts) and all(format.fits(*w.shape[1:]) for w in experts.parameters()):
        num_empty = sum(weight.is_meta for weight in experts.parameters())
        if num_empty in (0, 2):
            model.set_submodule(module_name, QuantizedExperts.of(experts, format))


def get_format(name: str) -> Format:
    """Return the format of this name.

    Raises: ValueError with the supported names.
    """
    if name not in ALL_FORMATS:
        raise ValueError(
            f"quantization={name!r} is not supported; supported: {', '.join(ALL_FORMATS)}, or None; for checkpoints "
            f"that others quantized also {DEQUANTIZE!r}"
        )
    return ALL_FORMATS[name]


def _quantized(weight: Tensor, format: Format, bias: nn.Parameter | None = None) -> QuantizedLinear:
    packed = (
        format.empty(weight.shape[0], weight.shape[1], weight.device) if weight.is_meta else quantize(weight, format)
    )
    return QuantizedLinear(packed, format, bias)
