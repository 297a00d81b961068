"""The pieces of a forward pass as plain functions: what `StepCompiler` compiles, and what runs as it is without it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from qwen3fast.engine.compile import Part, StepCompiler
from qwen3fast.engine.decode_layers import DecodeLayers
from qwen3fast.kernels import cuda
from qwen3fast.kv_cache import CacheLayer, StaticKVCache
from qwen3fast.model import Block, Qwen3
from qwen3fast.processors import ProcessorRows, process_logits
from qwen3fast.sampling import SamplerKind, SamplerRows, sample

# Sizes that vary from call to call, as they are compiled: any numbers but those of other dimensions.
TOKENS, POSITIONS = 101, 67


def run_block(
    block: Block,
    x_BTE: Tensor,
    cos_BTD: Tensor,
    sin_BTD: Tensor,
    position_BT: Tensor,
    mask_BTL: Tensor,
    *cache: Any,
) -> Tensor:
    """One block over the KV cache; see `Attention.forward`. `cache` are the fields of `CacheLayer`."""
    return block(x_BTE, cos_BTD, sin_BTD, position_BT, mask_BTL, CacheLayer(*cache))


def run_block_uncached(block: Block, x_BTE: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> Tensor:
    """One block over the tokens at hand alone."""
    return block(x_BTE, cos_BTD, sin_BTD)


def run_logits(head: nn.Sequential, x_BTE: Tensor) -> Tensor:
    """Final norm and output projection, (B, 1, E) -> (B, 1, V) float32."""
    return head(x_BTE).float()


def run_processors(_: None, logits_BV: Tensor, *rows: Tensor) -> Tensor:
    """Logits to sample from; `rows` are the fields of `ProcessorRows`."""
    return process_logits(logits_BV, ProcessorRows(*rows))


def run_sampler(kind: SamplerKind, _: None, logits_BV: Tensor, *rows: Tensor) -> Tensor:
    """A token for each row, (B,); `rows` are the fields of `SamplerRows`."""
    return sample(logits_BV, SamplerRows(*rows), kind)


@dataclass(frozen=True)
class Parts:
    """The functions above, compiled or not, and one sampler for each kind. `head` is what `logits` runs.

    decode_layers: all blocks of a decode step in one operation, where it can be used. fused_step: a `FusedDecodeStep`,
    a whole step in Triton kernels, on CUDA devices with Triton.
    """

    decode_layers: DecodeLayers | None
    fused_step: Any
    decode_block: Part
    prefill_block: Part
    block_uncached: Part
    logits: Part
    head: nn.Sequential
    processors: Part
    samplers: dict[SamplerKind, Part]

    @classmethod
    def build(cls, compiler: StepCompiler, model: Qwen3, cache: StaticKVCache) -> Parts:
        """Wrap each part with the compiler; nothing is compiled before its first call."""
        tokens = {1: TOKENS}
        return cls(
            decode_layers=DecodeLayers(model, cache) if compiler.enabled else None,
            fused_step=_fused_step(model, cache) if compiler.enabled else None,
            decode_block=compiler.part(run_block, dynamic=({}, {}, {}, {}, {2: POSITIONS})),
            prefill_block=compiler.part(run_block, dynamic=(tokens, tokens, tokens, tokens, tokens | {2: POSITIONS})),
            block_uncached=compiler.part(run_block_uncached, dynamic=(tokens, tokens, tokens)),
            logits=compiler.part(run_logits),
            head=nn.Sequential(model.model.norm, model.lm_head),
            processors=compiler.part(run_processors),
            samplers={kind: compiler.part(partial(run_sampler, kind)) for kind in SamplerKind},
        )


def _fused_step(model: Qwen3, cache: StaticKVCache) -> Any:
    """Return the fused step if it serves this model on this device; building it stacks weights."""
    if cache.keys[0].device.type != "cuda" or not cuda.use_fused_step() or not cuda.load():
        return None
    from qwen3fast.engine.fused_step import FusedDecodeStep  # needs Triton

    return FusedDecodeStep(model, cache)
