"""Decode: one step generates one token per row. It reads and writes only buffers that were allocated once (state.py).

The step feeds itself: it samples, writes the token to the input buffer and advances the positions, on the device.
`Parts` (parts.py) holds the functions that it runs, compiled or not. Each takes a module, or None if it uses none, and
tensors. A form is one of several ways to compute the same. Some devices have faster forms of several parts in one:
`fused_step`, `decode_layers`, `fused_sampler`.
Row r is slot r of the cache. Rule of this file: no `.item()`, no shape that depends on data, no new address between
steps.

    B rows of this step   S cache positions   L cache positions read   D head_dim   V vocabulary   N most likely tokens
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qwen3fast.engine.compile import Function
from qwen3fast.engine.decode_layers import DecodeLayers
from qwen3fast.engine.parts import Forward, Parts
from qwen3fast.engine.state import DecodeState, LogprobState, ProcessorState
from qwen3fast.sampling.samplers import SamplerKind, SamplerRows

# Changes the logits of a step, (B, V) float32; row b is row b of the cache.
Hook = Callable[[Tensor], Tensor]


def decode_step(
    forward: Forward,
    state: DecodeState,
    num_rows: int,
    length: int,
    sampler: SamplerKind,
    processors: ProcessorState | None = None,
    logprobs: LogprobState | None = None,
    hook: Hook | None = None,
) -> None:
    """Generate one token for rows 0..num_rows-1, and write it to `state`.

    length: cache positions to read, at least up to the positions of all rows. processors, logprobs: None unless a row
    needs them. hook: changes the logits before the processors; steps with a hook cannot be captured.
    """
    rows, parts, cos_SD, sin_SD = slice(num_rows), forward.parts, forward.cos_SD, forward.sin_SD
    is_greedy, is_plain = sampler is SamplerKind.GREEDY, processors is None and logprobs is None and hook is None
    layers = _all_layers(parts, num_rows)
    if layers is not None and layers.runs_steps and is_plain:
        layers.choose(state, num_rows, cos_SD, sin_SD, is_greedy, parts.forms.of_steps(num_rows))
        return
    if parts.fused_step is not None and parts.fused_step.serves(num_rows):
        if is_plain and is_greedy:
            others = (state.position_R[rows], state.advance_R[rows], state.output_R[rows], state.step_R[rows])
            parts.fused_step.greedy(state.input_R[rows], cos_SD, sin_SD, *others)
            return
        logits_BV = parts.fused_step.logits(state.input_R[rows], cos_SD, sin_SD, state.position_R[rows])
    else:
        logits_BV = _logits(forward, state, rows, length)
    processed_BV = _processed(parts, logits_BV, rows, processors, hook)
    sampler_rows = state.sampler_rows(rows)
    if parts.fused_sampler is not None:  # samples and advances in one
        buffers = (state.advance_R, state.input_R, state.output_R, state.position_R, state.step_R)
        parts.fused_sampler.advance(processed_BV, sampler_rows, sampler, *(tensor[rows] for tensor in buffers))
        _record(parts, logits_BV, state.output_R[rows], state, rows, processors, logprobs)
        return
    token_B = parts.samplers[sampler](None, processed_BV, *sampler_rows)
    _record(parts, logits_BV, token_B, state, rows, processors, logprobs)
    buffers = (state.output_R, state.input_R, state.position_R, state.step_R, state.advance_R)
    parts.advance(None, token_B, *(tensor[rows] for tensor in buffers))


def _all_layers(parts: Parts, num_rows: int) -> DecodeLayers | None:
    """Return the operation that runs all blocks, if it serves this many rows and no plainer form is faster here."""
    layers = parts.decode_layers
    is_used = layers is not None and num_rows not in parts.forms.block_rows and layers.serves(num_rows)
    return layers if is_used else None


def _logits(forward: Forward, state: DecodeState, rows: slice, length: int) -> Tensor:
    """Return the logits after the input tokens, (B, V) float32."""
    parts, cos_SD, sin_SD = forward.parts, forward.cos_SD, forward.sin_SD
    layers = _all_layers(parts, rows.stop)
    if layers is not None:
        tiles = parts.forms.of_steps(rows.stop)
        if layers.runs_steps:
            return layers.logits(state, rows.stop, cos_SD, sin_SD, tiles)
        x_B1E = forward.model.embed(state.input_R[rows, None])
        x_B1E = layers(x_B1E, cos_SD, sin_SD, state.position_R[rows, None], tiles)
    else:
        x_B1E = _run_blocks(forward, state, rows, length)
    logits_B1V: Tensor = parts.logits(parts.head, x_B1E)
    return logits_B1V.squeeze(1)


def _run_blocks(forward: Forward, state: DecodeState, rows: slice, length: int) -> Tensor:
    """Return the last block's output for the input tokens, (B, 1, E), with the blocks one by one."""
    model, parts, cache, *tables = forward
    position_B = state.position_R[rows]
    x_B1E: Tensor
    x_B1E, cos_B1D, sin_B1D = parts.embed(model.model.embed_tokens, state.input_R[rows], position_B, *tables)
    mask_B1L = None
    if parts.needs_mask:
        # A row without a request (position -1) reads position 0, and writes to the last one: see StaticKVCache.
        mask_B1L = torch.arange(length, device=position_B.device) <= position_B.clamp(min=0)[:, None, None]
    shared = (cos_B1D, sin_B1D, position_B[:, None], mask_B1L)
    forms: dict[int, Function] = {}  # one per kind of block: dense or with experts, and its formats of weights
    for block, layer in zip(model.model.layers, cache.layers(), strict=True):
        kind = parts.decode_block.kind(block)
        if kind not in forms:
            forms[kind] = parts.decode_block.choose(block, x_B1E, *shared, *layer.tensors)
        x_B1E = forms[kind](block, x_B1E, *shared, *layer.tensors)
    return x_B1E


