"""The buffers of decode steps, allocated once for all rows of the cache, and the kinds of steps.

R rows of the cache   B rows of a step   V vocabulary   N most likely tokens   W words of 32 bits, one bit per token
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qwen3fast.engine.staging import staged, to_device
from qwen3fast.sampling.processors import ProcessorRows
from qwen3fast.sampling.samplers import SamplerKind, SamplerRows

EMPTY = -1  # the position of a row without a request, which takes part in steps and writes nothing that is read
MAX_LOGPROBS = 20  # most likely tokens whose log-probabilities a request can ask for


class RowSampling(NamedTuple):
    """Sampling parameters of one row, as in `SamplerRows`; greedy by default. adapter: its slot, 0 for none."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    adapter: int = 0


GREEDY = RowSampling()


@dataclass(frozen=True)
class DecodeState:
    """Buffers that a step reads and writes, one entry per row.

    Attributes:
        input_R: the token to feed. output_R: the last sampled token, -1 for invalid logits.
        position_R: the position of the input token; EMPTY for a row without a request.
        advance_R: 1 for rows in use, 0 for other rows, whose positions do not advance.
        adapter_R: the slot of the row's adapter; 0 for none. See adapters.py.
        temperature_R and others: as in `SamplerRows`.
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
    adapter_R: Tensor

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

    def begin(self, rows: list[int], lengths: list[int], samplings: list[RowSampling]) -> None:
        """Begin requests in rows whose cache holds so many tokens, in a fixed number of operations."""
        index_B = to_device(rows, self.position_R.device)
        columns = {"position": lengths, "advance": [1] * len(rows), "step": [0] * len(rows)}
        columns |= {name: [getattr(sampling, name) for sampling in samplings] for name in RowSampling._fields}
        for dtype in (torch.int64, torch.float32):
            names = [name for name in columns if getattr(self, f"{name}_R").dtype == dtype]
            numbers = to_device([columns[name] for name in names], index_B.device, dtype)
            for name, column_B in zip(names, numbers, strict=True):
                getattr(self, f"{name}_R").index_copy_(0, index_B, column_B)

    def sampler_rows(self, rows: slice | Tensor) -> SamplerRows:
        """Return the sampling parameters of some rows, a slice or int64 indices."""
        every = (self.temperature_R, self.top_k_R, self.top_p_R, self.min_p_R, self.seed_R, self.step_R)
        # Compiled samplers expect memory that is aligned as by an allocator.
        is_aligned = isinstance(rows, Tensor) or not rows.start
        return SamplerRows(*(t[rows] if is_aligned else t[rows].clone() for t in every))


class ProcessorState:
    """Parameters and token counts of logits processors, for all rows of the cache; neutral for rows without any."""

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
        """Begin a request in a row; arguments are as in `SamplingParams`. Ids must be in the vocabulary."""
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
    """Log-probabilities at one token: of the chosen token, and of the most likely tokens in descending order."""

    chosen: float
    ids: list[int]
    values: list[float]


@dataclass(frozen=True)
class LogprobState:
    """Log-probabilities of a step, float32: of the chosen tokens, and of the N most likely tokens with int64 ids."""

    chosen_R: Tensor
    id_RN: Tensor
    value_RN: Tensor

    @classmethod
    def allocate(cls, rows: int, vocab_size: int, device: torch.device) -> LogprobState:
        """Allocate buffers for `rows` rows."""
        shape = (rows, min(MAX_LOGPROBS, vocab_size))
        return cls(
            torch.zeros(rows, dtype=torch.float32, device=device),
            torch.zeros(shape, dtype=torch.int64, device=device),
            torch.zeros(shape, dtype=torch.float32, device=device),
        )

    def read(self, row: int) -> Logprobs:
        """Return the numbers of one row; the host waits for the device."""
        return Logprobs(self.chosen_R[row].item(), self.id_RN[row].tolist(), self.value_RN[row].tolist())


@dataclass(frozen=True)
class StepKind:
    """The work of a step in addition to the base model's: sampler, logits processors, log-probabilities, adapters."""

    sampler: SamplerKind = SamplerKind.GREEDY
    is_processed: bool = False
    has_logprobs: bool = False
    has_adapters: bool = False
