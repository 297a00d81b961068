"""A whole decode step of a dense model in a few Triton kernels per layer (kernels/cuda/decode_step), for 1 to 8 rows.

On a GPU, a step of few rows is bound by launches and by reading the weights once. These kernels take six launches per
layer and three more per step. They read nothing from the host and write only to memory that was allocated once: CUDA
graphs can capture them. `parts.py` and `decode.py` decide which steps use them.

    B rows of a step   E hidden_size   S positions   D head_dim   V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor, nn

from qwen3fast.kernels import cuda
from qwen3fast.kernels.cuda.decode_step.attention import Splits
from qwen3fast.kernels.cuda.decode_step.compile_ahead import compile_ahead
from qwen3fast.kernels.cuda.decode_step.tail import Best
from qwen3fast.kernels.linear import Linear
from qwen3fast.model import Block, FeedForward, Qwen3
from qwen3fast.model.kv_cache import CacheLayer, StaticKVCache
from qwen3fast.model.stacking import STACKS, can_stack, stack
from qwen3fast.quantization.layers import QuantizedEmbedding, QuantizedLinear

MAX_ROWS = 8  # for more rows, cuBLAS reads weights as fast and computes faster
MAX_GROUP = 16  # query heads per key/value head
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class WeightArguments(NamedTuple):
    """A weight as the operations' arguments; scale: of quantized weights, otherwise None."""

    weight: Tensor
    scale: Tensor | None
    is_fp8: bool


@dataclass(frozen=True)
class FusedBlock:
    """One block's weights, in the order of use."""

    input_norm: Tensor
    qkv: WeightArguments
    q_norm: Tensor
    k_norm: Tensor
    output: WeightArguments
    post_norm: Tensor
    gate_up: WeightArguments
    down: WeightArguments


@dataclass(frozen=True)
class Workspace:
    """The intermediate results of a step of B rows."""

    x: Tensor
    qkv: Tensor
    attended: Tensor
    hidden: Tensor
    splits: Splits
    best: Best
    logits: Tensor


class FusedDecodeStep:
    """The decode step of a dense model over a KV cache; both must keep their addresses.

    It reads stacked weights (see model/stacking.py). `decode_step` in decode.py is the plain form.
    """

    def __init__(self, model: Qwen3, cache: StaticKVCache) -> None:
        self.obstacle = _obstacle(model, cache)
        if self.obstacle:
            return
        config = self._config = model.config
        self._eps = config.rms_norm_eps
        self._blocks = [_fused_block(block) for block in model.model.layers if isinstance(block, Block)]
        self._layers: list[CacheLayer] = cache.layers()
        self._final_norm = model.model.norm.weight
        self._embedding, self._head = (_weight(m) for m in (model.model.embed_tokens, model.lm_head))
        rows = range(1, min(MAX_ROWS, cache.max_batch_size) + 1)
        self._workspaces = _workspaces(model, cache, rows)

    def serves(self, num_rows: int) -> bool:
        """Return whether it supports a step of this many rows; `obstacle` says why it supports none."""
        return not self.obstacle and num_rows in self._workspaces

    def compile_ahead(self, steps: Callable[[], None]) -> None:
        """Compile the kernels of steps, several at a time, without launching them; see compile_ahead.py."""
        compile_ahead(steps)

    def logits(self, input_B: Tensor, cos_SD: Tensor, sin_SD: Tensor, position_B: Tensor) -> Tensor:
        """Return the logits after the tokens input_B at position_B, (B, V) float32, in memory that is reused."""
        work = self._workspaces[len(input_B)]
        self._run_model(work, input_B, cos_SD, sin_SD, position_B, work.logits)
        return work.logits

    def greedy(
        self,
        input_B: Tensor,
        cos_SD: Tensor,
        sin_SD: Tensor,
        position_B: Tensor,
        advance_B: Tensor,
        output_B: Tensor,
        step_B: Tensor,
    ) -> None:
        """Run a whole greedy step on the fields of `DecodeState`: it writes input, output, position and step."""
        work = self._workspaces[len(input_B)]
        self._run_model(work, input_B, cos_SD, sin_SD, position_B, None)
        torch.ops.qwen3fast.step_choose(*work.best, advance_B, input_B, output_B, position_B, step_B)

    def _run_model(
        self,
        work: Workspace,
        input_B: Tensor,
        cos_SD: Tensor,
        sin_SD: Tensor,
        position_B: Tensor,
        logits: Tensor | None,
    ) -> None:
        torch.ops.qwen3fast.step_embed(input_B, *self._embedding, work.x)
        self._run_blocks(work, cos_SD, sin_SD, position_B)
        torch.ops.qwen3fast.step_vocabulary(work.x, self._final_norm, self._eps, *self._head, *work.best, logits)

    def _run_blocks(self, work: Workspace, cos_SD: Tensor, sin_SD: Tensor, position_B: Tensor) -> None:
        ops, eps = torch.ops.qwen3fast, self._eps
        for block, layer in zip(self._blocks, self._layers, strict=True):
            cache = (layer.k_RKSD, layer.v_RKSD, layer.k_scale_RKS, layer.v_scale_RKS)
            rotation = (cos_SD, sin_SD, position_B)
            ops.step_norm_linear(work.x, block.input_norm, eps, *block.qkv, work.qkv)
            norms = (block.q_norm, block.k_norm, eps)
            ops.step_attend(work.qkv, *norms, *rotation, *cache, *work.splits, work.attended)
            ops.step_linear_add(work.attended, *block.output, work.x)
            ops.step_norm_gated_linear(work.x, block.post_norm, eps, *block.gate_up, work.hidden)
            ops.step_linear_add(work.hidden, *block.down, work.x)


