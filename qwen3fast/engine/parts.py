"""The pieces of a forward pass as plain functions: what `StepCompiler` compiles, and what runs as it is without it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qwen3fast.engine.compile import Dynamic, StepCompiler, StepPart
from qwen3fast.engine.decode_layers import DecodeLayers
from qwen3fast.kernels import cuda
from qwen3fast.kernels.attention import choose_prefill_form
from qwen3fast.kernels.forms import Choice
from qwen3fast.model import Block, Qwen3
from qwen3fast.model.kv_cache import CacheLayer, StaticKVCache
from qwen3fast.sampling.processors import ProcessorRows, process_logits
from qwen3fast.sampling.samplers import SamplerKind, SamplerRows, sample

CHUNK_SIZES = (32, 64, 128, 256, 512)  # tokens of a prompt that are computed together
MIN_UNCACHED_TOKENS = 16  # shorter sequences without a cache are padded

# Sizes that vary from call to call.
CHUNK = Dynamic(example=101, least=CHUNK_SIZES[0], most=CHUNK_SIZES[-1])
TOKENS = Dynamic(example=101, least=MIN_UNCACHED_TOKENS)
POSITIONS = Dynamic(example=67, least=CHUNK_SIZES[0])


class Forms:
    """Which forms of a computation the parts use on this machine, and why. prefill: see `CacheLayer.form`."""

    def __init__(self) -> None:
        self.prefill = ""
        self.choices: dict[str, Choice] = {}

    def choose(self, cache: StaticKVCache, num_heads: int) -> None:
        """Measure what serves, once per machine, and use the fastest."""
        choice = choose_prefill_form(cache.layers(None)[0], num_heads)
        self.choices["prefill attention"], self.prefill = choice, choice.name


def run_prefill_block(
    forms: Forms,
    block: Block,
    x_BTE: Tensor,
    cos_BTD: Tensor,
    sin_BTD: Tensor,
    position_BT: Tensor,
    mask_BTL: Tensor,
    *cache: Any,
) -> Tensor:
    """Run one block over a chunk of a prompt, with the form of attention that is the fastest on this machine."""
    return block(x_BTE, cos_BTD, sin_BTD, position_BT, mask_BTL, CacheLayer(*cache, forms.prefill))


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

    decode_layers: all blocks of a decode step in one operation, where it can be used.
    """

    forms: Forms
    decode_layers: DecodeLayers | None
    decode_block: StepPart
    prefill_block: StepPart
    block_uncached: StepPart
    logits: StepPart
    head: nn.Sequential
    processors: StepPart
    samplers: dict[SamplerKind, StepPart]

    @classmethod
    def build(cls, compiler: StepCompiler, model: Qwen3, cache: StaticKVCache) -> Parts:
        """Wrap each part with the compiler; nothing is compiled before its first call."""
        if cache.keys[0].device.type == "cuda":
            cuda.load(cache.keys[0].device)  # what forms there are is decided before anything is traced
        chunk, tokens, positions = {1: CHUNK}, {1: TOKENS}, {2: POSITIONS._replace(most=cache.allocated_len)}
        forms = Forms()
        if compiler.enabled and cache.keys[0].device.type == "cpu" and model.model.norm.weight.dtype == torch.bfloat16:
            compiler.prepare(partial(forms.choose, cache, model.config.num_attention_heads))
        return cls(
            forms=forms,
            decode_layers=DecodeLayers(model, cache) if compiler.enabled else None,
            decode_block=compiler.part(run_block, dynamic=({}, {}, {}, {}, positions)),
            prefill_block=compiler.part(
                partial(run_prefill_block, forms), dynamic=(chunk, chunk, chunk, chunk, chunk | positions)
            ),
            block_uncached=compiler.part(run_block_uncached, dynamic=(tokens, tokens, tokens)),
            logits=compiler.part(run_logits),
            head=nn.Sequential(model.model.norm, model.lm_head),
            processors=compiler.part(run_processors),
            samplers={kind: compiler.part(partial(run_sampler, kind)) for kind in SamplerKind},
        )
