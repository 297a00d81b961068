"""Generator: the object that applications hold. Text in, text out; the engine below it knows token ids only."""

from __future__ import annotations

import asyncio
import warnings
import weakref
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import torch
from huggingface_hub.utils import tqdm

from qwen3fast.checkpoint import as_id_tuple
from qwen3fast.checkpoint.save import save_model
from qwen3fast.checks import checked_flag, checked_timeout
from qwen3fast.engine import Engine, lead_or_follow
from qwen3fast.engine.threads import on_live_threads, use_threads
from qwen3fast.loading import load
from qwen3fast.model import Qwen3
from qwen3fast.model.kv_cache import StaticKVCache, parse_cache_dtype
from qwen3fast.options import GeneratorOptions, takes_options
from qwen3fast.parallel import Ranks
from qwen3fast.quantization import formats_of
from qwen3fast.results import GenerationResult, GeneratorStats, StreamChunk
from qwen3fast.sampling_params import SamplingParams
from qwen3fast.scheduling import DebugView, Dispatcher
from qwen3fast.scheduling.builder import RequestBuilder
from qwen3fast.scheduling.handle import RequestHandle
from qwen3fast.scheduling.prompt import Overflow, Prompt, read_prompts
from qwen3fast.text.chat_template import Tools
from qwen3fast.text.tokenizer import Message, Tokenizer