def _processed(
    parts: Parts, logits_BV: Tensor, rows: slice, processors: ProcessorState | None, hook: Hook | None
) -> Tensor:
    """Return the logits to sample from, after hook and processors, (B, V) float32."""
    processed_BV = logits_BV if hook is None else hook(logits_BV)
    if processors is not None:
        processed_BV = parts.processors(None, processed_BV, *processors.rows(rows))
    return processed_BV


def _record(
    parts: Parts,
    logits_BV: Tensor,
    token_B: Tensor,
    state: DecodeState,
    rows: slice,
    processors: ProcessorState | None,
    logprobs: LogprobState | None,
) -> None:
    """Count the chosen tokens for processors, and write their log-probabilities under the unprocessed logits.

    Each is done only if a row needs it. A step's rows begin at the first; others, whose memory is not aligned as that
    of an allocator, are recorded by uncompiled functions.
    """
    if processors is not None:
        count = parts.count.function if rows.start else parts.count
        count(None, processors.tensors.count_BV[rows], token_B, state.advance_R[rows])
    if logprobs is not None:
        write = parts.logprobs.function if rows.start else parts.logprobs
        write(None, logits_BV, token_B, logprobs.chosen_R[rows], logprobs.id_RN[rows], logprobs.value_RN[rows])


def choose_tokens(
    parts: Parts,
    logits_BV: Tensor,
    state: DecodeState,
    rows: slice,
    sampler: SamplerKind,
    processors: ProcessorState | None = None,
    logprobs: LogprobState | None = None,
    hook: Hook | None = None,
) -> Tensor:
    """Return the tokens of some rows, (B,) int64, without advancing them: for the first token, whose logits are known.

    Hook, processors, sampler and log-probabilities are applied as in a step.
    """
    processed_BV = _processed(parts, logits_BV, rows, processors, hook)
    token_B = sample_rows(parts, processed_BV, state.sampler_rows(rows), sampler)
    _record(parts, logits_BV, token_B, state, rows, processors, logprobs)
    return token_B


def sample_rows(parts: Parts, logits_BV: Tensor, rows: SamplerRows, sampler: SamplerKind) -> Tensor:
    """Return a token for each row, (B,) int64: what `sample` returns, in memory that the next call may overwrite."""
    if parts.fused_sampler is not None:
        token_B: Tensor = parts.fused_sampler.choose(logits_BV, rows, sampler)
        return token_B
    token_B = parts.samplers[sampler](None, logits_BV, *rows)
    return token_B
