"""Generator: text in, text out. The engine below it knows only token ids."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, overload

import torch
from huggingface_hub.utils.tqdm import tqdm

from qwen3fast.adapter_methods import AdapterMethods, adapter_room
from qwen3fast.chat_methods import ChatMethods
from qwen3fast.checkpoint.hf_config import as_id_tuple
from qwen3fast.checkpoint.save import save_model
from qwen3fast.checks import checked_flag, checked_timeout
from qwen3fast.engine import Engine, lead_or_follow
from qwen3fast.engine.threads import on_live_threads, use_threads
from qwen3fast.loading import load
from qwen3fast.model import Qwen3
from qwen3fast.model.kv_cache import StaticKVCache, parse_cache_dtype
from qwen3fast.options import GeneratorOptions, takes_options
from qwen3fast.parallel import Ranks
from qwen3fast.quantization.convert import formats_of
from qwen3fast.results import ContinuationScore, GenerationResult, GeneratorStats, StreamChunk, continuation_score
from qwen3fast.sampling_params import SamplingParams, takes_params
from qwen3fast.scheduling.adapter_registry import AdapterRegistry
from qwen3fast.scheduling.builder import RequestBuilder
from qwen3fast.scheduling.dispatch import Dispatcher
from qwen3fast.scheduling.handle import RequestHandle
from qwen3fast.scheduling.prompt import Overflow, Prompt, build_each, read_pairs, read_prompts
from qwen3fast.text.chat_template import Tools
from qwen3fast.text.tokenizer import Tokenizer


class Generator(ChatMethods, AdapterMethods):
    """A Qwen3 model with a tokenizer and a static KV cache, which generates text.

    Requests of all methods, threads and tasks run together, in one thread that the Generator owns: they wait for a
    free slot of the cache, are prefilled in chunks between the decode steps of other requests, and leave when they
    end. Greedy and seeded replies do not depend on other requests (except by rounding, where two logits nearly tie).
    Use `close()` or a `with` statement to release memory early.

    Threads may share a Generator. Calls from its own thread, which runs logits processors, raise RuntimeError. So do
    calls in a process that was forked after the first request: build another Generator there.

    Attributes:
        model: the Qwen3 module, or this process's shard of it. config: its ModelConfig.
        tokenizer: None for random weights, which take and give token ids only.
        default_params: the checkpoint's sampling preset, every field set.
        options: the GeneratorOptions. max_seq_len: prompt and reply together, in tokens.
        device, dtype: of the model's weights.
    """

    @takes_options
    @takes_params
    def __init__(
        self,
        model: Qwen3,
        tokenizer: Tokenizer | None = None,
        *,
        generation_config: dict[str, Any] | None = None,
        source_folder: Path | None = None,
        ranks: Ranks | None = None,
        check_weights: bool = False,
        **options: Any,
    ) -> None:
        """Wrap a loaded model.

        Args:
            model: the model, in evaluation mode.
            tokenizer: its tokenizer; without one, prompts are token ids and replies have no text.
            generation_config: the checkpoint's sampling preset, the contents of generation_config.json.
            source_folder: the checkpoint's folder or GGUF file, whose tokenizer `save_quantized` copies.
            ranks: the processes that the model was split over.
            check_weights: refuse NaN and infinity in adapters.
            options: the fields of GeneratorOptions.

        Raises: TypeError for a name instead of a model; ValueError for an option or a preset out of range, and for a
        size that the model does not support; MemoryError if the KV cache does not fit.
        """
        self.options = GeneratorOptions.of(options)
        if not isinstance(model, Qwen3):
            raise TypeError(f"model must be a Qwen3, got {model!r:.99}; from_pretrained takes names and folders")
        config = model.config
        self.options.check_model(config)
        weight = model.model.norm.weight
        self.model, self.config, self.tokenizer = model, config, tokenizer
        self.device, self.dtype, self.max_seq_len = weight.device, weight.dtype, self.options.max_seq_len
        self._source_folder, self._ranks, preset = source_folder, ranks, generation_config or {}
        self.default_params = SamplingParams.from_generation_config(preset)
        eos_ids = {*config.eos_token_ids, *as_id_tuple(preset.get("eos_token_id")), *getattr(tokenizer, "eos_ids", ())}
        written_ids = frozenset(i for i in eos_ids if i < config.vocab_size)  # a model cannot write others
        engine = on_live_threads(self._make_engine)
        self._dispatcher = Dispatcher(engine, self.options.max_queue, self.options.prefix_reuse)
        worker = self._dispatcher.worker
        self._adapters = AdapterRegistry(worker, self.options.adapters, checked_flag("check_weights", check_weights))
        self._builder = RequestBuilder(
            tokenizer, config, self.max_seq_len, written_ids, self.default_params, worker, self._adapters
        )
        self._finalizer = weakref.finalize(self, self._dispatcher.close)

    @classmethod
    @takes_options
    @takes_params
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        quantization: str | None = None,
        revision: str | None = None,
        progress: bool = False,
        adapter: str | Path | None = None,
        calibrate: bool | None = None,
        check_weights: bool = False,
        tensor_parallel: bool = False,
        rope_scaling: dict[str, Any] | None = None,
        chat_template: str | Path | None = None,
        generation_config: dict[str, Any] | None = None,
        **options: Any,
    ) -> Generator:
        """Load a model and its tokenizer.

        Args:
            source, device, dtype, quantization, revision, adapter, calibrate, check_weights, rope_scaling: as in
                `load_model`.
            progress: show a bar while weights load.
            tensor_parallel: split the model over the processes that torchrun has started. The process of rank 0 gets
                an ordinary Generator. In the other processes this call does not return: they run their shards until
                rank 0 closes its Generator, then exit (SystemExit). compile="auto" means True.
            chat_template: a Jinja template, or a file of one, in place of the checkpoint's.
            generation_config: replaces fields of generation_config.json; a temperature above 0 implies do_sample.
            options: the fields of GeneratorOptions: max_seq_len, max_batch_size, compile and others.

        Raises: FileNotFoundError for a missing checkpoint; ValueError for unsupported options or a damaged checkpoint;
        MemoryError if the KV cache does not fit.
        """
        checked = GeneratorOptions.of(options)
        adapter_room(checked)  # adapters that cannot be read are refused before weights are
        use_threads(checked.threads)  # before loading, which quantizes
        loaded = on_live_threads(
            load, source, device, dtype, quantization, revision, progress, adapter, calibrate, check_weights,
            tensor_parallel, rope_scaling, chat_template, generation_config, checked.check_model,
        )  # fmt: skip
        return cls(**loaded._asdict(), **vars(checked))

    @overload
    def generate(  # type: ignore[overload-overlap]  # a str is one prompt, although it is an iterable of str
        self,
        prompts: Prompt,
        params: SamplingParams | None = ...,
        *,
        use_cache: bool = ...,
        on_overflow: Overflow = ...,
        progress: bool = ...,
        tools: Tools | None = ...,
    ) -> GenerationResult: ...

    @overload
    def generate(
        self,
        prompts: Iterable[Prompt],
        params: SamplingParams | list[SamplingParams] | None = ...,
        *,
        use_cache: bool = ...,
        on_overflow: Overflow = ...,
        progress: bool = ...,
        tools: Tools | None = ...,
    ) -> list[GenerationResult]: ...

    @takes_params
    def generate(
        self,
        prompts: Any,
        params: Any = None,
        *,
        use_cache: bool = True,
        on_overflow: Overflow = "error",
        progress: bool = False,
        tools: Tools | None = None,
    ) -> GenerationResult | list[GenerationResult]:
        """Continue one prompt, or each of several.

        Args:
            prompts: one prompt: a string, or token ids as a list, another iterable, or an array or tensor of one
                dimension. Or several: an iterable of prompts, or an array or tensor of two dimensions.
            params: one SamplingParams for all prompts, or a list with one for each.
            use_cache: False computes the whole sequence for every token: the slow reference.
            on_overflow: "error" refuses a prompt that does not fit max_seq_len together with max_tokens. "cut" first
                shortens the reply, down to a quarter of max_seq_len, and then removes tokens from the beginning of the
                prompt.
            progress: show a bar that counts finished replies.
            tools: the functions that the prompts offer, if they were rendered from a conversation with tools.
                Qwen3-Coder writes the arguments of a call without their types, which come from here.

        Returns: one result for one prompt, otherwise a list in the order of the prompts. A prompt gets the same reply
        in a batch as alone, except by rounding. With n > 1, a result is the first of its `samples`; with a seed, sample
        i uses seed + i.
        Raises: ValueError for bad prompts or parameters (ContextLengthError for prompts that are too long), before
        anything runs; FloatingPointError for NaN logits; ImportError for structured output without its package;
        RuntimeError after `close`, in the Generator's own thread, or in a process forked after its first use.
        """
        checked_flag("use_cache", use_cache)
        checked_flag("progress", progress)
        many, is_single = read_prompts(prompts)
        each = list(params) if isinstance(params, list | tuple) else [params] * len(many)
        if len(each) != len(many):
            raise ValueError(f"got {len(each)} SamplingParams for {len(many)} prompts; pass one, or one for each")
        build = partial(self._builder.build, on_overflow=on_overflow, tools=tools)
        groups = build_each(build, zip(many, each, strict=True), is_single)
        self.options.warn_of_single_slot(sum(map(len, groups)))
        with tqdm(desc="generating", unit="reply", disable=not progress) as bar:
            replies = iter(self._run_all([handle for group in groups for handle in group], use_cache, bar))
        results = [GenerationResult.of_samples([next(replies) for _ in group]) for group in groups]
        return results[0] if is_single else results

    @overload
    def score(  # type: ignore[overload-overlap]  # a str is one prompt, although it is an iterable of str
        self, prompts: Prompt, continuations: Prompt, *, progress: bool = ..., adapter: str | None = ...
    ) -> ContinuationScore: ...

    @overload
    def score(
        self,
        prompts: Prompt | Iterable[Prompt],
        continuations: Iterable[Prompt],
        *,
        progress: bool = ...,
        adapter: str | None = ...,
    ) -> list[ContinuationScore]: ...

    def score(
        self, prompts: Any, continuations: Any, *, progress: bool = False, adapter: str | None = None
    ) -> ContinuationScore | list[ContinuationScore]:
        """Return the log-probability of a continuation after a prompt, or of each of several; nothing is generated.

        Prompt and continuation are encoded separately: the tokens before the continuation are those that `generate`
        would continue. Pass token ids to split a text elsewhere. Continuations of one prompt compute it once.

        Args:
            prompts: one prompt, as in `generate`, for all continuations; or several, one for each.
            continuations: one text, or its token ids; or several.
            progress: show a bar that counts finished continuations.
            adapter: the name of a LoRA adapter, as in `SamplingParams`.

        Returns: one score for one continuation, otherwise a list in the order of the continuations.
        Raises: ValueError for an empty prompt or continuation, for numbers of them that do not match, and where both
        together leave no room for one more token in max_seq_len; FloatingPointError for NaN logits; RuntimeError as
        `generate`.
        """
        checked_flag("progress", progress)
        pairs, is_single = read_pairs(prompts, continuations)
        handles = build_each(partial(self._builder.build_score, adapter=adapter), pairs, is_single)
        with tqdm(desc="scoring", unit="continuation", disable=not progress) as bar:
            scores = [continuation_score(result) for result in self._run_all(handles, True, bar)]
        return scores[0] if is_single else scores

    def _run_all(self, handles: list[RequestHandle], use_cache: bool, bar: tqdm) -> list[GenerationResult]:
        """Run requests to their ends and return their results; cancel them all if one fails. bar: counts them."""
        bar.reset(len(handles))
        try:
            self._dispatcher.run(handles, use_cache, bar.update)
            return [handle.result() for handle in handles]
        finally:
            for handle in handles:
                handle.cancel()

    @takes_params
    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        on_overflow: Overflow = "error",
        timeout: float | None = None,
        tools: Tools | None = None,
    ) -> RequestHandle:
        """Start a reply and return at once; see RequestHandle, which does not keep the Generator open. Thread-safe.

        timeout: seconds to wait while the queue is full (`max_queue`); 0 does not wait, None waits without limit.
        tools: as in `generate`. Raises: QueueFullError after the timeout, ValueError for n > 1, and as `generate`.
        """
        timeout = checked_timeout("timeout", timeout)
        return self._dispatcher.submit(self._builder.build_one(prompt, params, on_overflow, tools=tools), timeout)

    @takes_params
    async def astream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        on_overflow: Overflow = "error",
        tools: Tools | None = None,
    ) -> AsyncIterator[StreamChunk]:
        """Stream the reply to one prompt, in an asyncio task: `async for chunk in generator.astream(...)`.

        It waits while the queue is full (`max_queue`). Canceling the task frees the slot; so does closing the iterator
        (use `contextlib.aclosing` to close it at once when a loop is left early). tools: as in `generate`.
        Raises: as `submit`, at the first chunk.
        """
        self._dispatcher.worker.check_caller()
        # In another thread: encoding a long prompt or compiling a schema would block the event loop.
        handle = await asyncio.to_thread(self._builder.build_one, prompt, params, on_overflow, tools=tools)
        async with aclosing(self._dispatcher.astream(handle)) as chunks:  # closed with this iterator, not collected
            async for chunk in chunks:
                yield chunk

    @takes_params
    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        on_overflow: Overflow = "error",
        tools: Tools | None = None,
    ) -> Iterator[StreamChunk]:
        """Stream the reply to one prompt. The texts of all chunks, joined, are the text that `generate` returns.

        The prompt is checked at the call and queued at the first chunk. Deleting the iterator frees the slot.
        Raises: as `generate`, at the call, and ValueError for n > 1; at a chunk, as `RequestHandle.result`.
        """
        return self._run(self._builder.build_one(prompt, params, on_overflow, tools=tools))

    def warmup(self, progress: bool = False) -> None:
        """Compile everything that requests need; afterwards, no request with a cache compiles anything.

        On CPUs it also builds the C++ operations and measures which forms are the fastest. On CUDA it also captures the
        graphs of prompts and steps, except of steps with logits processors or log-probabilities: the first one does.
        Raises: RuntimeError while requests are running and after `close`.
        """
        checked_flag("progress", progress)
        with tqdm(total=self.debug.engine.num_warmup_parts(), desc="warmup", unit="part", disable=not progress) as bar:

            def report(part: str) -> None:
                bar.set_postfix_str(part)
                bar.update()

            self._dispatcher.warmup(report)

    @property
    def stats(self) -> GeneratorStats:
        """Statistics of compilation, memory and slots, after the current step. Raises: RuntimeError after `close`."""
        return self._dispatcher.stats(self.model.num_bytes())

    @property
    def debug(self) -> Dispatcher:
        """The engine, scheduler, worker and admission, for tests and diagnosis. Not a stable interface."""
        return self._dispatcher

    def save_quantized(self, folder: str | Path) -> None:
        """Save the quantized weights, with config and tokenizer, to a folder that `from_pretrained` loads.

        Raises: ValueError for a model that is plain or split over processes, and for its own folder; OSError.
        """
        if self._ranks is not None:
            raise ValueError("a model that is split over processes cannot be saved; load it in one process for that")
        if not formats_of(self.model):
            raise ValueError("this model is not quantized; load it with quantization='int8' or 'int4' first")
        on_live_threads(save_model, self.model, Path(folder), self._source_folder)

    def close(self) -> None:
        """End all requests with a RuntimeError, and release KV cache and graphs. May be called more than once."""
        self._finalizer()

    def __reduce__(self) -> NoReturn:
        """Raises: TypeError, for pickle and copy: threads and memory of the engine belong to one process."""
        raise TypeError("a Generator cannot be pickled or copied; pass the arguments of from_pretrained instead")

    def __enter__(self) -> Generator:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _run(self, handle: RequestHandle) -> Iterator[StreamChunk]:
        """Queue a request at the first chunk, and yield its chunks; the iterator keeps the Generator open."""
        yield from self._dispatcher.stream(handle)

    @torch.inference_mode(False)  # memory made in that mode could not be written to outside of it
    def _make_engine(self) -> Engine:
        """Return the engine; on other ranks than 0, run this process's shard instead, until it is closed."""
        options, ranks = self.options, self._ranks
        cache_dtype = parse_cache_dtype(options.kv_cache_dtype, self.dtype)
        cache = StaticKVCache(self.config, options.max_batch_size, options.max_seq_len, cache_dtype, self.device)
        if self.device.type == "cpu":
            use_threads(options.threads)
        # Ranks that try a compiled form at different times would wait for each other forever.
        compile = True if ranks is not None and options.compile == "auto" else options.compile
        slots, rank = adapter_room(options)
        if slots and ranks is not None:
            raise ValueError("adapters exclude tensor_parallel: leave it out, or load a merged checkpoint")
        engine = Engine(self.model, cache, self.device, compile, options.cuda_graphs, None, options.forms, slots, rank)
        return engine if ranks is None else lead_or_follow(engine, ranks)
