"""Errors of quantized layers, caches and models, as cases of a record."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from qwen3fast.bench.record import Case
from qwen3fast.bench.suites.quantization import logits_through_cache
from qwen3fast.model import Qwen3, rope_tables
from qwen3fast.model.kv_cache import StaticKVCache
from qwen3fast.quantization.layers import QuantizedLinear


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return |actual - expected| / |expected|, in float64."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-300))


@torch.no_grad()
def layer_errors(exact: Qwen3, quantized: Qwen3, tokens: torch.Tensor) -> list[dict[str, Any]]:
    """Return the error of each quantized layer's weight and output, on its inputs in the exact model."""
    inputs: dict[str, torch.Tensor] = {}
    layers = {name: layer for name, layer in quantized.named_modules() if isinstance(layer, QuantizedLinear)}
    hooks = [
        exact.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
        for name in layers
    ]
    exact(tokens)
    for hook in hooks:
        hook.remove()
    errors = []
    for name, layer in layers.items():
        weight, x = exact.get_submodule(name).weight, inputs[name]
        output = relative_error(layer(x), F.linear(x.float(), weight.float()))
        errors.append(
            {"layer": name, "weight_error": relative_error(layer.dequantize(), weight), "output_error": output}
        )
    return errors


@torch.no_grad()
def cache_errors(model: Qwen3, tokens: torch.Tensor) -> list[dict[str, Any]]:
    """Return the error of each block's int8 keys and values and of attention's output on them, with exact inputs."""
    length, cpu = tokens.shape[1], torch.device("cpu")
    cos_TD, sin_TD = rope_tables(model.config.head_dim, model.config.rope_theta, length, cpu, model.config.yarn)
    position_1T = torch.arange(length)[None]
    mask_1TL = torch.arange(length) <= position_1T[..., None]
    arguments = (cos_TD[None], sin_TD[None], position_1T, mask_1TL)
    dtype = model.model.norm.weight.dtype
    caches = [StaticKVCache(model.config, 1, length, stored, cpu) for stored in (dtype, torch.int8)]
    x_1TE, errors = model.embed(tokens), []
    for block, exact, quantized in zip(model.model.layers, *(cache.layers() for cache in caches), strict=True):
        normed = block.input_layernorm(x_1TE)
        expected, actual = (block.self_attn(normed, *arguments, layer) for layer in (exact, quantized))
        (k, v), (quantized_k, quantized_v) = (layer.read(1, length, torch.float32) for layer in (exact, quantized))
        errors.append(
            {
                "layer": f"layers.{len(errors)}",
                "key_error": relative_error(quantized_k, k),
                "value_error": relative_error(quantized_v, v),
                "output_error": relative_error(actual, expected),
            }
        )
        x_1TE = block(x_1TE, *arguments, exact)
    return errors


def error_cases(format: str, what: str, errors: list[dict[str, Any]]) -> list[Case]:
    """Return a case per layer or block."""
    return [
        Case(
            {"format": format, "what": what, "layer": error["layer"]},
            samples={name: [value] for name, value in error.items() if name != "layer"},
        )
        for error in errors
    ]


def model_case(format: str, model: Qwen3, tokens: torch.Tensor, cache_dtype: str, exact: torch.Tensor) -> Case:
    """Return the error of the logits and how often the most likely token stays the same. exact: (T, V)."""
    logits = logits_through_cache(model, tokens[0], cache_dtype)
    same = float((logits.argmax(-1) == exact.argmax(-1)).float().mean())
    samples = {"logit_error": [relative_error(logits, exact)], "same_token": [same]}
    return Case({"format": format, "what": "model"}, {"weight_bytes": float(model.num_bytes())}, samples)
