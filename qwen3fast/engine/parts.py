"""The parts of a forward pass as plain functions, which `StepCompiler` compiles, or which run uncompiled."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qwen3fast.engine.compile import StepCompiler, StepPart
from qwen3fast.engine.decode_layers import DecodeLayers
from qwen3fast.engine.dynamic_sizes import Dynamic, Sizes
from qwen3fast.kernels import cpu, cuda
from qwen3fast.kernels.attention import finds_used_length
from qwen3fast.model import Block, Qwen3
from qwen3fast.model.config import ModelConfig
from qwen3fast.model.kv_cache import CacheLayer, StaticKVCache
from qwen3fast.sampling.processors import ProcessorRows, process_logits
from qwen3fast.sampling.samplers import SamplerKind, SamplerRows, sample

CHUNK_SIZES = (32, 64, 128, 256, 512)  # tokens of a prompt that are computed together
MIN_UNCACHED_TOKENS = 16  # shorter sequences without a cache are padded
# torch.compile sorts fewer pairs of token and expert than this otherwise than more.
MAX_SORTED_PAIRS = 2**14

# Sizes that vary from call to call.
CHUNK = Dynamic(example=101, least=CHUNK_SIZES[0], most=CHUNK_SIZES[-1])
TOKENS = Dynamic(example=101, least=MIN_UNCACHED_TOKENS)
POSITIONS = Dynamic(example=67, least=CHUNK_SIZES[0])


def row_ranges(config: ModelConfig, device: torch.device, max_rows: int) -> tuple[Dynamic, ...]:
    """Return the ranges of a step's rows, 2 to max_rows, in which one form serves; a step of one row has its own."""
    ends = (
        {cuda.MAX_ROWS} if device.type == cuda.DEVICE_TYPE else {4, cpu.MAX_ROWS}
    )  # of products that stream their weight
    if device.type != cuda.DEVICE_TYPE and config.num_experts:
        ends.add(config.num_experts // config.num_experts_per_tok)  # see MoE.forward
    ranges, least = [], 2
    for most in sorted({*(end for end in ends if 2 <= end < max_rows), max_rows}):
        if least < most:  # of one size alone there is nothing dynamic
            ranges.append(Dynamic(least + 1, least, most))
        least = most + 1
    return tuple(ranges)


def run_block(
    block: Block,
    x_BTE: Tensor,
    cos_BTD: Tensor,
    sin_BTD: Tensor,
    position_BT: Tensor,
    mask_BTL: Tensor | None,
    *cache: Any,
) -> Tensor:
    """Run one block over the KV cache; see `Attention.forward`. cache: the fields of `CacheLayer`."""
    return block(x_BTE, cos_BTD, sin_BTD, position_BT, mask_BTL, CacheLayer(*cache))


def run_block_uncached(block: Block, x_BTE: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> Tensor:
    """Run one block over the tokens at hand alone."""
    return block(x_BTE, cos_BTD, sin_BTD)


def run_embed(
    embedding: nn.Module, token_B: Tensor, position_B: Tensor, cos_SD: Tensor, sin_SD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what a step's blocks start from: states (B, 1, E), cosines and sines (B, 1, D) of the positions.

    position_B: int64; -1, of an empty row, counts as 0.
    """
    read_B1 = position_B[:, None].clamp(min=0)
    return embedding(token_B[:, None]), cos_SD[read_B1], sin_SD[read_B1]


def run_advance(
    _: None, token_B: Tensor, output_B: Tensor, input_B: Tensor, position_B: Tensor, step_B: Tensor, advance_B: Tensor
) -> None:
    """Write the sampled tokens, and what the next step reads, into the fields of `DecodeState`, in place."""
    output_B.copy_(token_B)
    # An invalid token (-1) is the host's to notice; what is fed on must be an id.
    input_B.copy_(token_B.clamp(min=0))
    position_B.add_(advance_B)
    step_B.add_(advance_B)


def run_logits(head: nn.Sequential, x_BTE: Tensor) -> Tensor:
    """Return final norm and output projection, (B, 1, E) -> (B, 1, V) float32."""
    return head(x_BTE).float()


def run_processors(_: None, logits_BV: Tensor, *rows: Tensor) -> Tensor:
    """Return the logits to sample from; rows: the fields of `ProcessorRows`."""
    return process_logits(logits_BV, ProcessorRows(*rows))


def run_sampler(kind: SamplerKind, _: None, logits_BV: Tensor, *rows: Tensor) -> Tensor:
    """Return a token for each row, (B,); rows: the fields of `SamplerRows`."""
    return sample(logits_BV, SamplerRows(*rows), kind)


@dataclass(frozen=True)
class Parts:
    """The functions above, compiled or not, and one sampler for each kind. head: the module that `logits` runs.

    decode_layers: all blocks of a decode step in one operation, where it can be used. fused_step: a `FusedDecodeStep`,
    a whole step in Triton kernels, on CUDA devices with Triton. fused_sampler: a `FusedSampler`, which takes the place
    of `samplers` and `advance` there.
    needs_mask: False if attention in decode steps finds the used length by itself, without a mask or a cache bucket.
    embed and advance are compiled for CUDA devices only, where each of their operations would be a launch. The full
    sampler is not: with Triton 3.6, Inductor's kernels for its histograms do not wait for the ones that they depend on
    (triton.enable_pdl; found by tools/compile_for_gpu.py).
    """

    decode_layers: DecodeLayers | None
    fused_step: Any
    fused_sampler: Any
    decode_block: StepPart
    prefill_block: StepPart
    block_uncached: StepPart
    embed: StepPart
    logits: StepPart
    head: nn.Sequential
    processors: StepPart
    samplers: dict[SamplerKind, StepPart]
    advance: StepPart
    needs_mask: bool

    @classmethod
    def build(cls, compiler: StepCompiler, model: Qwen3, cache: StaticKVCache) -> Parts:
        """Wrap each part with the compiler; nothing is compiled before its first call."""
        config, device = model.config, cache.keys[0].device
        if device.type == cuda.DEVICE_TYPE:
            cuda.load(device)  # what forms there are is decided before anything is traced
        positions = (POSITIONS._replace(most=cache.allocated_len),)
        rows: Sizes = {0: row_ranges(config, device, cache.max_batch_size)}
        chunk: Sizes = {1: (CHUNK,)}
        tokens: Sizes = {1: (TOKENS._replace(most=_max_uncached(config, cache)),)}
        all_rows = (rows,) * len(ProcessorRows._fields)
        fused_step, fused_sampler = _fused_parts(model, cache) if compiler.enabled else (None, None)
        return cls(
            decode_layers=DecodeLayers(model, cache) if compiler.enabled else None,
            fused_step=fused_step,
            fused_sampler=fused_sampler,
            decode_block=compiler.part(run_block, dynamic=(rows, rows, rows, rows, rows | {2: positions})),
            prefill_block=compiler.part(run_block, dynamic=(chunk, chunk, chunk, chunk, chunk | {2: positions})),
            block_uncached=compiler.part(run_block_uncached, dynamic=(tokens,) * 3),
            embed=compiler.part(run_embed, dynamic=(rows, rows), is_compiled=device.type == cuda.DEVICE_TYPE),
            logits=compiler.part(run_logits, dynamic=(rows,)),
            head=nn.Sequential(model.model.norm, model.lm_head),
            processors=compiler.part(run_processors, dynamic=(rows, *all_rows)),
            samplers={
                kind: compiler.part(
                    partial(run_sampler, kind),
                    dynamic=(rows, *all_rows[: len(SamplerRows._fields)]),
                    is_compiled=kind is not SamplerKind.FULL or device.type != cuda.DEVICE_TYPE,
                )
                for kind in SamplerKind
            },
            advance=compiler.part(run_advance, dynamic=(rows,) * 6, is_compiled=device.type == cuda.DEVICE_TYPE),
            needs_mask=not finds_used_length(device, config.head_dim),
        )


def _max_uncached(config: ModelConfig, cache: StaticKVCache) -> int:
    pairs = config.num_experts_per_tok if config.num_experts else 1
    return min(cache.allocated_len, MAX_SORTED_PAIRS // pairs)


def _fused_parts(model: Qwen3, cache: StaticKVCache) -> tuple[Any, Any]:
    """Return the fused step, which stacks weights if it serves this model, and sampler; None for other devices."""
    if cache.keys[0].device.type != cuda.DEVICE_TYPE or not cuda.use_fused_step() or not cuda.load():
        return None, None
    from qwen3fast.engine.fused_sampler import FusedSampler  # both need Triton
    from qwen3fast.engine.fused_step import FusedDecodeStep

    sampler = FusedSampler(cache.max_batch_size, model.config.vocab_size, cache.keys[0].device)
    return FusedDecodeStep(model, cache), sampler
