"""All blocks of a decode step in one call of C++ (kernels/cpu/decode_layers.cpp), for bfloat16 and quantized weights.

Otherwise each of a token's many short products would cost a call from Python, and starting and joining threads.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from qwen3fast.engine.adapters import AdapterSlots
from qwen3fast.kernels import cpu
from qwen3fast.model import Block, FeedForward, Qwen3
from qwen3fast.model.kv_cache import StaticKVCache
from qwen3fast.quantization.layers import QuantizedLinear


class DecodeLayers:
    """The blocks of a dense model over a KV cache. The reference is `model/block.py`.

    is_possible: whether the operation serves the model, its formats and the cache.
    """

    _adapters: cpu.AdaptersOfLayers | None = None

    def __init__(self, model: Qwen3, cache: StaticKVCache, num_layers: int | None = None) -> None:
        """num_layers: of the first blocks, for a cache of as many; by default all."""
        every = list(model.model.layers)[:num_layers]
        blocks = [b for b in every if isinstance(b, Block) and isinstance(b.mlp, FeedForward)]
        norms = [norm for block in blocks for norm in _norms(block)]
        linears = [linear for block in blocks for linear in _linears(block)]
        self.is_possible = (
            len(blocks) == len(every)  # those with experts have no form in C++
            and all(_is_served(linear) for linear in linears)
            and all(_has_equal_inputs(block) for block in blocks)
            and all(norm.dtype == torch.bfloat16 and norm.device.type == "cpu" for norm in norms)
            and all(k.dtype in (torch.bfloat16, torch.int8) for k in cache.keys)
            and model.config.head_dim % (2 * cpu.LANES) == 0
        )
        if self.is_possible:
            weights = [x.weight_packed if isinstance(x, QuantizedLinear) else x.weight for x in linears]
            scales = [x.weight_scale if isinstance(x, QuantizedLinear) else None for x in linears]
            caches = (cache.keys, cache.values, cache.key_scales, cache.value_scales)
            self._run = cpu.DecodeLayersCall(*caches, norms, weights, scales, model.config.rms_norm_eps)

    def with_adapters(self, slots: AdapterSlots) -> DecodeLayers | None:
        """Return the same operation with the product of each row's adapter; None if it is not possible."""
        if not self.is_possible:
            return None
        adapted = copy.copy(self)
        matrices = [(layer.lora_A, layer.lora_B) for layer in slots.layers.values()]
        adapted._adapters = self._run.adapters(matrices, slots.decode_slot_R)
        return adapted

    def serves(self, num_rows: int) -> bool:
        """Return whether it supports a step of this many rows."""
        return self.is_possible and num_rows <= cpu.MAX_DECODE_ROWS and cpu.is_loaded()

    def __call__(self, x_B1E: Tensor, cos_SD: Tensor, sin_SD: Tensor, position_B1: Tensor) -> Tensor:
        """Run all blocks for rows 0..B-1 of the cache, and write keys and values at position_B1.

        x_B1E: bfloat16. cos_SD, sin_SD: float32, tables of all positions. position_B1: int64.
        Returns: (B, 1, E) bfloat16. Raises: ValueError for a position outside of the cache.
        """
        return self._run(cpu.functions(), x_B1E, cos_SD, sin_SD, position_B1, self._adapters)


def _norms(block: Block) -> list[Tensor]:
    attention = block.self_attn
    norms = (block.input_layernorm, attention.q_norm, attention.k_norm, block.post_attention_layernorm)
    return [norm.weight for norm in norms]


def _linears(block: Block) -> list[nn.Linear | QuantizedLinear]:
    a, f = block.self_attn, block.mlp
    assert isinstance(f, FeedForward), "only dense blocks have a form in C++"
    return [a.q_proj, a.k_proj, a.v_proj, a.o_proj, f.gate_proj, f.up_proj, f.down_proj]


def _has_equal_inputs(block: Block) -> bool:
    """Return whether layers with the same input have the same number of bits: the input is quantized once for them."""
    bits = [x.format.bits if isinstance(x, QuantizedLinear) else 16 for x in _linears(block)]
    return len(set(bits[:3])) == 1 and len(set(bits[4:6])) == 1


def _is_served(linear: nn.Module) -> bool:
    if not isinstance(linear, nn.Linear | QuantizedLinear) or linear.bias is not None:  # its output may need more
        return False
    if isinstance(linear, QuantizedLinear):
        return "cpu" in linear.format.devices
    return linear.weight.dtype == torch.bfloat16 and all(size % cpu.LANES == 0 for size in linear.weight.shape)
