"""Decode: one step makes one token for each row, reading and writing only buffers that were allocated once.

The step feeds itself: it samples, writes the token into the input buffer and advances the positions on the device.
Rule of this file: no `.item()`, no shape that depends on data, no new address between steps.

    R rows of the cache   B rows of this step   L cache positions read   D head_dim   V vocabulary   N likeliest tokens
    W words of 32 bits, a bit for each of V
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
from qwen3fast.model import Qwen3
from qwen3fast.model.kv_cache import StaticKVCache
from qwen3fast.sampling.processors import ProcessorRows, count_token, log_probabilities
from qwen3fast.sampling.samplers import SamplerKind, SamplerRows

EMPTY = -1  # the position of a row without a request: it runs along, reading little and writing nothing that is read
MOST_LOGPROBS = 20  # likeliest tokens whose log-probabilities can be had

# Changes the logits of a step, (B, V) float32; row b is row b of the cache.
Hook = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class DecodeState:
    """What a step reads and writes, one entry a row. Fields of `SamplerRows` have the same meaning here.

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
        """Buffers for `rows` rows, all empty."""
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
        """A request begins in a row whose cache holds `length` tokens."""
        names = ("position_R", "advance_R", "step_R", "temperature_R", "top_k_R", "top_p_R", "min_p_R", "seed_R")
        for name, number in zip(names, (length, 1, 0, temperature, top_k, top_p, min_p, seed), strict=True):
            getattr(self, name)[row : row + 1].fill_(number)  # assigning to [row] would wait for the device

    def sampler_rows(self, rows: slice) -> SamplerRows:
        """The sampling parameters of some rows."""
        every = (self.temperature_R, self.top_k_R, self.top_p_R, self.min_p_R, self.seed_R, self.step_R)
        # Compiled samplers expect memory to begin where an allocator would let it.
        return SamplerRows(*(t[rows] if not rows.start else t[rows].clone() for t in every))


class ProcessorState:
    """What processors of logits read, for all rows of the cache; rows that need none are neutral."""

    def __init__(self, rows: int, vocab_size: int, device: torch.device) -> None:
        """Buffers for `rows` rows, all neutral. tensors: entry b is row b of the cache."""
        self.tensors = ProcessorRows.neutral(rows, vocab_size, device)

    def rows(self, rows: slice) -> ProcessorRows:
        """Those of some rows."""
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
        """A request with these `SamplingParams` begins in a row. Ids must be in the vocabulary."""
        self.clear(row)
        own, device = self.rows(slice(row, row + 1)), self.tensors.bias_BV.device
        own.repetition_penalty_B.fill_(repetition_penalty)
        own.presence_penalty_B.fill_(presence_penalty)
        own.frequency_penalty_B.fill_(frequency_penalty)
        own.in_prompt_BV.index_fill_(1, torch.tensor(prompt_ids, device=device), True)
        if allowed_token_ids is not None:
            own.bias_BV.fill_(-torch.inf)
            own.bias_BV.index_fill_(1, torch.tensor(list(allowed_token_ids), device=device), 0.0)
        if logit_bias:
            biases = torch.tensor(list(logit_bias.values()), dtype=torch.float32, device=device)
            own.bias_BV.index_add_(1, torch.tensor(list(logit_bias), device=device), biases[None])

    def allow(self, row: int, words_W: np.ndarray) -> None:
        """Forbid the tokens whose bits are 0 in words_W, int32: bit v % 32 of word v // 32."""
        self.tensors.allowed_BW[row : row + 1].copy_(torch.from_numpy(words_W)[None])

    def clear(self, row: int) -> None:
        """Make a row neutral."""
        for tensor, neutral in zip(self.tensors, (1, 0, 0, 0, 0, 0, -1), strict=True):
            tensor[row : row + 1].fill_(neutral)


class Logprobs(NamedTuple):
    """Log-probabilities at one token: of the chosen one, and of the likeliest ones, the likeliest first."""

    chosen: float
    ids: list[int]
    values: list[float]


