"""Where the tensors of a GGUF file go in our model, and in which format each layer is kept.

Only names differ: llama.cpp does not permute the rows of Qwen3's queries and keys (its RoPE pairs channels as ours
does). Source: tensor_mapping.py and constants.py of gguf-py in github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from torch import nn

from qwen3fast.checkpoint.gguf.header import Header
from qwen3fast.checkpoint.gguf.levels import KEPT
from qwen3fast.checkpoint.gguf.tensors import StoredTensor
from qwen3fast.model import Qwen3
from qwen3fast.model.config import ModelConfig
from qwen3fast.model.moe import Experts
from qwen3fast.quantization.convert import DEQUANTIZE, get_format
from qwen3fast.quantization.experts import QuantizedExperts
from qwen3fast.quantization.formats import Format, fits
from qwen3fast.quantization.layers import QuantizedEmbedding, QuantizedLinear

EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
OUTER = {EMBEDDING: "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight", OUTPUT: "lm_head.weight"}
IN_BLOCK = {
    "attn_norm": "input_layernorm.weight",
    "attn_q": "self_attn.q_proj.weight",
    "attn_k": "self_attn.k_proj.weight",
    "attn_v": "self_attn.v_proj.weight",
    "attn_q_norm": "self_attn.q_norm.weight",
    "attn_k_norm": "self_attn.k_norm.weight",
    "attn_output": "self_attn.o_proj.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    "ffn_gate": "mlp.gate_proj.weight",
    "ffn_up": "mlp.up_proj.weight",
    "ffn_down": "mlp.down_proj.weight",
    "ffn_gate_inp": "mlp.gate.weight",
    "ffn_gate_exps": "mlp.experts.gate_up_proj",
    "ffn_up_exps": "mlp.experts.gate_up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
}
HALVES = {"ffn_gate_exps": 0, "ffn_up_exps": 1}
STACKED = ("ffn_gate_exps", "ffn_up_exps")  # they share a parameter, so they are kept in one format
# Layers of a block that read the same input. CUDA's kernels for whole steps need them in one format.
EXPERTS = (*STACKED, "ffn_down_exps")
TOGETHER = (("attn_q", "attn_k", "attn_v"), ("ffn_gate", "ffn_up"), EXPERTS, STACKED)
ROUTER = "ffn_gate_inp"  # stays plain: it is small, and its choice of experts matters


class Place(NamedTuple):
    """A parameter of the model and the tensor's shape; half: which half of the rows of each expert it is, or None."""

    parameter: str
    shape: tuple[int, ...]
    half: int | None = None


def places_of(model: Qwen3) -> dict[str, Place]:
    """Return the place of each tensor that a file must hold for this (plain) model, by name."""
    outer = {place: name for name, place in OUTER.items()}
    places: dict[str, Place] = {}
    for parameter, tensor in model.named_parameters():
        shape = tuple(tensor.shape)
        block = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", parameter)
        if block is None:
            places[outer[parameter]] = Place(parameter, shape)
            continue
        for kind in (kind for kind, place in IN_BLOCK.items() if place == block[2]):
            half = HALVES.get(kind)
            cut = shape if half is None else (shape[0], shape[1] // 2, shape[2])
            places[f"blk.{block[1]}.{kind}.weight"] = Place(parameter, cut, half)
    return places


def choose_formats(
    header: Header, config: ModelConfig, quantization: str | None, device_type: str = "cpu"
) -> dict[str, Format]:
    """Return the format of each tensor that gets packed; others become plain.

    quantization: None keeps the types in KEPT, where the device has kernels for their formats, and floats plain, and
    loads other quantized types in int8, which is finer than their own steps. "dequantize" packs none. The name of a
    format applies to all. Routers of experts stay plain.
    device_type: on devices but CPUs, layers that read the same input get one format: int8 if they differ.
    """
    if quantization == DEQUANTIZE:
        return {}
    matrices = {name: t for name, t in header.tensors.items() if len(t.shape) in (2, 3) and ROUTER not in name}
    chosen = {name: own_format(tensor, quantization, device_type) for name, tensor in matrices.items()}
    for layer in range(config.num_hidden_layers):
        for group in TOGETHER:
            names = [name for kind in group if (name := f"blk.{layer}.{kind}.weight") in chosen]
            formats = [chosen[name] for name in names]
            if None in formats:  # their input is quantized for all, or for none
                chosen |= dict.fromkeys(names)
            elif (group == STACKED or (device_type != "cpu" and group != EXPERTS)) and len(set(formats)) > 1:
                chosen |= dict.fromkeys(names, get_format(quantization or "int8"))
    return {name: format for name, format in chosen.items() if format is not None}


def own_format(tensor: StoredTensor, quantization: str | None, device_type: str = "cpu") -> Format | None:
    """Return the format of a tensor by itself."""
    if not fits(*tensor.shape[-2:]) or (quantization is None and tensor.is_float):
        return None
    kept = [k.format for k in KEPT.get(tensor.type, ()) if quantization in (None, k.format.name)]
    usable = [format for format in kept if device_type in format.devices]
    if usable:
        return usable[0]
    format = get_format(quantization or "int8")
    return format if format.fits(*tensor.shape[-2:]) else None


def replace_layers(model: Qwen3, formats: dict[str, Format], dtype: torch.dtype) -> None:
    """Replace layers of a plain model by empty quantized ones, on meta."""
    places = places_of(model)
    for name, format in formats.items():
        if name not in places:  # of a projection that is left out
            continue
        if len(places[name].shape) == 3:
            _replace_experts(model, places[name].parameter, format)
            continue
        layer_name = places[name].parameter.removesuffix(".weight")
        layer: nn.Module = model.get_submodule(layer_name)
        assert isinstance(layer.weight, torch.Tensor), "matrices belong to layers with a weight"
        rows, columns = layer.weight.shape
        quantized = QuantizedLinear(format.empty(rows, columns, "meta"), format)
        if name != EMBEDDING:
            model.set_submodule(layer_name, quantized)
            continue
        model.set_submodule(layer_name, QuantizedEmbedding(quantized, dtype))
        if model.config.tie_word_embeddings:
            model.set_submodule("lm_head", quantized)


def _replace_experts(model: Qwen3, parameter: str, format: Format) -> None:
    name, _, stack = parameter.rpartition(".")
    experts = model.get_submodule(name)
    if isinstance(experts, Experts):  # not replaced yet: gate, up and down come one by one
        model.set_submodule(name, QuantizedExperts.of(experts, format))
    layer = model.get_submodule(parameter)
    assert isinstance(layer, QuantizedLinear), f"{stack} was replaced"
    model.set_submodule(parameter, QuantizedLinear(format.empty(layer.out_features, layer.in_features, "meta"), format))