class Generator:
    """Generates text with a Qwen3 model on a static KV cache.

    Requests of all methods, threads and tasks run together, in one thread that the Generator owns: they wait for a
    free slot of the cache, are prefilled in chunks between the decode steps of others, and leave when they end. Greedy
    and seeded replies do not depend on what runs beside them (except by rounding, where two logits nearly tie). Use
    `close()` or a `with` statement to release memory early.

    Threads may share a Generator. Its own thread, which calls logits processors, must not ask it for replies; nor must
    a process forked after its first use, which has to build a Generator of its own. Both get a RuntimeError.

    Attributes:
        model: the Qwen3 module, or this process's shard of it. config: its ModelConfig.
        tokenizer: None for random weights, which take and give token ids only.
        default_params: the checkpoint's sampling preset, every field set.
        options: the GeneratorOptions. max_seq_len: prompt and reply together, in tokens.
        device, dtype: of the model's weights.
    """

    @takes_options
    def __init__(
        self,
        model: Qwen3,
        tokenizer: Tokenizer | None = None,
        *,
        generation_config: dict[str, Any] | None = None,
        source_folder: Path | None = None,
        ranks: Ranks | None = None,
        **options: Any,
    ) -> None:
        """Wrap a loaded model.

        Args:
            model: the model, in evaluation mode.
            tokenizer: its tokenizer, if prompts and replies are to be text.
            generation_config: the checkpoint's sampling preset, as read from generation_config.json.
            source_folder: the folder or GGUF file that the model came from; `save_quantized` copies the tokenizer's
                files from it.
            ranks: the processes that the model was split over.
            options: the fields of GeneratorOptions.

        Raises: ValueError for an option out of its range, a size the model cannot have, or a preset that no request
        could set; MemoryError if the KV cache does not fit.
        """
        self.options = GeneratorOptions(**options)
        config = model.config
        self.options.check_model(config)
        weight = model.model.norm.weight
        self.model, self.config, self.tokenizer = model, config, tokenizer
        self.device, self.dtype = weight.device, weight.dtype
        self.max_seq_len = self.options.max_seq_len
        self._source_folder, self._ranks = source_folder, ranks
        preset = generation_config or {}
        self.default_params = SamplingParams.from_generation_config(preset)
        eos_ids = frozenset(config.eos_token_ids) | frozenset(as_id_tuple(preset.get("eos_token_id")))
        engine = on_live_threads(self._make_engine)
        self._dispatcher = Dispatcher(engine, self.options.max_queue, self.options.prefix_reuse)
        self._builder = RequestBuilder(
            tokenizer, config.vocab_size, self.max_seq_len, eos_ids, self.default_params, self._dispatcher.worker
        )
        self._has_warned_greedy_thinking = False
        self._finalizer = weakref.finalize(self, self._dispatcher.close)

    @classmethod
    @takes_options
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
        check_weights: bool = False,
        tensor_parallel: bool = False,
        **options: Any,
    ) -> Generator:
        """Load a model and its tokenizer.

        Args:
            source, device, dtype, quantization, revision, adapter, check_weights: as in `load_model`.
            progress: show a bar while weights load.
            tensor_parallel: split the model over the processes that torchrun has started. The process of rank 0 gets a
                Generator like any other. In the other processes this call does not return: they run their shards
                until rank 0 closes its Generator, then end (SystemExit). compile="auto" is True there.
            options: the fields of GeneratorOptions: max_seq_len, max_batch_size, compile and others.

        Raises: FileNotFoundError, ValueError or MemoryError, saying what was wrong and what to do.
        """
        checked = GeneratorOptions(**options)
        use_threads(checked.threads)  # before loading, which quantizes
        loaded = on_live_threads(
            load, source, device, dtype, quantization, revision, progress, adapter, check_weights, tensor_parallel
        )  # fmt: skip
        return cls(**loaded._asdict(), **vars(checked))

    @overload
    def generate(  # type: ignore[overload-overlap]  # a str is one prompt, though it is an iterable of str, too
        self,
        prompts: Prompt,
        params: SamplingParams | None = ...,
        *,
        use_cache: bool = ...,
        on_overflow: Overflow = ...,
        progress: bool = ...,
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
    ) -> list[GenerationResult]: ...

    def generate(
        self,
        prompts: Any,
        params: Any = None,
        *,
        use_cache: bool = True,
        on_overflow: Overflow = "error",
        progress: bool = False,
    ) -> GenerationResult | list[GenerationResult]:
        """Continue one prompt, or each of several.

        Args:
            prompts: one prompt: a string, or token ids as a list, another iterable, or an array or tensor of one
                dimension. Or several: an iterable of prompts, or an array or tensor of two dimensions.
            params: one SamplingParams for all prompts, or a list with one for each.
            use_cache: False computes the whole sequence for every token: the slow reference.
            on_overflow: "error" refuses a prompt that does not fit max_seq_len together with max_tokens. "cut"
                shortens the reply, though not below a quarter of max_seq_len; what is still too long is taken from
                the beginning of the prompt.
            progress: show a bar that counts finished replies.

        Returns: one result for one prompt, otherwise a list in the order of the prompts. A batch gives each prompt
        the reply it gets alone. With n > 1, a result is the first of its `samples`; with a seed, sample i has seed + i.
        Raises: ValueError for bad prompts or parameters, before anything runs; FloatingPointError for NaN logits;
        ImportError if structured output was asked for and its package is missing; RuntimeError after `close`, in the
        Generator's own thread, or in a process forked after its first use.
        """
        checked_flag("use_cache", use_cache)
        checked_flag("progress", progress)
        many, is_single = read_prompts(prompts)
        each = list(params) if isinstance(params, list | tuple) else [params] * len(many)
        if len(each) != len(many):
            raise ValueError(f"got {len(each)} SamplingParams for {len(many)} prompts; pass one, or one for each")
        groups = [self._builder.build(prompt, p, on_overflow) for prompt, p in zip(many, each, strict=True)]
        handles = [handle for group in groups for handle in group]
        bar = tqdm(total=len(handles), desc="generating", unit="reply", disable=not progress)
        try:
            self._dispatcher.run(handles, use_cache, bar.update)
            results = [[handle.result() for handle in group] for group in groups]
        finally:
            bar.close()
            for handle in handles:
                handle.cancel()
        merged = [replace(group[0], samples=group) if len(group) > 1 else group[0] for group in results]
        return merged[0] if is_single else merged

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        on_overflow: Overflow = "error",
        timeout: float | None = None,
    ) -> RequestHandle:
        """Start a reply and return at once; see RequestHandle. Thread-safe.

        timeout: seconds to wait while `max_queue` requests wait already; 0 does not wait, None waits for ever.
        Raises: QueueFullError after that time; otherwise as `generate`, and ValueError for n > 1.
        """
        timeout = checked_timeout("timeout", timeout)
        return self._dispatcher.submit(self._builder.build_one(prompt, params, on_overflow), timeout)

    async def astream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, on_overflow: Overflow = "error"
    ) -> AsyncIterator[StreamChunk]:
        """Continue one prompt chunk by chunk, in a task of asyncio: `async for chunk in generator.astream(...)`.

        While `max_queue` requests wait already, this waits as well. Cancelling the task frees its slot; so does closing
        the iterator (`contextlib.aclosing` closes it at once when a loop is left early).
        Raises: as `submit`, at the first chunk.
        """
        self._dispatcher.worker.check_caller()
        # In another thread: encoding a long prompt or compiling a schema would block the event loop.
        handle = await asyncio.to_thread(self._builder.build_one, prompt, params, on_overflow)
        async with aclosing(self._dispatcher.astream(handle)) as chunks:  # closed with this iterator, not collected
            async for chunk in chunks:
                yield chunk

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, on_overflow: Overflow = "error"
    ) -> Iterator[StreamChunk]:
        """Continue one prompt chunk by chunk. The chunks' texts, joined, are the text that `generate` gives.

        The prompt is checked at the call and queued at the first chunk. Dropping the iterator frees its slot.
        Raises: as `generate`, at the call, and ValueError for n > 1; at a chunk, what ended the reply, as
        `RequestHandle.result`.
        """
        return self._run(self._build(prompt, params, on_overflow=on_overflow))

    def chat(
        self,
        messages: list[Message],
        params: SamplingParams | None = None,
        *,
        enable_thinking: bool = True,
        tools: Tools | None = None,
        continue_final_message: bool | str = False,
        on_overflow: Overflow = "error",
    ) -> GenerationResult:
        """Reply to a conversation: `generate` on the rendered chat template.

        tools: JSON schemas, or Python functions. continue_final_message: go on with the last message, which holds the
        beginning of the reply, as in `Tokenizer.apply_chat_template`; the result holds only what was added.
        Raises: ValueError without a chat template or for malformed messages; otherwise as `generate`.
        """
        prompt = self.render(messages, params, enable_thinking, tools, continue_final_message)
        return self.generate(prompt, params, on_overflow=on_overflow)

    def stream_chat(
        self,
        messages: list[Message],
        params: SamplingParams | None = None,
        *,
        enable_thinking: bool = True,
        tools: Tools | None = None,
        continue_final_message: bool | str = False,
        on_overflow: Overflow = "error",
    ) -> Iterator[StreamChunk]:
        """Reply to a conversation chunk by chunk: `stream` on the rendered chat template.

        Raises: ValueError at the call without a chat template or for malformed messages; otherwise as `stream`.
        """
        prompt = self.render(messages, params, enable_thinking, tools, continue_final_message)
        return self.stream(prompt, params, on_overflow=on_overflow)

    def render(
        self,
        messages: list[Message],
        params: SamplingParams | None = None,
        enable_thinking: bool = True,
        tools: Tools | None = None,
        continue_final_message: bool | str = False,
    ) -> list[int]:
        """Return the prompt of a conversation, as token ids, for any method that takes a prompt.

        Warns once about greedy decoding with reasoning.
        Raises: ValueError without a chat template or for malformed messages.
        """
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer, so it cannot chat")
        temperature = (params or SamplingParams()).with_defaults(self.default_params).temperature
        can_think = "enable_thinking" in (self.tokenizer.chat_template or "")
        if enable_thinking and can_think and temperature == 0 and not self._has_warned_greedy_thinking:
            self._has_warned_greedy_thinking = True
            warnings.warn(
                "greedy decoding (temperature 0) with reasoning can repeat endlessly; Qwen3's authors recommend "
                "temperature 0.6, top_p 0.95, top_k 20 (leave the temperature unset), or pass enable_thinking=False",
                stacklevel=3,
            )
        ids = self.tokenizer.apply_chat_template(
            messages,
            tools,
            enable_thinking=enable_thinking,
            tokenize=True,
            continue_final_message=continue_final_message,
        )
        assert isinstance(ids, list), "tokenize=True gives ids"
        return ids

    def warmup(self, progress: bool = False) -> None:
        """Compile everything that requests with the cache need. Afterwards no request compiles anything.

        On CUDA also capture the graphs of decode steps, except those with processors or log-probabilities: the first
        request that asks for these captures them.
        Raises: RuntimeError while requests are running, after `close`, and as `generate`.
        """
        checked_flag("progress", progress)
        parts = self.debug.engine.num_warmup_parts()
        with tqdm(total=parts, desc="warmup", unit="part", disable=not progress) as bar:

            def report(part: str) -> None:
                bar.set_postfix_str(part)
                bar.update()

            self._dispatcher.warmup(report)

    @property
    def stats(self) -> GeneratorStats:
        """Compilations, memory and slots in use, after the step that is running. Raises: RuntimeError if closed."""
        return self._dispatcher.stats(self.model.num_bytes())

    @property
    def debug(self) -> DebugView:
        """The engine, scheduler, worker and admission, for tests and diagnosis."""
        return self._dispatcher.debug

    def save_quantized(self, folder: str | Path) -> None:
        """Write the quantized weights, with config and tokenizer, as a folder that `from_pretrained` loads.

        Raises: ValueError for a model that is not quantized, or split; OSError if the folder cannot be written.
        """
        formats = formats_of(self.model)
        if len(formats) > 1:
            raise ValueError("this model's layers are in several formats; load it with quantization='int8' or 'int4'")
        if self._ranks is not None:
            raise ValueError("a model that is split over processes cannot be saved; load it in one process for that")
        if not formats:
            raise ValueError("this model is not quantized; load it with quantization='int8' or 'int4' first")
        on_live_threads(save_model, self.model, Path(folder), self._source_folder)

    def close(self) -> None:
        """End all requests, which get a RuntimeError, and release the KV cache and graphs. May be called twice."""
        self._finalizer()

    def __enter__(self) -> Generator:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _build(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        continues: RequestHandle | None = None,
        *,
        on_overflow: Overflow = "error",
    ) -> RequestHandle:
        """Return a reply that is not queued yet; `_run` queues it.

        continues: an earlier reply that the prompt continues: its slot of the cache is taken over instead of copied.
        """
        return self._builder.build_one(prompt, params, on_overflow, continues)

    def _run(self, handle: RequestHandle) -> Iterator[StreamChunk]:
        """Queue what `_build` made at the first chunk, and yield its chunks."""
        return self._dispatcher.stream(handle)

    def _make_engine(self) -> Engine:
        """Return the engine; on other ranks than 0, run this process's shard instead, until it is closed."""
        options, ranks = self.options, self._ranks
        cache_dtype = parse_cache_dtype(options.kv_cache_dtype, self.dtype)
        cache = StaticKVCache(self.config, options.max_batch_size, options.max_seq_len, cache_dtype, self.device)
        if self.device.type == "cpu":
            use_threads(options.threads)
        compile = options.compile
        if ranks is not None and compile == "auto":
            compile = True  # ranks that try a compiled form at different times would wait for each other for ever
        engine = Engine(self.model, cache, self.device, compile, options.cuda_graphs)
        return engine if ranks is None else lead_or_follow(engine, ranks)
