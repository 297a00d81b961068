"""Engine: a model, its cache and its compiled parts, run row by row (prefill) and step by step (decode).

It knows tokens and rows; requests are the scheduler's, text is the Generator's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from qwen3fast.engine.compile import CompileMode, StepCompiler
from qwen3fast.engine.cuda_graph import GraphCache
from qwen3fast.engine.decode import (
    EMPTY,
    DecodeState,
    Hook,
    Logprobs,
    LogprobState,
    ProcessorState,
    StepKind,
    choose_tokens,
    decode_step,
)
from qwen3fast.engine.parts import Parts
from qwen3fast.engine.prefill import Prefill, prefill_step
from qwen3fast.engine.token_ring import TokenRing
from qwen3fast.kv_cache import StaticKVCache
from qwen3fast.model import Qwen3, rope_tables
from qwen3fast.processors import ProcessorRows
from qwen3fast.sampling import SamplerKind

MIN_UNCACHED_TOKENS = 16
# Steps that are launched before the tokens of the one before them are looked at, on CUDA. Enough that launching hides
# behind the device's work; what is computed after a stop token, so many steps at most, is thrown away.
LOOKAHEAD = 4


class StepResult(NamedTuple):
    """Of each row of a step: its token, and what was asked for of log-probabilities (None if no row did)."""

    tokens: list[int]
    logprobs: list[Logprobs] | None


class Engine:
    """Everything that a forward pass needs, with fixed addresses.

    compile=False runs the same code eagerly; cuda_graphs=False launches each kernel of a step from the host.
    lookahead: steps in flight beside the one waited for, see `launch`; by default LOOKAHEAD on CUDA, otherwise 0.
    """

    def __init__(
        self,
        model: Qwen3,
        cache: StaticKVCache,
        device: torch.device,
        compile: CompileMode = True,
        cuda_graphs: bool = True,
        lookahead: int | None = None,
    ) -> None:
        self.model, self.cache, self.device = model, cache, device
        self.compiler = StepCompiler(compile, device)
        self.parts = Parts.build(self.compiler, model, cache)
        self.state = DecodeState.allocate(cache.max_batch_size, device)
        # Allocated when a request first needs them: a row of the vocabulary's size each. They stay where they are then.
        self.processors: ProcessorState | None = None
        self.logprobs: LogprobState | None = None
        self.graphs = GraphCache() if cuda_graphs and device.type == "cuda" else None
        self.lookahead = lookahead if lookahead is not None else LOOKAHEAD if device.type == "cuda" else 0
        self.ring = TokenRing(cache.max_batch_size, self.lookahead + 1, device)
        self._logprob_rings: list[TokenRing] = []
        self._kinds: deque[StepKind] = deque()  # of the steps in flight
        config = model.config
        self.cos_SD, self.sin_SD = rope_tables(
            config.head_dim, config.rope_theta, cache.allocated_len, device, config.yarn
        )

    @torch.no_grad()
    def begin_prefill(self, row: int, token_ids: list[int], reused: int = 0) -> Prefill:
        """Start to fill row `row` of the cache with a prompt; steps of other rows may run before and between chunks.

        reused: tokens at its beginning whose keys and values are in the row already; see `usable_prefix`.
        """
        self.clear_row(row)
        return Prefill.begin(row, token_ids, reused, self.cache.allocated_len)

    @torch.no_grad()
    def prefill_step(self, prefill: Prefill) -> Tensor | None:
        """Compute one chunk. Returns: the logits after the last token, (1, V), if that was the last one."""
        self.compiler.share_processor()
        return prefill_step(self.model, self.parts, self.cache, self.cos_SD, self.sin_SD, prefill)

    def prefill_whole(self, row: int, token_ids: list[int]) -> Tensor:
        """All chunks at once. Returns the logits after the last token, (1, V)."""
        prefill, logits_1V = self.begin_prefill(row, token_ids), None
        while logits_1V is None:
            logits_1V = self.prefill_step(prefill)
        return logits_1V

    @torch.no_grad()
    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copy the keys and values of the first `length` positions from one row to another."""
        for tensor in self.cache.tensors():
            tensor[target, :, :length] = tensor[source, :, :length]

    @torch.no_grad()
    def swap_rows(self, row: int, other: int, length: int) -> None:
        """Exchange two rows: the first `length` positions of the cache, and all that steps read and write of them."""
        processors = self.processors.tensors if self.processors is not None else ()
        pairs = [(t[row, :, :length], t[other, :, :length]) for t in self.cache.tensors()]
        pairs += [(t[row : row + 1], t[other : other + 1]) for t in (*vars(self.state).values(), *processors)]
        for mine, others in pairs:
            kept = mine.clone()
            mine.copy_(others)
            others.copy_(kept)

    @torch.no_grad()
    def set_row(
        self, row: int, length: int, temperature: float, top_k: int, top_p: float, min_p: float, seed: int
    ) -> None:
        """Begin a request in a row whose cache holds `length` tokens."""
        self.state.begin(row, length, temperature, top_k, top_p, min_p, seed)

    @torch.no_grad()
    def set_processors(self, row: int, *arguments: Any) -> None:
        """What changes a row's logits until it is cleared, see `ProcessorState.begin`; its steps must be of a kind that
        is processed."""
        if self.processors is None:
            vocab_size = self.model.config.vocab_size
            self.processors = ProcessorState(self.cache.max_batch_size, vocab_size, self.device)
        self.processors.begin(row, *arguments)

    @torch.no_grad()
    def set_allowed(self, row: int, words_W: np.ndarray) -> None:
        """Which tokens a row may choose from now on: bit v % 32 of word v // 32, int32. After `set_processors`."""
        assert self.processors is not None, "the row needs processors"
        self.processors.allow(row, words_W)

    @torch.no_grad()
    def sample_first(self, row: int, logits_1V: Tensor, kind: StepKind, hook: Hook | None = None) -> StepResult:
        """Sample a row's first token from prefill's logits and make it the row's next input; -1 if they are invalid."""
        rows, (processors, logprobs) = slice(row, row + 1), self._extras(kind)
        token_1 = choose_tokens(self.parts, logits_1V, self.state, rows, kind.sampler, processors, logprobs, hook)
        self.state.input_R[rows] = token_1.clamp(min=0)
        self.state.step_R[row] += 1
        return StepResult([int(token_1.item())], [logprobs.read(row)] if logprobs is not None else None)

    @torch.no_grad()
    def clear_row(self, row: int) -> None:
        """Make a row empty: it may run along in a batch, but leaves its part of the cache as it is."""
        for tensor in (self.state.advance_R, self.state.input_R, self.state.temperature_R):
            tensor[row : row + 1].zero_()
        self.state.position_R[row : row + 1].fill_(EMPTY)

    @torch.no_grad()
    def erase(self, row: int, start: int, end: int) -> None:
        """Zeros at positions start..end-1 of a row: a NaN left there would reach later requests through 0 * NaN."""
        for tensor in self.cache.tensors():
            tensor[row, :, start:end].zero_()

    @torch.no_grad()
    def clear_processors(self, row: int) -> None:
        """Let a row's logits be as they are again."""
        if self.processors is not None:
            self.processors.clear(row)

    @torch.no_grad()
    def launch(self, num_rows: int, used_length: int, kind: StepKind, hook: Hook | None = None) -> None:
        """Start one step for rows 0..num_rows-1 (rounded up to a bucket); `collect` gives its tokens.

        used_length: positions in use after this step by the longest row. The step feeds itself, so up to `lookahead`
        more steps may be started before its tokens are collected. hook: see decode.py; such a step is in no graph.
        """
        self.compiler.share_processor()
        bucket_rows = self.batch_bucket(num_rows)
        length = self.read_length(bucket_rows, used_length)
        extras = self._extras(kind)

        fixed = (self.model, self.parts, self.cache, self.cos_SD, self.sin_SD, self.state)

        def step() -> None:
            decode_step(*fixed, bucket_rows, length, kind.sampler, *extras, hook)

        if self.graphs is not None and hook is None:
            self.graphs.run((bucket_rows, length, kind), step)
        else:
            step()
        self.ring.push(self.state.output_R[:num_rows])
        if kind.has_logprobs:
            for ring, tensor in zip(self._logprob_rings, self._logprob_tensors(), strict=True):
                ring.push(tensor[:num_rows])
        self._kinds.append(kind)

    def read_length(self, bucket_rows: int, used_length: int) -> int:
        """Positions that a step of so many rows may read; a fused step finds out on the device how many it needs."""
        fused = self.parts.fused_step
        if fused is not None and fused.serves(bucket_rows):
            return self.cache.allocated_len
        return self.cache.bucket(used_length)

    def collect(self) -> StepResult:
        """What the oldest step that was launched gave, for each of its rows (and more, of no meaning)."""
        tokens, kind = self.ring.pop(), self._kinds.popleft()
        if not kind.has_logprobs:
            return StepResult(tokens, None)
        columns = [ring.pop() for ring in self._logprob_rings]
        return StepResult(tokens, [Logprobs(*row) for row in zip(*columns, strict=True)])

    def forget(self) -> None:
        """Drop what was launched and not collected."""
        self._kinds.clear()
        for ring in (self.ring, *self._logprob_rings):
            ring.clear()

    def decode(self, num_rows: int, used_length: int, kind: StepKind) -> list[int]:
        """One step at once: `launch` and `collect`. Returns the new token of each of these rows."""
        self.launch(num_rows, used_length, kind)
        return self.collect().tokens[:num_rows]

    def _extras(self, kind: StepKind) -> tuple[ProcessorState | None, LogprobState | None]:
        if kind.has_logprobs and self.logprobs is None:
            rows, slots = self.cache.max_batch_size, self.lookahead + 1
            self.logprobs = LogprobState.allocate(rows, self.model.config.vocab_size, self.device)
            self._logprob_rings = [
                TokenRing(rows, slots, self.device, width=tuple(t.shape[1:]), dtype=t.dtype)
                for t in self._logprob_tensors()
            ]
        return self.processors if kind.is_processed else None, self.logprobs if kind.has_logprobs else None

    def _logprob_tensors(self) -> list[Tensor]:
        assert self.logprobs is not None, "a step has asked for them"
        return [self.logprobs.chosen_R, self.logprobs.id_RN, self.logprobs.value_RN]

    @torch.no_grad()
    def logits_uncached(self, token_ids: list[int]) -> Tensor:
        """The reference without a cache: the whole sequence computed anew. Returns the last token's logits, (1, V)."""
        # Rows after the last token are ignored by causality; a minimum keeps one compiled form for all lengths.
        padded = token_ids + [0] * (MIN_UNCACHED_TOKENS - len(token_ids))
        token_1T = torch.tensor([padded], device=self.device)
        cos_1TD, sin_1TD = self.cos_SD[None, : len(padded)].clone(), self.sin_SD[None, : len(padded)].clone()
        x_1TE = self.model.embed(token_1T)
        for block in self.model.model.layers:
            x_1TE = self.parts.block_uncached(block, x_1TE, cos_1TD, sin_1TD)
        last = len(token_ids) - 1
        return self.parts.logits(
            self.parts.head, x_1TE[:, last : last + 1].clone(memory_format=torch.contiguous_format)
        ).squeeze(1)

    def batch_bucket(self, num_rows: int) -> int:
        """Rows that a step for `num_rows` runs: the next power of two, at most max_batch_size."""
        return min(1 << (num_rows - 1).bit_length(), self.cache.max_batch_size)

    def batch_buckets(self) -> list[int]:
        """All sizes that `batch_bucket` can give."""
        return sorted({self.batch_bucket(n) for n in range(1, self.cache.max_batch_size + 1)})

    @torch.no_grad()
    def warmup(self, report: Callable[[str], None] = lambda part: None) -> None:
        """Compile (and on CUDA capture) everything that a request can need. All rows must be empty.

        Graphs with processors or log-probabilities are recorded when a request first asks for them.
        report: called with the name of each part before it is made.
        """
        self.compiler.end_auto()
        report("prefill")
        logits_1V = self.prefill_whole(0, [0])
        for sampler in SamplerKind:
            report(f"{sampler.value} sampler")
            self.sample_first(0, logits_1V, StepKind(sampler))
        # The smallest cache bucket serves to compile; graphs are recorded for each one, largest first.
        lengths = self.cache.buckets if self.graphs is not None else [1]
        for num_rows in reversed(self.batch_buckets()):
            report(f"decode step, batch {num_rows}")
            for used in reversed(lengths):
                for sampler in SamplerKind:
                    self.decode(num_rows, used, StepKind(sampler))
            neutral = ProcessorRows.neutral(num_rows, self.model.config.vocab_size, self.device)
            self.parts.processors(None, torch.zeros_like(neutral.bias_BV), *neutral)
        self.clear_all()

    def clear_all(self) -> None:
        """Make all rows empty."""
        for row in range(self.cache.max_batch_size):
            self.clear_row(row)

    def num_warmup_parts(self) -> int:
        """How often `warmup` reports."""
        return 1 + len(SamplerKind) + len(self.batch_buckets())

    def close(self) -> None:
        """Release recorded graphs; stop compiling."""
        self.compiler.close()
        if self.graphs is not None:
            self.graphs.clear()
