"""Decode: one step makes one token per row, reading and writing only buffers that were allocated once.

The step feeds itself: it samples, writes the token into the input buffer and advances the positions on the device.
Rule of this file: no `.item()`, no shape that depends on data, no new address between steps.

    R rows of the cache   B rows of this step   L cache positions read   D head_dim   V vocabulary
    N most likely tokens
    W words of 32 bits, one bit for each token of V
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qwen3fast.engine.compile import Function
from qwen3fast.engine.parts import Parts
from qwen3fast.engine.staging import staged, to_device
from qwen3fast.model import Qwen3
from qwen3fast.model.kv_cache import StaticKVCache
from qwen3fast.sampling.processors import ProcessorRows, count_token, log_probabilities
from qwen3fast.sampling.samplers import SamplerKind, SamplerRows

EMPTY = -1  # the position of a row without a request, which takes part in steps and writes nothing that is read
MOST_LOGPROBS = 20  # most likely tokens whose log-probabilities a request can ask for

# Changes the logits of a step, (B, V) float32; row b is row b of the cache.
Hook = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class DecodeState:
    """Buffers that a step reads and writes, one entry per row. Fields of `SamplerRows` have the same meaning here.

    input_R: the token to feed, int64. output_R: the token sampled last, -1 for invalid logits. position_R: where the
    input token stands, EMPTY for a row without a request. advance_R: 1 for rows in use, 0 for the others, which do not
    move.
    """

    input_R: Tensor
    output_R: Tensor
    position_R: Tensor
    advance_R: Tensor
    temperature_R: Tensor
    top_k_R: Tensor
    top_p_R: Tensor
    min_p_R: Tensor
    seed_R: Tensor
    step_R: Tensor

    @classmethod
    def allocate(cls, rows: int, device: torch.device) -> DecodeState:
        """Allocate buffers for `rows` rows, all empty."""
        real = {"temperature_R", "top_p_R", "min_p_R"}
        state = cls(
            **{
                f.name: torch.zeros(rows, dtype=torch.float32 if f.name in real else torch.int64, device=device)
                for f in fields(cls)
            }
        )
        state.position_R.fill_(EMPTY)
        return state

    def begin(
        self, row: int, length: int, temperature: float, top_k: int, top_p: float, min_p: float, seed: int
    ) -> None:
        """Begin a request in a row whose cache holds `length` tokens."""
        names = ("position_R", "advance_R", "step_R", "temperature_R", "top_k_R", "top_p_R", "min_p_R", "seed_R")
        for name, number in zip(names, (length, 1, 0, temperature, top_k, top_p, min_p, seed), strict=True):
            getattr(self, name)[row : row + 1].fill_(number)  # assigning to [row] would wait for the device

    def sampler_rows(self, rows: slice) -> SamplerRows:
        """Return the sampling parameters of some rows."""
        every = (self.temperature_R, self.top_k_R, self.top_p_R, self.min_p_R, self.seed_R, self.step_R)
        # Compiled samplers expect memory to begin where an allocator would let it.
        return SamplerRows(*(t[rows] if not rows.start else t[rows].clone() for t in every))


class ProcessorState:
    """Parameters and history of logits processors, for all rows of the cache; rows that need none are neutral."""

    def __init__(self, rows: int, vocab_size: int, device: torch.device) -> None:
        """Allocate buffers for `rows` rows, all neutral. tensors: entry b is row b of the cache."""
        self.tensors = ProcessorRows.neutral(rows, vocab_size, device)

    def rows(self, rows: slice) -> ProcessorRows:
        """Return the buffers of some rows."""
        return ProcessorRows(*(tensor[rows] for tensor in self.tensors))

    def begin(
        self,
        row: int,
        prompt_ids: list[int],
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        allowed_token_ids: Iterable[int] | None = None,
    ) -> None:
        """Begin a request with these `SamplingParams` in a row. Ids must be in the vocabulary."""
        self.clear(row)
        own, device = self.rows(slice(row, row + 1)), self.tensors.bias_BV.device
        own.repetition_penalty_B.fill_(repetition_penalty)
        own.presence_penalty_B.fill_(presence_penalty)
        own.frequency_penalty_B.fill_(frequency_penalty)
        own.in_prompt_BV.index_fill_(1, to_device(prompt_ids, device), True)
        if allowed_token_ids is not None:
            own.bias_BV.fill_(-torch.inf)
            own.bias_BV.index_fill_(1, to_device(list(allowed_token_ids), device), 0.0)
        if logit_bias:
            biases = to_device([list(logit_bias.values())], device, torch.float32)
            own.bias_BV.index_add_(1, to_device(list(logit_bias), device), biases)

    def allow(self, row: int, words_W: np.ndarray) -> None:
        """Forbid the tokens whose bits are 0 in words_W, int32: bit v % 32 of word v // 32."""
        allowed_BW = self.tensors.allowed_BW
        words_1W = staged(torch.from_numpy(words_W)[None], allowed_BW.device)
        allowed_BW[row : row + 1].copy_(words_1W, non_blocking=True)

    def clear(self, row: int) -> None:
        """Make a row neutral."""
        for tensor, neutral in zip(self.tensors, (1, 0, 0, 0, 0, 0, -1), strict=True):
            tensor[row : row + 1].fill_(neutral)


