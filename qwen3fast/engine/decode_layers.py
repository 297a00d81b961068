"""A decode step, or all of its blocks, in one call of C++, for bfloat16 and quantized weights
(kernels/cpu/decode_layers.cpp); all blocks for chunks of prompts (prefill_layers.cpp).

Otherwise each of the many products would cost a call from Python, and starting and joining threads.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import suppress
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
from qwen3fast.kernels.cpu.decode_step import DecodeStepCall, EndTensors, StepTensors, end_pointers
from qwen3fast.kernels.cpu.structures import MANY_ROWS, NEVER, NotServedError, Tiles, require
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

    def __init__(self, model: Qwen3, cache: StaticKVCache) -> None:
        """cache: of all blocks, or of the first ones only."""
        self.spared = SparedThreads()
        self._has_experts = any(isinstance(module, MoE) for module in model.modules())
        lists = [x for x in (cache.keys, cache.values, cache.key_scales, cache.value_scales) if x]
        self._caches = list(zip(*lists, strict=True))
        self.read_weights(model)

    def read_weights(self, model: Qwen3) -> None:
        """Use the weights that the model has now. Not while a step runs."""
        self._call_of = ()
        self.is_possible = self.runs_steps = False
        with suppress(NotServedError):
            layers = [_tensors(*pair) for pair in zip(model.model.layers, self._caches, strict=False)]
            self._run = DecodeLayersCall(layers, model.config.rms_norm_eps)
            self.is_possible = True
            self._ends = _ends(model)
            end_pointers(self._ends, self._run.sizes.E)
            self.runs_steps = True

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
        tiles_from: int = NEVER,
    ) -> Tensor:
        """Run all blocks for a chunk of a prompt per batch row, in rows row_B (int64) of the cache.

        Other arguments as of a step. tiles: of products, on processors that have them; tiles_from: see `tile_length`.
        last_B: int64, the only token of each batch row whose result is needed; None for all.
        Returns: (B, T, E) bfloat16. Raises: ValueError for a position or row outside of the cache.
        """
        return self._run.prefill(x_BTE, cos_SD, sin_SD, position_BT, row_B, tiles, last_B, tiles_from)

    def __call__(
        self, x_B1E: Tensor, cos_SD: Tensor, sin_SD: Tensor, position_B1: Tensor, tiles: Tiles = Tiles.NONE
    ) -> Tensor:
        """Run all blocks for rows 0..B-1 of the cache, and write keys and values at position_B1.

        x_B1E: bfloat16. cos_SD, sin_SD: float32, tables of all positions. position_B1: int64. tiles: of products with
        weights in bfloat16, on processors that have them.
        Returns: (B, 1, E) bfloat16. Raises: ValueError for a position outside of the cache.
        """
        y_B1E = self._run(x_B1E, cos_SD, sin_SD, position_B1, self._adapters, tiles)
        self.spared.note(self._run.lost, torch.get_num_threads())
        return y_B1E

    def choose(
        self,
        state: DecodeState,
        num_rows: int,
        cos_SD: Tensor,
        sin_SD: Tensor,
        is_greedy: bool,
        tiles: Tiles = Tiles.NONE,
    ) -> None:
        """Run a whole step of rows 0..num_rows-1: write the tokens that `sample` chooses to `state`, and advance it.

        state: of the same cache. cos_SD, sin_SD: float32, tables of all positions. tiles: as of the blocks.
        Raises: ValueError for a token or a position that does not exist.
        """
        self._step(state, cos_SD, sin_SD).choose(num_rows, is_greedy, tiles)
        self.spared.note(self._run.lost, torch.get_num_threads())

    def logits(
        self, state: DecodeState, num_rows: int, cos_SD: Tensor, sin_SD: Tensor, tiles: Tiles = Tiles.NONE
    ) -> Tensor:
        """Return the logits of a step, (B, V) float32; arguments and errors as of `choose`."""
        logits_BV = self._step(state, cos_SD, sin_SD).logits(num_rows, tiles)
        self.spared.note(self._run.lost, torch.get_num_threads())
        return logits_BV

    def _step(self, state: DecodeState, cos_SD: Tensor, sin_SD: Tensor) -> DecodeStepCall:
        given = (state, cos_SD, sin_SD)
        if self._call is None or any(a is not b for a, b in zip_longest(self._call_of, given)):
            tensors = StepTensors(state.input_R, state.position_R, state.output_R, state.step_R, state.advance_R)
            sampling = state.sampler_rows(slice(None))
            self._call = DecodeStepCall(self._run, self._ends, tensors, sampling, cos_SD, sin_SD, self._adapters)
            self._call_of = given
        return self._call


def _ends(model: Qwen3) -> EndTensors:
    """Return the weights of a step outside of the blocks. Raises: NotServedError."""
    embedding: nn.Module = model.model.embed_tokens
    if type(embedding) is nn.Embedding:
        weight = LayerWeight(embedding.weight)
    elif isinstance(embedding, QuantizedEmbedding) and embedding.dtype == torch.bfloat16:
        require("cpu" in embedding.format.devices, "the embedding's format is of other devices", NotServedError)
        packed = Packed(embedding.weight_packed, embedding.weight_scale)
        weight = LayerWeight(*embedding.format.operands(packed))
    else:
        raise NotServedError("the embedding has another form")
    return EndTensors(weight, model.model.norm.weight, _weight(model.lm_head))


def _tensors(block: nn.Module, cache: Sequence[Tensor]) -> LayerTensors:
    """Return the tensors of a block and its cache. Raises: NotServedError for layers of other kinds."""
    if not isinstance(block, Block):
        raise NotServedError("the model has other blocks")
    attention, mlp = block.self_attn, block.mlp
    norms = (block.input_layernorm, attention.q_norm, attention.k_norm, block.post_attention_layernorm)
    feed_forward: list[LayerWeight] | ExpertWeights
    experts: nn.Module | None = mlp.experts if isinstance(mlp, MoE) else None
    if isinstance(mlp, MoE) and isinstance(experts, QuantizedExperts):
        gate_up, down = _weight(experts.gate_up_proj), _weight(experts.down_proj)
        router = _weight(mlp.gate).weight
        feed_forward = ExpertWeights(router, gate_up, down, mlp.num_chosen, mlp.is_renormalized)
    elif isinstance(mlp, FeedForward):
        feed_forward = _weights(mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    else:
        raise NotServedError("the feed-forward layer or its experts have another form")
    projections = _weights(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    return LayerTensors([norm.weight for norm in norms], projections, feed_forward, cache)


def _weights(*layers: nn.Module) -> list[LayerWeight]:
    """Return the weights of layers of which all but the last have the same input; equal orders are the same tensor."""
    first, *others = map(_weight, layers)
    is_shared = isinstance(layers[0], OrderedLinear) and layers[0].shares_order
    shared = [w._replace(order=first.order) for w in others[:-1]] if is_shared else others[:-1]
    return [first, *shared, others[-1]]


def _weight(layer: nn.Module) -> LayerWeight:
    """Return the weight of a linear layer. Raises: NotServedError for one of another kind, or with a bias."""
    if isinstance(layer, QuantizedLinear) and layer.bias is None and "cpu" in layer.format.devices:
        order = layer.input_order if isinstance(layer, OrderedLinear) else None
        return LayerWeight(*layer.format.operands(layer.packed), order)
    if isinstance(layer, nn.Linear) and layer.bias is None:
        return LayerWeight(layer.weight)
    raise NotServedError("a linear layer has a bias, or another form")
