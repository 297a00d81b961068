"""Engine: a model with its cache and compiled parts. It prefills rows in chunks and decodes all rows together.

It knows tokens and rows; it does not know requests and text. Row r is slot r of the cache; operations on single rows,
such as copies, are in rows.py. Results on their way to the host are in in_flight.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qwen3fast.engine.adapters import NO_ADAPTER, AdapterSlots, Matrices
from qwen3fast.engine.compile import CompileMode, StepCompiler
from qwen3fast.engine.cuda_graph import CudaRecorder, GraphCache
from qwen3fast.engine.decode import Hook, choose_tokens, decode_step, sample_rows
from qwen3fast.engine.in_flight import StepResult, StepsInFlight
from qwen3fast.engine.parts import (
    CHUNK_SIZES,
    MIN_UNCACHED_TOKENS,
    Forward,
    Parts,
    chunk_sizes,
    fit_weights,
    move_to_huge_pages,
)
from qwen3fast.engine.prefill import (
    CHUNK_COST,
    CPP_CHUNK_COST,
    CapturedChunks,
    Prefill,
    graph_prompts,
    max_prompts,
    prefill_together,
)
from qwen3fast.engine.prompt_logprobs import WantedLogprobs, chunk_logprobs
from qwen3fast.engine.rows import Rows, on_device
from qwen3fast.engine.staging import to_device
from qwen3fast.engine.state import Logprobs, LogprobState, ProcessorState, StepKind
from qwen3fast.kernels.attention import finds_used_length_of_chunks
from qwen3fast.kernels.forms import FIRST, MEASURED
from qwen3fast.kernels.grouped import waits_for_device
from qwen3fast.model import Qwen3, rope_tables
from qwen3fast.model.kv_cache import StaticKVCache
from qwen3fast.sampling.processors import ProcessorRows
from qwen3fast.sampling.samplers import SamplerKind

# Steps launched on CUDA ahead of the one whose tokens are read: the device has work while the host launches them. At
# most this many steps after a stop token are discarded.
LOOKAHEAD = 4


class Engine(Rows):
    """A model with all buffers of its forward pass, at fixed addresses.

    compile: False runs the same code eagerly. cuda_graphs: False launches each kernel of a step from the host.
    lookahead: steps that may be launched before the oldest one is collected, see `launch`; by default LOOKAHEAD on
    CUDA, otherwise 0. forms: of several ways to compute a result, "measured" uses the fastest on this machine, "first"
    the first that kernels/cases.py and engine/forms.py name.
    max_adapters, max_adapter_rank: room for LoRA adapters, allocated at once; 0 adapters for none.

    Attributes:
        adapters: the slots of adapters, 1 to max_adapters; None without room for any.
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
        max_adapters: int = 0,
        max_adapter_rank: int = 16,
    ) -> None:
        super().__init__(cache, model.config.vocab_size, device)
        self.model = model
        is_cuda = device.type == "cuda"
        self.compiler = StepCompiler(compile, device)
        self.parts = Parts.build(self.compiler, model, cache, is_first=forms == FIRST)
        self.adapters: AdapterSlots | None = None
        if max_adapters:
            self.adapters = AdapterSlots(model, max_adapters, max_adapter_rank, self.state.adapter_R)
            layers = self.parts.decode_layers
            self._adapted_layers = layers.with_adapters(self.adapters) if layers is not None else None
        self.logprobs: LogprobState | None = None  # allocated when a request first needs them
        self.graphs: GraphCache | None = None
        self.captured: CapturedChunks | None = None
        if cuda_graphs and is_cuda:
            self._use_graphs(GraphCache(CudaRecorder(device)))
        self.lookahead = lookahead if lookahead is not None else LOOKAHEAD if is_cuda else 0
        self.in_flight = StepsInFlight(cache.max_batch_size, self.lookahead + 1, device)
        config = model.config
        self.cos_SD, self.sin_SD = rope_tables(
            config.head_dim, config.rope_theta, cache.allocated_len, device, config.yarn
        )

    def _use_graphs(self, graphs: GraphCache) -> None:
        """Run decode steps through these graphs, and chunks of prompts unless the host takes part in them."""
        self.graphs = graphs
        config, dtype = self.model.config, self.model.model.norm.weight.dtype
        sizes = (config.hidden_size, config.moe_intermediate_size) if config.num_experts else ()
        if any(waits_for_device(self.device, dtype, size) for size in sizes):
            return
        serves_later = finds_used_length_of_chunks(self.device, config.head_dim)
        slots = self.cache.max_batch_size
        self.captured = CapturedChunks(graphs, config.vocab_size, slots, self.device, serves_later)

    @on_device
    def begin_prefill(
        self,
        row: int,
        token_ids: list[int],
        reused: int = 0,
        wanted: WantedLogprobs | None = None,
        adapter: int = NO_ADAPTER,
    ) -> Prefill:
        """Begin to fill a row of the cache with a prompt; steps of other rows may run before and between chunks.

        reused: number of first tokens whose keys and values are in the row already, see `usable_prefix`.
        wanted: log-probabilities to compute on the way, of tokens after the reused ones.
        adapter: the slot of the prompt's adapter.
        """
        self.clear_row(row)
        sizes = chunk_sizes(self.device) if self.graphs is None else CHUNK_SIZES
        is_in_cpp = adapter == NO_ADAPTER and self.parts.multiplies_chunks_in_cpp()
        cost = CPP_CHUNK_COST if is_in_cpp else CHUNK_COST
        return Prefill.begin(row, token_ids, reused, self.cache.allocated_len, wanted, adapter, sizes, cost)

    @on_device
    def prefill_step(self, prefill: Prefill) -> Tensor | None:
        """Compute one chunk. Returns: after the last chunk, the logits of the last token, (1, V); otherwise None."""
        self.compiler.share_processor()
        with self.compiler.quiet:
            return prefill_together(self._forward_with(prefill.adapter), [prefill], self.captured)[0]

    @on_device
    def prefill_together(self, prefills: list[Prefill]) -> list[Tensor | None]:
        """Compute one chunk of each of several prompts, up to `max_prompts` of them.

        Each must fit the size of the largest (`Prefill.fits`). Returns: for each prompt, what `prefill_step` returns.
        """
        self.compiler.share_processor()
        with self.compiler.quiet:
            forward = self._forward_with(*(prefill.adapter for prefill in prefills))
            return prefill_together(forward, prefills, self.captured)

    def max_prompts(self, size: int) -> int:
        """Return how many prompts `prefill_together` takes, with a chunk of this size each; 1 if it takes none.

        Their products are of the same form as the product of one chunk: replies do not depend on each other.
        """
        if self.captured is not None and not self.captured.serves_later:  # its graphs take one prompt each
            return 1
        most = self.parts.forms.max_rows_as(size) // size
        return min(max_prompts(size, self.cache.max_batch_size), most)

    def prefill_whole(self, row: int, token_ids: list[int], adapter: int = NO_ADAPTER) -> Tensor:
        """Compute all chunks of a prompt. Returns: the logits of its last token, (1, V)."""
        prefill, logits_1V = self.begin_prefill(row, token_ids, adapter=adapter), None
        while logits_1V is None:
            logits_1V = self.prefill_step(prefill)
        return logits_1V

    @on_device
    def sample_first(
        self, row: int | list[int], logits_BV: Tensor, kind: StepKind, hook: Hook | None = None
    ) -> StepResult:
        """Sample the first token of one row, or of several, from the logits of their prompts: the next step's inputs.

        Several rows cannot have processors, log-probabilities or hooks. A token is -1 for invalid logits.
        """
        if isinstance(row, int):
            rows: slice | Tensor = slice(row, row + 1)
            processors, logprobs = self._extras(kind)
            token_B = choose_tokens(
                self.parts, logits_BV, self.state, slice(row, row + 1), kind.sampler, processors, logprobs, hook
            )
            read = [logprobs.read(row)] if logprobs is not None else None
        else:
            assert kind == StepKind(kind.sampler) and hook is None, "several rows share the sampler alone"
            rows, read = to_device(row, self.device), None
            token_B = sample_rows(self.parts, logits_BV, self.state.sampler_rows(rows), kind.sampler)
        self.state.input_R[rows] = token_B.clamp(min=0)
        self.state.step_R[rows] += 1
        return StepResult(token_B.tolist(), read)

    @on_device
    def launch(self, num_rows: int, used_length: int, kind: StepKind, hook: Hook | None = None) -> None:
        """Launch one step of rows 0..num_rows-1 (rounded up to a bucket); `collect` returns its tokens.

        Steps feed themselves: up to `lookahead` more may be launched before the tokens of this one are collected.

        used_length: positions in use after this step, in the longest row. hook: see decode.py; steps with a hook are
        not captured.
        """
        layers = self.parts.decode_layers
        self.compiler.share_processor(layers.spared.number if layers else 0)  # this and `quiet` below: see StepCompiler
        bucket_rows = self.batch_bucket(num_rows)
        length = self.read_length(bucket_rows, used_length, kind.has_adapters)
        extras, forward = self._extras(kind), self.forward_args(kind.has_adapters)

        def step() -> None:
            decode_step(forward, self.state, bucket_rows, length, kind.sampler, *extras, hook)

        with self.compiler.quiet:
            if self.graphs is not None and hook is None:
                self.graphs.run((bucket_rows, length, kind), step)
            else:
                step()
        self.in_flight.push(kind, self.state.output_R[:num_rows], extras[1])

    def forward_args(self, has_adapters: bool = False) -> Forward:
        """Return the arguments of a forward pass with or without adapters; the fused step knows no adapters."""
        model, parts = self.model, self.parts
        if has_adapters:
            assert self.adapters is not None, "the engine was built for adapters"
            model, parts = self.adapters.model, replace(parts, decode_layers=self._adapted_layers, fused_step=None)
        return Forward(model, parts, self.cache, self.cos_SD, self.sin_SD)

    def _forward_with(self, *adapters: int) -> Forward:
        """Return the arguments for prompts with these adapters (their slots), one per batch row."""
        has_adapters = any(adapter != NO_ADAPTER for adapter in adapters)
        if has_adapters:
            assert self.adapters is not None, "the engine was built for adapters"
            self.adapters.chunk_slot_R[: len(adapters)].copy_(to_device(adapters, self.device))
        return self.forward_args(has_adapters)

    @on_device
    def write_adapter(self, slot: int, matrices: Matrices) -> None:
        """Fill a slot with an adapter, or clear it; see `AdapterSlots.write`. No row may be using the slot."""
        assert self.adapters is not None, "the engine was built for adapters"
        self.adapters.write(slot, matrices)

    def read_length(self, bucket_rows: int, used_length: int, has_adapters: bool = False) -> int:
        """Return the number of positions that a step of this many rows may read.

        Where attention finds the used length on the device, it may read all, and one graph serves all lengths.
        """
        fused = None if has_adapters else self.parts.fused_step
        if not self.parts.needs_mask or (fused is not None and fused.serves(bucket_rows)):
            return self.cache.allocated_len
        return self.cache.bucket(used_length)

    @on_device
    def collect(self) -> StepResult:
        """Wait for the oldest launched step and return its results; entries beyond its rows have no meaning."""
        return self.in_flight.pop()

    def forget(self) -> None:
        """Discard the results of launched steps."""
        self.in_flight.clear()

    def decode(self, num_rows: int, used_length: int, kind: StepKind) -> list[int]:
        """Launch one step and collect it. Returns: the new token of each row."""
        self.launch(num_rows, used_length, kind)
        return self.collect().tokens[:num_rows]

    def _extras(self, kind: StepKind) -> tuple[ProcessorState | None, LogprobState | None]:
        """Return the buffers of logits processors and of log-probabilities, each None if the step needs none."""
        if kind.has_logprobs and self.logprobs is None:
            self.logprobs = LogprobState.allocate(self.cache.max_batch_size, self._vocab_size, self.device)
        return self.processors if kind.is_processed else None, self.logprobs if kind.has_logprobs else None

    @on_device
    def logits_uncached(self, token_ids: list[int], adapter: int = NO_ADAPTER) -> Tensor:
        """Return the last token's logits, (1, V), computed without a cache: the reference of the cached steps."""
        x_1TE, last = self._states_uncached(token_ids, adapter), len(token_ids) - 1
        x_11E = x_1TE[:, last : last + 1].clone(memory_format=torch.contiguous_format)
        logits_11V: Tensor = self.parts.logits(self.parts.head, x_11E)
        return logits_11V.squeeze(1)

    @on_device
    def prompt_logprobs_uncached(
        self, token_ids: list[int], wanted: WantedLogprobs, adapter: int = NO_ADAPTER
    ) -> list[Logprobs]:
        """Return the log-probabilities of a prompt's tokens, computed without a cache: the reference of prefill's."""
        x_1TE, positions = self._states_uncached(token_ids, adapter), wanted.after(0, len(token_ids), len(token_ids))
        targets = token_ids[positions.start + 1 : positions.stop + 1]
        x_1TE = x_1TE[:, positions.start : positions.stop]
        return chunk_logprobs(self.parts, self.model.config.vocab_size, x_1TE, targets, wanted.top)

    def _states_uncached(self, token_ids: list[int], adapter: int) -> Tensor:
        """Return the last block's output, (1, T, E), padding at the end included."""
        model, parts, *_ = self._forward_with(adapter)
        # By causality, padding at the end changes nothing. A minimum length keeps one compiled form for all lengths.
        padded = token_ids + [0] * (MIN_UNCACHED_TOKENS - len(token_ids))
        token_1T = to_device([padded], self.device)
        cos_1TD, sin_1TD = (
            table_SD[None, : len(padded)].clone(memory_format=torch.contiguous_format)
            for table_SD in (self.cos_SD, self.sin_SD)
        )
        x_1TE = model.embed(token_1T)
        for block in model.model.layers:
            x_1TE = parts.block_uncached(block, x_1TE, cos_1TD, sin_1TD)
        return x_1TE

    def batch_bucket(self, num_rows: int) -> int:
        """Return the rows of a step for `num_rows`: the next power of two, at most max_batch_size."""
        return min(1 << (num_rows - 1).bit_length(), self.cache.max_batch_size)

    def batch_buckets(self) -> list[int]:
        """Return all sizes that `batch_bucket` can return."""
        return sorted({self.batch_bucket(n) for n in range(1, self.cache.max_batch_size + 1)})

    @on_device
    def warmup(self, report: Callable[[str], None] = lambda part: None) -> None:
        """Compile, and on CUDA capture, everything that requests need. All rows must be empty.

        Graphs with logits processors or log-probabilities are captured at the first request that needs them.
        report: called with the name of each part before it is compiled.
        """
        self.compiler.end_auto()
        fit_weights(self.model, self.parts.decode_layers)
        move_to_huge_pages(self.model, self.cache)
        self.parts.decide_forms()
        self._compile_kernels()
        adapters = [NO_ADAPTER] if self.adapters is None else [NO_ADAPTER, 1]  # one slot stands for all
        for adapter in adapters:
            report("prefill with adapter" if adapter else "prefill")
            logits_1V = self._warm_up_prefill(adapter)
        for sampler in SamplerKind:
            report(f"{sampler.value} sampler")
            self.sample_first(0, logits_1V, StepKind(sampler))
        # Compiling needs one cache bucket. Graphs that depend on the bucket are captured for each, largest first.
        lengths = self.cache.buckets if self.graphs is not None and self.parts.needs_mask else [1]
        for num_rows in reversed(self.batch_buckets()):
            for adapter in adapters:
                report(f"decode step{' with adapters' if adapter else ''}, batch {num_rows}")
                for used in reversed(lengths):
                    for sampler in SamplerKind:
                        self.decode(num_rows, used, StepKind(sampler, has_adapters=adapter > 0))
            self._warm_up_extras(num_rows)
        self.clear_all()

    def _warm_up_extras(self, num_rows: int) -> None:
        """Compile what steps with logits processors and log-probabilities run besides."""
        vocab_size = self.model.config.vocab_size
        neutral = ProcessorRows.neutral(num_rows, vocab_size, self.device)
        logprobs = LogprobState.allocate(num_rows, vocab_size, self.device)
        logits_BV, token_B = torch.zeros_like(neutral.bias_BV), torch.zeros_like(self.state.input_R[:num_rows])
        self.parts.processors(None, logits_BV, *neutral)
        self.parts.count(None, neutral.count_BV, token_B, torch.zeros_like(token_B))  # not one tensor for two arguments
        self.parts.logprobs(None, logits_BV, token_B, *vars(logprobs).values())

    def _compile_kernels(self) -> None:
        """Compile the kernels of fused steps, several at a time: the steps of `warmup` would do so one by one."""
        fused, sampling = self.parts.fused_step, self.parts.fused_sampler
        if fused is None:
            return
        forward = self.forward_args()
        logits_1V = torch.zeros(1, self.model.config.vocab_size, dtype=torch.float32, device=self.device)

        def steps() -> None:
            for sampler in SamplerKind:
                sampling.choose(logits_1V, self.state.sampler_rows(slice(1)), sampler)
                for num_rows in filter(fused.serves, self.batch_buckets()):
                    decode_step(forward, self.state, num_rows, self.cache.allocated_len, sampler)

        fused.compile_ahead(steps)

    def _warm_up_prefill(self, adapter: int) -> Tensor:
        """Compute prompts of all sizes of chunks that requests need. Returns: the logits of the last one, (1, V)."""
        sizes = CHUNK_SIZES if self.graphs is not None else CHUNK_SIZES[:1]
        parts = self.parts
        if parts.decode_layers is not None and not parts.forms.serve_chunks(chunk_sizes(self.device), self.cache):
            self.parts = replace(parts, decode_layers=None)  # some chunks run block by block
            try:
                self.prefill_whole(0, [0] * sizes[0], adapter)
                self._warm_up_together(sizes, adapter)
            finally:
                self.parts = parts
        for size in reversed([size for size in sizes if size <= self.cache.allocated_len]):
            if (
                self.captured is not None
                and self.captured.serves_later
                and CHUNK_SIZES[0] + size <= self.cache.allocated_len
            ):
                later = self.begin_prefill(0, [0] * (CHUNK_SIZES[0] + size), CHUNK_SIZES[0], None, adapter)
                assert later.chunks == [size], "the rest of the prompt is one chunk"
                self.prefill_step(later)
            logits_1V = self.prefill_whole(0, [0] * size, adapter)
        self._warm_up_together(sizes, adapter)
        return logits_1V

    def _warm_up_together(self, sizes: Sequence[int], adapter: int) -> None:
        """Compute prompts together, for each graph of several prompts, or else for two prompts."""
        slots = self.cache.max_batch_size
        for size in [
            size for size in reversed(sizes) if size <= self.cache.allocated_len and self.max_prompts(size) > 1
        ]:
            for prompts in graph_prompts(size, slots)[::-1] if self.graphs is not None else [2]:
                self.prefill_together([self.begin_prefill(row, [0] * size, 0, None, adapter) for row in range(prompts)])

    def num_warmup_parts(self) -> int:
        """Return the number of parts that `warmup` reports."""
        return len(SamplerKind) + (1 + len(self.batch_buckets())) * (1 if self.adapters is None else 2)

    def close(self) -> None:
        """Release captured graphs, and stop compiling."""
        self.compiler.close()
        if self.graphs is not None:
            self.graphs.clear()