class Logprobs(NamedTuple):
    """Log-probabilities at one token: of the chosen one, and of the most likely ones in descending order."""

    chosen: float
    ids: list[int]
    values: list[float]


@dataclass(frozen=True)
class LogprobState:
    """Log-probabilities of a step: of the chosen token, (R,) float32, and of the N most likely ones, ids int64."""

    chosen_R: Tensor
    id_RN: Tensor
    value_RN: Tensor

    @classmethod
    def allocate(cls, rows: int, vocab_size: int, device: torch.device) -> LogprobState:
        """Allocate buffers for `rows` rows."""
        shape = (rows, min(MOST_LOGPROBS, vocab_size))
        return cls(
            torch.zeros(rows, device=device),
            torch.zeros(shape, dtype=torch.int64, device=device),
            torch.zeros(shape, device=device),
        )

    def read(self, row: int) -> Logprobs:
        """Return the numbers of one row; the host waits for the device."""
        return Logprobs(self.chosen_R[row].item(), self.id_RN[row].tolist(), self.value_RN[row].tolist())


@dataclass(frozen=True)
class StepKind:
    """The work of a step beside the forward pass: its sampler, logits processors, and log-probabilities."""

    sampler: SamplerKind = SamplerKind.GREEDY
    is_processed: bool = False
    has_logprobs: bool = False


def decode_step(
    model: Qwen3,
    parts: Parts,
    cache: StaticKVCache,
    cos_SD: Tensor,
    sin_SD: Tensor,
    state: DecodeState,
    num_rows: int,
    length: int,
    sampler: SamplerKind,
    processors: ProcessorState | None = None,
    logprobs: LogprobState | None = None,
    hook: Hook | None = None,
) -> None:
    """Advance rows 0..num_rows-1 by one token. `length` must cover the positions of rows in use; results: in `state`.

    processors, logprobs: given if a row needs them. hook: changes the logits before the processors; steps with one
    cannot be captured.
    """
    rows = slice(num_rows)
    if parts.fused_step is not None and parts.fused_step.serves(num_rows):
        if sampler is SamplerKind.GREEDY and processors is None and logprobs is None and hook is None:
            changed = (state.position_R[rows], state.advance_R[rows], state.output_R[rows], state.step_R[rows])
            parts.fused_step.greedy(state.input_R[rows], cos_SD, sin_SD, *changed)
            return
        logits_BV = parts.fused_step.logits(state.input_R[rows], cos_SD, sin_SD, state.position_R[rows])
    else:
        logits_BV = _logits(model, parts, cache, cos_SD, sin_SD, state, rows, length)
    changed_BV = _changed(parts, logits_BV, rows, processors, hook)
    sampler_rows = state.sampler_rows(rows)
    if parts.fused_sampler is not None:
        written = (state.advance_R, state.input_R, state.output_R, state.position_R, state.step_R)
        parts.fused_sampler.advance(changed_BV, sampler_rows, sampler, *(tensor[rows] for tensor in written))
        _record(logits_BV, state.output_R[rows], state, rows, processors, logprobs)
        return
    token_B = parts.samplers[sampler](None, changed_BV, *sampler_rows)
    _record(logits_BV, token_B, state, rows, processors, logprobs)
    written = (state.output_R, state.input_R, state.position_R, state.step_R, state.advance_R)
    parts.advance(None, token_B, *(tensor[rows] for tensor in written))