@dataclass(frozen=True)
class LogprobState:
    """Log-probabilities of a step: of the chosen token, (R,) float32, and of the N likeliest ones, ids int64."""

    chosen_R: Tensor
    id_RN: Tensor
    value_RN: Tensor

    @classmethod
    def allocate(cls, rows: int, vocab_size: int, device: torch.device) -> LogprobState:
        """Buffers for `rows` rows."""
        shape = (rows, min(MOST_LOGPROBS, vocab_size))
        return cls(
            torch.zeros(rows, device=device),
            torch.zeros(shape, dtype=torch.int64, device=device),
            torch.zeros(shape, device=device),
        )

    def read(self, row: int) -> Logprobs:
        """Those of one row; the host waits for the device."""
        return Logprobs(self.chosen_R[row].item(), self.id_RN[row].tolist(), self.value_RN[row].tolist())


@dataclass(frozen=True)
class StepKind:
    """What a step does beside the forward pass: which sampler, and whether logits are processed or recorded."""

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
    """Run rows 0..num_rows-1 one token further. `length` must cover the positions of rows in use; results: in `state`.

    processors, logprobs: given if a row needs them. hook: changes the logits before that; it is not for graphs.
    """
    rows = slice(num_rows)
    position_B1 = state.position_R[rows, None]
    x_B1E = model.embed(state.input_R[rows, None])
    if parts.decode_layers is not None and parts.decode_layers.serves(num_rows):
        x_B1E = parts.decode_layers(x_B1E, cos_SD, sin_SD, position_B1)
    else:
        x_B1E = _run_blocks(model, parts, cache, x_B1E, cos_SD, sin_SD, position_B1, length)
    logits_BV = parts.logits(parts.head, x_B1E).squeeze(1)
    token_B = choose_tokens(parts, logits_BV, state, rows, sampler, processors, logprobs, hook)
    state.output_R[rows] = token_B
    # An invalid token (-1) is the host's to notice; what is fed on must be an id.
    state.input_R[rows] = token_B.clamp(min=0)
    state.position_R[rows] += state.advance_R[rows]
    state.step_R[rows] += state.advance_R[rows]


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
    """From logits to tokens of some rows, (B,) int64: hook, processors, sampler, and what is written down of it."""
    changed_BV = logits_BV if hook is None else hook(logits_BV)
    if processors is not None:
        changed_BV = parts.processors(None, changed_BV, *processors.rows(rows))
    token_B = parts.samplers[sampler](None, changed_BV, *state.sampler_rows(rows))
    if processors is not None:
        count_token(processors.tensors.count_BV[rows], token_B, state.advance_R[rows])
    if logprobs is not None:
        chosen_B, id_BN, value_BN = log_probabilities(logits_BV, token_B, logprobs.id_RN.shape[1])
        logprobs.chosen_R[rows], logprobs.id_RN[rows], logprobs.value_RN[rows] = chosen_B, id_BN, value_BN
    return token_B


def _run_blocks(
    model: Qwen3,
    parts: Parts,
    cache: StaticKVCache,
    x_B1E: Tensor,
    cos_SD: Tensor,
    sin_SD: Tensor,
    position_B1: Tensor,
    length: int,
) -> Tensor:
    # An empty row reads one position, and writes, at -1, to the last one, which nothing reads (see StaticKVCache).
    read_B1 = position_B1.clamp(min=0)
    mask_B1L = torch.arange(length, device=position_B1.device) <= read_B1[..., None]
    shared = (cos_SD[read_B1], sin_SD[read_B1], position_B1, mask_B1L)
    layers = cache.layers()
    forms: dict[int, Function] = {}  # with and without experts, in each mixture of formats
    for block, layer in zip(model.model.layers, layers, strict=True):
        kind = parts.decode_block.kind(block)
        if kind not in forms:
            forms[kind] = parts.decode_block.choose(block, x_B1E, *shared, *layer.tensors)
        x_B1E = forms[kind](block, x_B1E, *shared, *layer.tensors)
    return x_B1E
