"""AWQ's scaling for comparison: input channels with large activations get larger weights before they are quantized.

The scales are folded into the layers before (norm weights, v_proj for o_proj, up_proj for down_proj), so the scaled
model computes the same. Each scale is a power of the channels' root mean squares; the power with the least squared
error of the layers' outputs is taken. Source: Lin et al., AWQ, arXiv:2306.00978.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qwen3fast.model import Qwen3
from qwen3fast.model.block import Block
from qwen3fast.quantization.formats import FORMATS, quantize

POWERS = tuple(i / 10 for i in range(11))


@torch.no_grad()
def scale_channels(model: Qwen3, moments: dict[str, Tensor]) -> None:
    """Scale the channels of a dense model's layers, in place.

    moments: the second moments of each linear layer's inputs, by its name, (K, K) float32.
    """
    heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
    for number, block in enumerate(model.model.layers):
        assert isinstance(block, Block), "a model has blocks"
        name, attention, mlp = f"model.layers.{number}.", block.self_attn, block.mlp
        qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
        scale_E = _best_scale(qkv, moments[name + "self_attn.q_proj"])
        block.input_layernorm.weight /= scale_E
        _multiply(qkv, scale_E)

        def per_kv_head(scale: Tensor) -> Tensor:
            grouped = scale.view(kv_heads, heads // kv_heads, -1)
            return grouped.log().mean(1, keepdim=True).exp().expand_as(grouped).reshape(-1)

        scale = per_kv_head(_best_scale([attention.o_proj], moments[name + "self_attn.o_proj"], per_kv_head))
        attention.v_proj.weight /= scale.view(kv_heads, heads // kv_heads, -1)[:, 0].reshape(-1, 1)
        _multiply([attention.o_proj], scale)
        gate_up = [mlp.gate_proj, mlp.up_proj]
        scale_E = _best_scale(gate_up, moments[name + "mlp.gate_proj"])
        block.post_attention_layernorm.weight /= scale_E
        _multiply(gate_up, scale_E)
        scale = _best_scale([mlp.down_proj], moments[name + "mlp.down_proj"])
        mlp.up_proj.weight /= scale[:, None]
        _multiply([mlp.down_proj], scale)


def _multiply(layers: list[nn.Linear], scale_K: Tensor) -> None:
    for layer in layers:
        layer.weight *= scale_K


def _best_scale(layers: list[nn.Linear], moment_KK: Tensor, restrict=lambda scale: scale) -> Tensor:
    """Return the scale, (K,), with the least squared error of the outputs when the scaled weights are int4."""
    rms_K = moment_KK.diagonal().sqrt().clamp(min=1e-6)
    rms_K = rms_K / rms_K.log().mean().exp()
    scales = [restrict((rms_K**power).clamp(1e-3, 1e3)) for power in POWERS]
    return min(scales, key=lambda scale: sum(_output_error(layer.weight, scale, moment_KK) for layer in layers))


def _output_error(weight_NK: Tensor, scale_K: Tensor, moment_KK: Tensor) -> float:
    format = FORMATS["int4"]
    difference = format.dequantize(quantize(weight_NK * scale_K, format)) / scale_K - weight_NK
    return float(((difference @ moment_KK) * difference).sum())