def _obstacle(model: Qwen3, cache: StaticKVCache) -> str:
    """Return why the kernels cannot run this model over this cache; empty if they can."""
    config = model.config
    blocks = [b for b in model.model.layers if isinstance(b, Block) and isinstance(b.mlp, FeedForward)]
    if not cuda.load():
        return "Triton is not installed"
    if cache.keys[0].device.type != "cuda" and not triton.knobs.runtime.interpret:
        return "the cache is not on a CUDA device"
    if len(blocks) < len(model.model.layers):
        return "blocks with experts, or of a process among several, have no fused form"
    dtype, D = model.model.norm.weight.dtype, config.head_dim
    if dtype not in DTYPES or cache.keys[0].dtype not in (dtype, torch.int8):
        return f"activations in {dtype} with a cache in {cache.keys[0].dtype} are not served"
    if (
        not 16 <= D <= cuda.MAX_HEAD_DIM
        or D & (D - 1)
        or config.num_attention_heads // config.num_key_value_heads > MAX_GROUP
    ):
        return "head_dim must be 16, 32, 64 or 128, and at most 16 query heads share a key/value head"
    layers = [block.get_submodule(name) for block in blocks for name in ("self_attn.o_proj", "mlp.down_proj")]
    stacks = [[getattr(b.get_submodule(part), n) for n in names] for b in blocks for part, names in STACKS.items()]
    if not all(can_stack(together) for together in stacks):
        return "layers that read the same input must be in one format, without biases"
    every = [*layers, *(layer for together in stacks for layer in together), model.lm_head]
    if not all(_is_served(layer, dtype) for layer in every):
        return "a linear layer has a bias, an order of channels, other strides or dtype, or is among several processes"
    embedding: nn.Module = model.model.embed_tokens
    is_plain = type(embedding) is nn.Embedding and embedding.weight.dtype == dtype and embedding.weight.is_contiguous()
    return "" if is_plain or type(embedding) is QuantizedEmbedding else "the embedding is of a process among several"


def _is_served(layer: nn.Module, dtype: torch.dtype) -> bool:
    if type(layer) is QuantizedLinear:
        return layer.bias is None and "cuda" in layer.format.devices
    if not isinstance(layer, nn.Linear) or type(layer) not in (nn.Linear, Linear) or layer.bias is not None:
        return False
    return layer.weight.dtype == dtype and layer.weight.is_contiguous()


def _fused_block(block: Block) -> FusedBlock:
    attention, mlp = block.self_attn, block.mlp
    assert isinstance(mlp, FeedForward), "only dense blocks have a fused form"
    stacks = []
    for part, names in STACKS.items():
        layers = [getattr(block.get_submodule(part), name) for name in names]
        whole = stack(layers)
        stacks.append(_weight(layers[0], *whole.values()))
    return FusedBlock(
        block.input_layernorm.weight,
        stacks[0],
        attention.q_norm.weight,
        attention.k_norm.weight,
        _weight(attention.o_proj),
        block.post_attention_layernorm.weight,
        stacks[1],
        _weight(mlp.down_proj),
    )


def _weight(module: nn.Module, weight: Tensor | None = None, scale: Tensor | None = None) -> WeightArguments:
    """Return a layer's weight, or the given one in the layer's format, as the operations' arguments."""
    if isinstance(module, QuantizedLinear | QuantizedEmbedding):
        own = (module.weight_packed, module.weight_scale)
        return WeightArguments(*(own if weight is None else (weight, scale)), module.format.name == "fp8")
    assert isinstance(module, nn.Linear | nn.Embedding), "checked before"
    return WeightArguments(module.weight if weight is None else weight, None, False)


def _workspaces(model: Qwen3, cache: StaticKVCache, rows: range) -> dict[int, Workspace]:
    """Return the workspace of each number of rows, all in the same memory."""
    config, norm = model.config, model.model.norm.weight
    H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    sizes = (config.hidden_size, (H + 2 * K) * D, H * D, config.intermediate_size)
    x, qkv, attended, hidden = (torch.zeros(rows[-1], size, dtype=norm.dtype, device=norm.device) for size in sizes)
    best = Best.allocate(rows[-1], config.vocab_size, norm.device)
    logits = torch.zeros(rows[-1], config.vocab_size, dtype=torch.float32, device=norm.device)
    positions = cache.keys[0].shape[2]
    splits = Splits.allocate(list(rows), H, K, positions, D, norm.device)
    return {
        B: Workspace(
            x[:B], qkv[:B], attended[:B], hidden[:B], splits[B], Best(best.logit[:B], best.token[:B]), logits[:B]
        )
        for B in rows
    }