def _logits(
    model: Qwen3,
    parts: Parts,
    cache: StaticKVCache,
    cos_SD: Tensor,
    sin_SD: Tensor,
    state: DecodeState,
    rows: slice,
    length: int,
) -> Tensor:
    """Return the logits after the input tokens of rows 0.., (B, V) float32."""
    if parts.decode_layers is not None and parts.decode_layers.serves(rows.stop):
        x_B1E = model.embed(state.input_R[rows, None])
        x_B1E = parts.decode_layers(x_B1E, cos_SD, sin_SD, state.position_R[rows, None])
    else:
        x_B1E = _run_blocks(model, parts, cache, cos_SD, sin_SD, state, rows, length)
    return parts.logits(parts.head, x_B1E).squeeze(1)


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
    """Return the tokens of some rows, (B,) int64, from their logits: hook, processors, sampler, log-probabilities."""
    changed_BV = _changed(parts, logits_BV, rows, processors, hook)
    if parts.fused_sampler is not None:
        token_B = parts.fused_sampler.choose(changed_BV, state.sampler_rows(rows), sampler)
    else:
        token_B = parts.samplers[sampler](None, changed_BV, *state.sampler_rows(rows))
    _record(logits_BV, token_B, state, rows, processors, logprobs)
    return token_B


def _changed(
    parts: Parts, logits_BV: Tensor, rows: slice, processors: ProcessorState | None, hook: Hook | None
) -> Tensor:
    """Return the logits to sample from, (B, V) float32."""
    changed_BV = logits_BV if hook is None else hook(logits_BV)
    return changed_BV if processors is None else parts.processors(None, changed_BV, *processors.rows(rows))


def _record(
    logits_BV: Tensor,
    token_B: Tensor,
    state: DecodeState,
    rows: slice,
    processors: ProcessorState | None,
    logprobs: LogprobState | None,
) -> None:
    """Count the chosen tokens, and write their log-probabilities, for what needs them."""
    if processors is not None:
        count_token(processors.tensors.count_BV[rows], token_B, state.advance_R[rows])
    if logprobs is not None:
        chosen_B, id_BN, value_BN = log_probabilities(logits_BV, token_B, logprobs.id_RN.shape[1])
        logprobs.chosen_R[rows], logprobs.id_RN[rows], logprobs.value_RN[rows] = chosen_B, id_BN, value_BN


def _run_blocks(
    model: Qwen3,
    parts: Parts,
    cache: StaticKVCache,
    cos_SD: Tensor,
    sin_SD: Tensor,
    state: DecodeState,
    rows: slice,
    length: int,
) -> Tensor:
    position_B = state.position_R[rows]
    x_B1E, cos_B1D, sin_B1D = parts.embed(model.model.embed_tokens, state.input_R[rows], position_B, cos_SD, sin_SD)
    mask_B1L = None
    if parts.needs_mask:
        # An empty row reads one position, and writes, at -1, to the last one, which nothing reads (see StaticKVCache).
        mask_B1L = torch.arange(length, device=position_B.device) <= position_B.clamp(min=0)[:, None, None]
    shared = (cos_B1D, sin_B1D, position_B[:, None], mask_B1L)
    forms: dict[int, Function] = {}  # with and without experts, in each mixture of formats
    for block, layer in zip(model.model.layers, cache.layers(), strict=True):
        kind = parts.decode_block.kind(block)
        if kind not in forms:
            forms[kind] = parts.decode_block.choose(block, x_B1E, *shared, *layer)
        x_B1E = forms[kind](block, x_B1E, *shared, *layer)
    return x_B1E
