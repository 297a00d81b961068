"""A model's layers replaced by quantised ones: filled from the weights at hand, or left empty to be loaded."""

from __future__ import annotations

from dataclasses import replace

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor, nn

from qwen3fast.config import ModelConfig
from qwen3fast.kernels import cpu
from qwen3fast.model import Qwen3
from qwen3fast.quantization.formats import FORMATS, Format, fits, quantize
from qwen3fast.quantization.linear import QuantizedEmbedding, QuantizedLinear

DEQUANTIZE = "dequantize"  # what users ask for to get plain weights of a checkpoint that others quantised


def quantize_model(model: Qwen3, name: str, dtype: torch.dtype, progress: bool = False) -> None:
    """Replace the model's linear layers and token embedding by quantised ones, in place, one after the other.

    name: "int8", "int4" or "fp8". dtype: that of activations, which the embedding gives. On the `meta` device the
    new layers are empty, too, for a checkpoint that is quantised already. Layers whose shape cannot be packed stay as
    they are.
    Raises: ValueError for an unknown format, or a model with experts.
    """
    format = get_format(name)
    refuse_experts(model.config, name)
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and fits(*m.weight.shape)]
    for layer_name, layer in tqdm(layers, desc=f"quantizing to {name}", unit="layer", disable=not progress):
        model.set_submodule(layer_name, _quantized(layer.weight, format, layer.bias))
    model.config = replace(model.config, quantization=name)
    embedding = model.model.embed_tokens
    if model.config.tie_word_embeddings and isinstance(model.lm_head, QuantizedLinear):
        model.set_submodule("model.embed_tokens", QuantizedEmbedding(model.lm_head, dtype))
    elif fits(*embedding.weight.shape):
        model.set_submodule("model.embed_tokens", QuantizedEmbedding(_quantized(embedding.weight, format), dtype))


def prepare_quantization(name: str, device: torch.device) -> None:
    """Check that a format can run on a device, before any weight is read, and build its operations.

    Raises: ValueError for an unknown format, or a device that it has no kernels for.
    """
    format = get_format(name)
    if device.type not in format.devices:
        others = [other.name for other in FORMATS.values() if device.type in other.devices]
        raise ValueError(
            f"quantization={name!r} runs on {' and '.join(format.devices)} devices, not on {device}; "
            + (f"there, use {' or '.join(others)}" if others else "use device='cpu'")
        )
    if device.type == "cpu":
        cpu.load()


def refuse_experts(config: ModelConfig, name: str | None) -> None:
    """Refuse a format for a model whose weights, experts', have no quantised form yet; None is no format.

    Raises: ValueError.
    """
    if name is not None and config.num_experts:
        raise ValueError(
            f"quantization={name!r} is not supported for a mixture of experts ({config.num_experts} experts) yet; "
            "use quantization=None"
        )


def get_format(name: str) -> Format:
    """The format of that name.

    Raises: ValueError naming those there are.
    """
    if name not in FORMATS:
        raise ValueError(
            f"quantization={name!r} is not supported; supported: {', '.join(FORMATS)}, or None; of checkpoints that "
            f"others quantised also {DEQUANTIZE!r}"
        )
    return FORMATS[name]


def _quantized(weight: Tensor, format: Format, bias: nn.Parameter | None = None) -> QuantizedLinear:
    packed = (
        format.empty(weight.shape[0], weight.shape[1], weight.device) if weight.is_meta else quantize(weight, format)
    )
    return QuantizedLinear(packed, format, bias)
