"""Merge a LoRA adapter: adapter_model.safetensors holds two thin matrices per module, whose product is added.

Source: LoRA, arXiv:2106.09685, equation 3.

N out_features   K in_features   R rank
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qwen3fast.checkpoint.assign import assign
from qwen3fast.checkpoint.checks import refuse
from qwen3fast.checkpoint.lora.files import find_adapter, refuse_numbers
from qwen3fast.checkpoint.lora.match import COPY_NAME, LayerAdapter, PlainLayer, layers_of, match_tensors
from qwen3fast.checkpoint.safetensors import open_tensors
from qwen3fast.model import Qwen3
from qwen3fast.quantization.layers import QuantizedEmbedding, QuantizedLinear

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


def merge_lora(model: Qwen3, source: str | Path, check_weights: bool = False) -> None:
    """Add a PEFT adapter's scale * B @ A to the weights of `model`, computed in float32 and rounded once.

    Modules in `modules_to_save` are replaced. An adapter that changes only one of embedding and output projection
    unties them, unless it says ensure_weight_tying. Changed weights are new tensors: memory-mapped ones stay as they
    are on disk. On an error nothing changes.

    source: a folder in PEFT's layout, or a hub id. check_weights: refuse NaN and infinity in the adapter.
    Raises: FileNotFoundError for missing files; ValueError for a quantized model, unsupported features, and tensors
    that are missing, unexpected, misshaped or of a wrong dtype, all named in one message.
    """
    kinds = (QuantizedLinear, QuantizedEmbedding)  # of experts, which no adapter changes, it does not matter
    quantized = [m.format.name for n, m in model.named_modules() if isinstance(m, kinds) and ".experts." not in n]
    if quantized:
        raise ValueError(f"an adapter needs the original weights; these are in {quantized[0]} already")
    config, file = find_adapter(source)
    layers = layers_of(model)
    with open_tensors(file) as tensors:
        shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        copies = [name for name in shapes if COPY_NAME.fullmatch(name)]
        different = [name for name in copies if not _is_copy(tensors, name, layers)]
        problems = [f"{name}: differs from the model's; the adapter is for another one" for name in different]
        refuse(problems, "the adapter's tensors do not fit the model and adapter_config.json")
        adapters = match_tensors(config, layers, {name: shapes[name] for name in shapes if name not in copies})
        refuse_numbers(tensors, list(shapes), file, check_weights)
        changed = {adapter.module for adapter in adapters} & {EMBEDDING, HEAD}
        if changed and not (config.ensure_weight_tying and changed == {EMBEDDING}):
            _untie(model)
        for adapter in adapters:
            assign(model, f"{adapter.module}.weight", _new_weight(tensors, adapter, layers[adapter.module]))
    model.tie_weights()


def merged(weight_NK: Tensor, a_RK: Tensor, b_NR: Tensor, scale: float) -> Tensor:
    """Return weight + scale * B @ A as a new tensor of the weight's dtype; A and B are in float32."""
    return torch.addmm(weight_NK.detach().float(), b_NR, a_RK, alpha=scale).to(weight_NK.dtype)


def _new_weight(tensors: Any, adapter: LayerAdapter, layer: PlainLayer) -> Tensor:
    weight = layer.weight
    if adapter.whole:
        whole: Tensor = tensors.get_tensor(adapter.whole)
        return whole.to(weight.device, weight.dtype, copy=True)
    a_RK, b_NR = (tensors.get_tensor(name).to(weight.device, torch.float32) for name in (adapter.a, adapter.b))
    if isinstance(layer, nn.Embedding):  # one row per token: the transposed product
        a_RK, b_NR = b_NR.T, a_RK.T
    return merged(weight, a_RK, b_NR, adapter.scale)


def _untie(model: Qwen3) -> None:
    """Let embedding and output projection have weights of their own; the tensor is shared until one is assigned."""
    if model.config.tie_word_embeddings and model.lm_head is not None:
        model.config = replace(model.config, tie_word_embeddings=False)
        assign(model, f"{HEAD}.weight", model.lm_head.weight.detach())


def _is_copy(tensors: Any, name: str, layers: dict[str, PlainLayer]) -> bool:
    """Return whether a tensor is the model's own embedding or output projection."""
    layer = layers.get(HEAD if f".{HEAD}." in name else EMBEDDING)
    if layer is None:
        return False
    weight = layer.weight
    return torch.equal(tensors.get_tensor(name).to(weight.device, weight.dtype), weight)
