"""Engine: a model, its cache and its compiled parts, run row by row (prefill) and step by step (decode).

It knows tokens and rows, no requests and no text.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from qwen3fast.engine.compile import CompileMode, StepCompiler
from qwen3fast.engine.cuda_graph import CudaRecorder, GraphCache
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
from qwen3fast.engine.parts import CHUNK_SIZES, MIN_UNCACHED_TOKENS, Parts
from qwen3fast.engine.prefill import CapturedChunks, Prefill, prefill_step
from qwen3fast.engine.staging import to_device
from qwen3fast.engine.token_ring import TokenRing
from qwen3fast.kernels.forms import FIRST, MEASURED
from qwen3fast.model import Qwen3, rope_tables
from qwen3fast.model.kv_cache import StaticKVCache
from qwen3fast.sampling.processors import ProcessorRows
from qwen3fast.sampling.samplers import SamplerKind

# Steps that are launched ahead of the oldest one whose tokens have not been read, on CUDA. They hide the time of
# launching behind the device's work. The steps after a stop token, at most this many, are discarded.
LOOKAHEAD = 4


class StepResult(NamedTuple):
    """The token of each row of a step, and their log-probabilities, None unless the step was to compute them."""

    tokens: list[int]
    logprobs: list[Logprobs] | None


Method = TypeVar("Method", bound=Callable[..., Any])


def _on_device(method: Method) -> Method:
    """Run a method of Engine without gradients, on its device: kernels and events go to the device that is current."""

    @wraps(method)
    def run(self: Engine, *arguments: Any, **keywords: Any) -> Any:
        with torch.no_grad(), torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            return method(self, *arguments, **keywords)

    return cast(Method, run)


class Engine:
    """A model with all buffers of its forward pass, which have fixed addresses.

    compile=False runs the same code eagerly; cuda_graphs=False launches each kernel of a step from the host.
    lookahead: steps that may be launched before the oldest one is collected, see `launch`; by default LOOKAHEAD on
    CUDA, otherwise 0. forms: "measured" uses what is the fastest on this machine; "first" the same everywhere.
    """

    def __init__(
        self,
        model: Qwen3,
        cache: StaticKVCache,
        device: torch.device,
        compile: CompileMode = True,
        cuda_graphs: bool = True,
        lookahead: int | None = None,
        forms: str = MEASURED,
    ) -> None:
        self.model, self.cache, self.device = model, cache, device
        is_cuda = device.type == "cuda"
        self.compiler = StepCompiler(compile, device)
        self.parts = Parts.build(self.compiler, model, cache, is_first=forms == FIRST)
        self.state = DecodeState.allocate(cache.max_batch_size, device)
        # Allocated when a request first needs them, since rows are as long as the vocabulary; then they do not move.
        self.processors: ProcessorState | None = None
        self.logprobs: LogprobState | None = None
        self.graphs: GraphCache | None = None
        self.captured: CapturedChunks | None = None
        if cuda_graphs and is_cuda:
            self._use_graphs(GraphCache(CudaRecorder(device)))
        self.lookahead = lookahead if lookahead is not None else LOOKAHEAD if is_cuda else 0
        self.ring = TokenRing(cache.max_batch_size, self.lookahead + 1, device)
        self._logprob_rings: list[TokenRing] = []
        self._kinds: deque[StepKind] = deque()  # of the steps in flight
        config = model.config
        self.cos_SD, self.sin_SD = rope_tables(
            config.head_dim, config.rope_theta, cache.allocated_len, device, config.yarn
        )

    def _use_graphs(self, graphs: GraphCache) -> None:
        """Run decode steps, and first chunks of prompts, through these graphs."""
        self.graphs = graphs
        self.captured = CapturedChunks(graphs, self.model.config.vocab_size, self.device)

    @_on_device
    def begin_prefill(self, row: int, token_ids: list[int], reused: int = 0) -> Prefill:
        """Begin to fill row `row` of the cache with a prompt; steps of other rows may run before and between chunks.

        reused: number of its first tokens whose keys and values are in the row already; see `usable_prefix`.
        """
        self.clear_row(row)
        return Prefill.begin(row, token_ids, reused, self.cache.allocated_len)

    @_on_device
    def prefill_step(self, prefill: Prefill) -> Tensor | None:
        """Compute one chunk. Returns: after the last chunk, the logits of the last token, (1, V); otherwise None."""
        self.compiler.share_processor()
        with self.compiler.quiet:
            return prefill_step(self.model, self.parts, self.cache, self.cos_SD, self.sin_SD, prefill, self.captured)

    def prefill_whole(self, row: int, token_ids: list[int]) -> Tensor:
        """Compute all chunks of a prompt. Returns: the logits of its last token, (1, V)."""
        prefill, logits_1V = self.begin_prefill(row, token_ids), None
        while logits_1V is None:
            logits_1V = self.prefill_step(prefill)
        return logits_1V

    @_on_device
    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copy the keys and values of the first `length` positions from one row to another."""
        for tensor in self.cache.tensors():
            tensor[target, :, :length] = tensor[source, :, :length]

    @_on_device
    def swap_rows(self, row: int, other: int, length: int) -> None:
        """Exchange two rows: the first `length` positions of the cache, and all that steps read and write for them."""
        processors = self.processors.tensors if self.processors is not None else ()
        pairs = [(t[row, :, :length], t[other, :, :length]) for t in self.cache.tensors()]
        pairs += [(t[row : row + 1], t[other : other + 1]) for t in (*vars(self.state).values(), *processors)]
        for mine, others in pairs:
            kept = mine.clone()
            mine.copy_(others)
            others.copy_(kept)

    @_on_device
    def set_row(
        self, row: int, length: int, temperature: float, top_k: int, top_p: float, min_p: float, seed: int
    ) -> None:
        """Begin a request in a row whose cache holds `length` tokens."""
        self.state.begin(row, length, temperature, top_k, top_p, min_p, seed)

    @_on_device
    def set_processors(self, row: int, *arguments: Any) -> None:
        """Set the logits processors of a row until it is cleared, see `ProcessorState.begin`.

        Its steps must be of a kind with `is_processed`.
        """
        if self.processors is None:
            vocab_size = self.model.config.vocab_size
            self.processors = ProcessorState(self.cache.max_batch_size, vocab_size, self.device)
        self.processors.begin(row, *arguments)

    @_on_device
    def set_allowed(self, row: int, words_W: np.ndarray) -> None:
        """Set which tokens a row may choose from now on: bit v % 32 of word v // 32, int32.

        Call `set_processors` first.
        """
        assert self.processors is not None, "the row needs processors"
        self.processors.allow(row, words_W)

    @_on_device
    def sample_first(self, row: int, logits_1V: Tensor, kind: StepKind, hook: Hook | None = None) -> StepResult:
        """Sample a row's first token from the logits of its prompt, and feed it to the next step.

        The token is -1 if the logits are invalid.
        """
        rows, (processors, logprobs) = slice(row, row + 1), self._extras(kind)
        token_1 = choose_tokens(self.parts, logits_1V, self.state, rows, kind.sampler, processors, logprobs, hook)
        self.state.input_R[rows] = token_1.clamp(min=0)
        self.state.step_R[row] += 1
        return StepResult([int(token_1.item())], [logprobs.read(row)] if logprobs is not None else None)

    @_on_device
    def clear_row(self, row: int) -> None:
        """Make a row empty: it may take part in steps, and leaves its cache as it is."""
        for tensor in (self.state.advance_R, self.state.input_R, self.state.temperature_R):
            tensor[row : row + 1].zero_()
        self.state.position_R[row : row + 1].fill_(EMPTY)

    @_on_device
    def erase(self, row: int, start: int, end: int) -> None:
        """Write zeros to positions start..end-1 of a row: a NaN there would reach later requests through 0 * NaN."""
        for tensor in self.cache.tensors():
            tensor[row, :, start:end].zero_()

    @_on_device
    def clear_processors(self, row: int) -> None:
        """Remove the logits processors of a row."""
        if self.processors is not None:
            self.processors.clear(row)

    @_on_device
    def launch(self, num_rows: int, used_length: int, kind: StepKind, hook: Hook | None = None) -> None:
        """Launch one step for rows 0..num_rows-1 (rounded up to a bucket); `collect` returns its tokens.

        used_length: positions in use after this step by the longest row. The step feeds itself: up to `lookahead` more
        steps may be launched before its tokens are collected. hook: see decode.py; a step with one is not captured.
        """
        self.compiler.share_processor()
        bucket_rows = self.batch_bucket(num_rows)
        length = self.read_length(bucket_rows, used_length)
        extras = self._extras(kind)

        fixed = (self.model, self.parts, self.cache, self.cos_SD, self.sin_SD, self.state)

        def step() -> None:
            decode_step(*fixed, bucket_rows, length, kind.sampler, *extras, hook)

        with self.compiler.quiet:
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
        """Return the positions that a step of so many rows may read.

        Where attention finds the used length on the device, all of them: one graph serves all lengths.
        """
        fused = self.parts.fused_step
        if not self.parts.needs_mask or (fused is not None and fused.serves(bucket_rows)):
            return self.cache.allocated_len
        return self.cache.bucket(used_length)

    @_on_device
    def collect(self) -> StepResult:
        """Return the results of the oldest step that was launched; entries beyond its rows have no meaning."""
        tokens, kind = self.ring.pop(), self._kinds.popleft()
        if not kind.has_logprobs:
            return StepResult(tokens, None)
        columns = [ring.pop() for ring in self._logprob_rings]
        return StepResult(tokens, [Logprobs(*row) for row in zip(*columns, strict=True)])

    def forget(self) -> None:
        """Discard the results of steps that were launched and not collected."""
        self._kinds.clear()
        for ring in (self.ring, *self._logprob_rings):
            ring.clear()

    def decode(self, num_rows: int, used_length: int, kind: StepKind) -> list[int]:
        """Launch one step and collect it. Returns: the new token of each row."""
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

    @_on_device
    def logits_uncached(self, token_ids: list[int]) -> Tensor:
        """Return the last token's logits, (1, V), computed without a cache: the reference of the cached steps."""
        # Tokens after the last one change nothing, by causality. A minimum keeps one compiled form for all lengths.
        padded = token_ids + [0] * (MIN_UNCACHED_TOKENS - len(token_ids))
        token_1T = to_device([padded], self.device)
        cos_1TD, sin_1TD = (
            table_SD[None, : len(padded)].clone(memory_format=torch.contiguous_format)
            for table_SD in (self.cos_SD, self.sin_SD)
        )
        x_1TE = self.model.embed(token_1T)
        for block in self.model.model.layers:
            x_1TE = self.parts.block_uncached(block, x_1TE, cos_1TD, sin_1TD)
        last = len(token_ids) - 1
        return self.parts.logits(
            self.parts.head, x_1TE[:, last : last + 1].clone(memory_format=torch.contiguous_format)
        ).squeeze(1)

    def batch_bucket(self, num_rows: int) -> int:
        """Return the rows of a step for `num_rows`: the next power of two, at most max_batch_size."""
        return min(1 << (num_rows - 1).bit_length(), self.cache.max_batch_size)

    def batch_buckets(self) -> list[int]:
        """Return all sizes that `batch_bucket` can return."""
        return sorted({self.batch_bucket(n) for n in range(1, self.cache.max_batch_size + 1)})

    @_on_device
    def warmup(self, report: Callable[[str], None] = lambda part: None) -> None:
        """Compile, and on CUDA capture, everything that a request can need. All rows must be empty.

        Graphs with processors or log-probabilities are captured when a request first needs them.
        report: called with the name of each part before it is compiled.
        """
        self.compiler.end_auto()
        self.parts.decide_forms()
        report("prefill")
        sizes = CHUNK_SIZES if self.graphs is not None else CHUNK_SIZES[:1]
        for size in reversed([size for size in sizes if size <= self.cache.allocated_len]):
            logits_1V = self.prefill_whole(0, [0] * size)
        for sampler in SamplerKind:
            report(f"{sampler.value} sampler")
            self.sample_first(0, logits_1V, StepKind(sampler))
        # The smallest cache bucket serves to compile. Graphs that depend on it are captured for each, largest first.
        lengths = self.cache.buckets if self.graphs is not None and self.parts.needs_mask else [1]
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
        """Return how often `warmup` reports."""
        return 1 + len(SamplerKind) + len(self.batch_buckets())

    def close(self) -> None:
        """Release captured graphs; stop compiling."""
        self.compiler.close()
        if self.graphs is not None:
            self.graphs.clear()
