"""A decode step, or all of its blocks, in one call of C++, for bfloat16 and quantized weights
(kernels/cpu/decode_layers.cpp); all blocks for chunks of prompts (prefill_layers.cpp).

Otherwise each of the many products would cost a call from Python, and starting and joining threads.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import zip_longest

import torch
from torch import Tensor, nn

from qwen3fast.engine.adapters import AdapterSlots
from qwen3fast.engine.state import DecodeState
from qwen3fast.engine.threads import SparedThreads
from qwen3fast.kernels import cpu
from qwen3fast.kernels.cpu.decode_layers import (
    MAX_DECODE_ROWS,
    AdaptersOfLayers,
    DecodeLayersCall,
    ExpertWeights,
    LayerTensors,
    LayerWeight,
)
from qwen3fast.kernels.cpu.decode_step import DecodeStepCall, EndTensors, StepTensors
from qwen3fast.kernels.cpu.structures import LANES, MANY_ROWS, Tiles
from qwen3fast.model import Block, FeedForward, MoE, Qwen3
from qwen3fast.model.kv_cache import StaticKVCache
from qwen3fast.quantization.experts import QuantizedExperts
from qwen3fast.quantization.formats import Packed
from qwen3fast.quantization.layers import QuantizedEmbedding, QuantizedLinear
from qwen3fast.quantization.ordered import OrderedLinear


class DecodeLayers:
    """The blocks of a model over a KV cache. The reference is `model/block.py`.

    is_possible: whether the operation serves the model, its formats and the cache. runs_steps: whether it also serves
    embedding, final norm and output projection.
    spared: the threads to leave out while other programs use cores.
    """

    _adapters: AdaptersOfLayers | None = None
    _call: DecodeStepCall | None = None
    _call_of: tuple[object, ...] = ()  # the last step's state and tables

    def __init__(self, model: Qwen3, cache: StaticKVCache, num_layers: int | None = None) -> None:
        """num_layers: of the first blocks, for a cache of as many; by default all."""
        every = list(model.model.layers)[:num_layers]
        blocks = [b for b in every if isinstance(b, Block)]
        self.is_possible = (
            len(blocks) == len(every)
            and all(_is_block_served(block) for block in blocks)
            and all(k.dtype in (torch.bfloat16, torch.int8) for k in cache.keys)
            and model.config.head_dim % (2 * LANES) == 0
        )
        self.spared = SparedThreads()
        self._has_experts = any(isinstance(block.mlp, MoE) for block in blocks)
        lists = [x for x in (cache.keys, cache.values, cache.key_scales, cache.value_scales) if x]
        self._caches = list(zip(*lists, strict=True))
        self.read_weights(model)

    def read_weights(self, model: Qwen3) -> None:
        """Use the weights that the model has now. Not while a step runs."""
        self._call_of = ()
        if self.is_possible:
            blocks = (block for block in model.model.layers if isinstance(block, Block))
            layers = [_tensors(block, tensors) for block, tensors in zip(blocks, self._caches, strict=False)]
            self._run = DecodeLayersCall(layers, model.config.rms_norm_eps)
        self._ends = _ends(model) if self.is_possible else None
        self.runs_steps = self._ends is not None

    def with_adapters(self, slots: AdapterSlots) -> DecodeLayers | None:
        """Return the same operation with the product of each row's adapter; None if it is not possible.

        Blocks with experts have no adapters in it.
        """
        if not self.is_possible or self._has_experts:
            return None
        adapted = copy.copy(self)
        matrices = [(layer.lora_A, layer.lora_B) for layer in slots.layers.values()]
        adapted._call_of = ()
        adapted._adapters = self._run.adapters(matrices, slots.decode_slot_R)
        return adapted

    def serves(self, num_rows: int) -> bool:
        """Return whether it supports a step of this many rows."""
        return self.is_possible and num_rows <= MAX_DECODE_ROWS and cpu.is_loaded()

    def serves_chunks(self, num_tokens: int) -> bool:
        """Return whether it supports chunks of prompts, of so many tokens together; not with adapters."""
        return (
            self.is_possible
            and self._adapters is None
            and self._run.can_prefill
            and num_tokens >= MANY_ROWS
            and cpu.is_loaded()
        )

    def prefill(
        self,
        x_BTE: Tensor,
        cos_SD: Tensor,
        sin_SD: Tensor,
        position_BT: Tensor,
        row_B: Tensor,
        tiles: Tiles,
        last_B: Tensor | None = None,
    ) -> Tensor:
        """Run all blocks for a chunk of a prompt per batch row, in rows row_B (int64) of the cache.

        Other arguments as of a step. tiles: of products, on processors that have them. last_B: int64, the only token
        of each batch row whose result is needed; None for all.
        Returns: (B, T, E) bfloat16. Raises: ValueError for a position or row outside of the cache.
        """
        return self._run.prefill(x_BTE, cos_SD, sin_SD, position_BT, row_B, tiles, last_B)

    def __call__(self, x_B1E: Tensor, cos_SD: Tensor, sin_SD: Tensor, position_B1: Tensor) -> Tensor:
        """Run all blocks for rows 0..B-1 of the cache, and write keys and values at position_B1.

        x_B1E: bfloat16. cos_SD, sin_SD: float32, tables of all positions. position_B1: int64.
        Returns: (B, 1, E) bfloat16. Raises: ValueError for a position outside of the cache.
        """
        y_B1E = self._run(x_B1E, cos_SD, sin_SD, position_B1, self._adapters)
        self.spared.note(self._run.lost, torch.get_num_threads())
        return y_B1E

    def choose(self, state: DecodeState, num_rows: int, cos_SD: Tensor, sin_SD: Tensor, is_greedy: bool) -> None:
        """Run a whole step of rows 0..num_rows-1: write the tokens that `sample` chooses to `state`, and advance it.

        state: of the same cache. cos_SD, sin_SD: float32, tables of all positions.
        Raises: ValueError for a token or a position that does not exist.
        """
        self._step(state, cos_SD, sin_SD).choose(num_rows, is_greedy)
        self.spared.note(self._run.lost, torch.get_num_threads())

    def logits(self, state: DecodeState, num_rows: int, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
        """Return the logits of a step, (B, V) float32; arguments and errors as of `choose`."""
        logits_BV = self._step(state, cos_SD, sin_SD).logits(num_rows)
        self.spared.note(self._run.lost, torch.get_num_threads())
        return logits_BV

    def _step(self, state: DecodeState, cos_SD: Tensor, sin_SD: Tensor) -> DecodeStepCall:
        given = (state, cos_SD, sin_SD)
        if self._call is None or any(a is not b for a, b in zip_longest(self._call_of, given)):
            assert self._ends is not None, "runs_steps is True"
            tensors = StepTensors(state.input_R, state.position_R, state.output_R, state.step_R, state.advance_R)
            sampling = state.sampler_rows(slice(None))
            self._call = DecodeStepCall(self._run, self._ends, tensors, sampling, cos_SD, sin_SD, self._adapters)
            self._call_of = given
        return self._call


def _ends(model: Qwen3) -> EndTensors | None:
    """Return the weights of a step outside of the blocks; None if the operation does not serve them."""
    norm, head = model.model.norm.weight, model.lm_head
    embedding: nn.Module = model.model.embed_tokens
    if norm.dtype != torch.bfloat16 or not _is_served(head):
        return None
    if isinstance(embedding, QuantizedEmbedding):
        packed = Packed(embedding.weight_packed, embedding.weight_scale)
        if embedding.dtype != torch.bfloat16 or "cpu" not in embedding.format.devices:
            return None
        return EndTensors(LayerWeight(*embedding.format.operands(packed)), norm, _weight(head))
    if type(embedding) is not nn.Embedding or not _is_plain(embedding.weight):
        return None
    return EndTensors(LayerWeight(embedding.weight), norm, _weight(head))


def _norms(block: Block) -> list[Tensor]:
    attention = block.self_attn
    norms = (block.input_layernorm, attention.q_norm, attention.k_norm, block.post_attention_layernorm)
    return [norm.weight for norm in norms]


def _attention(block: Block) -> list[nn.Module]:
    return [getattr(block.self_attn, f"{name}_proj") for name in "qkvo"]


def _feed_forward(mlp: FeedForward) -> list[nn.Module]:
    return [mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def _tensors(block: Block, cache: Sequence[Tensor]) -> LayerTensors:
    mlp = block.mlp
    feed_forward: list[LayerWeight] | ExpertWeights
    if isinstance(mlp, MoE):
        experts: nn.Module = mlp.experts
        assert isinstance(experts, QuantizedExperts), "checked before"
        gate_up, down = _weight(experts.gate_up_proj), _weight(experts.down_proj)
        feed_forward = ExpertWeights(mlp.gate.weight, gate_up, down, mlp.num_chosen, mlp.is_renormalized)
    else:
        feed_forward = _weights(_feed_forward(mlp))
    return LayerTensors(_norms(block), _weights(_attention(block)), feed_forward, cache)


def _weights(layers: Sequence[nn.Module]) -> list[LayerWeight]:
    """Return the weights of layers of which all but the last have the same input; equal orders are the same tensor."""
    first, *others = map(_weight, layers)
    is_shared = isinstance(layers[0], OrderedLinear) and layers[0].shares_order
    shared = [w._replace(order=first.order) for w in others[:-1]] if is_shared else others[:-1]
    return [first, *shared, others[-1]]


def _weight(layer: nn.Module) -> LayerWeight:
    if isinstance(layer, QuantizedLinear):
        order = layer.input_order if isinstance(layer, OrderedLinear) else None
        return LayerWeight(*layer.format.operands(layer.packed), order)
    assert isinstance(layer, nn.Linear), "checked before"
    return LayerWeight(layer.weight)


def _is_block_served(block: Block) -> bool:
    mlp, attention = block.mlp, _attention(block)
    if isinstance(mlp, MoE):
        experts: nn.Module = mlp.experts
        is_mlp_served = isinstance(experts, QuantizedExperts) and _is_served(mlp.gate) and _is_served(experts.down_proj)
    else:
        is_mlp_served = isinstance(mlp, FeedForward) and _are_served_together(*_feed_forward(mlp))
    return (
        is_mlp_served
        and _are_served_together(*attention)
        and all(norm.dtype == torch.bfloat16 and norm.device.type == "cpu" for norm in _norms(block))
    )


def _are_served_together(*layers: nn.Module) -> bool:
    """Return whether the layers are served. All but the last have the same input: all of these are packed, or none."""
    is_packed = {isinstance(layer, QuantizedLinear) for layer in layers[:-1]}
    return len(is_packed) == 1 and all(_is_served(layer) for layer in layers)


def _is_served(linear: nn.Module) -> bool:
    if not isinstance(linear, nn.Linear | QuantizedLinear) or linear.bias is not None:  # its output may need more
        return False
    if isinstance(linear, QuantizedLinear):
        return "cpu" in linear.format.devices
    return _is_plain(linear.weight)


def _is_plain(weight: Tensor) -> bool:
    is_in_place = weight.device.type == "cpu" and weight.is_contiguous()
    return is_in_place and weight.dtype == torch.bfloat16 and all(size % LANES == 0 for size in weight.shape)
