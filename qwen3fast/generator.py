"""Generator: the one object that applications hold. Text in, text out; the engine below knows only tokens."""

from __future__ import annotations

import asyncio
import warnings
import weakref
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any, overload

import torch
from huggingface_hub.utils import tqdm

from qwen3fast.checkpoint import choose_device, load_model, read_generation_config, read_tokenizer, resolve_source
from qwen3fast.checkpoint.save import save_model
from qwen3fast.engine import Engine, lead_or_follow
from qwen3fast.engine.compile import CompileMode
from qwen3fast.engine.threads import use_threads
from qwen3fast.model import Qwen3
from qwen3fast.model.config import as_id_tuple
from qwen3fast.model.kv_cache import StaticKVCache, parse_cache_dtype
from qwen3fast.parallel import Ranks
from qwen3fast.quantization.linear import QuantizedLinear
from qwen3fast.results import GenerationResult, GeneratorStats, StreamChunk
from qwen3fast.sampling_params import SamplingParams
from qwen3fast.scheduling import Admission, ClosedError, QueueFullError, Runner, Scheduler, UncachedRun
from qwen3fast.scheduling.builder import RequestBuilder
from qwen3fast.scheduling.handle import RequestHandle
from qwen3fast.scheduling.prompt import Overflow, Prompt
from qwen3fast.text.chat_template import Tools
from qwen3fast.text.tokenizer import Message, Tokenizer


class Generator:
    """Generates text with a Qwen3 model on a static KV cache.

    All requests, of any method, thread or task, run together in one thread of the Generator's own: they wait for a free
    row of the cache, are prefilled in chunks between the decode steps of others, and leave at their own end. Greedy
    and seeded replies do not depend on what runs beside them (but for rounding where two logits nearly tie). Use
    `close()` or a `with` statement to release memory early.

    Attributes:
        model: the Qwen3 module, or this process's part of it. config: its ModelConfig.
        tokenizer: None for random weights, which have no text.
        default_params: the checkpoint's sampling preset, every field set.
    """

    def __init__(
        self,
        model: Qwen3,
        tokenizer: Tokenizer | None = None,
        *,
        generation_config: dict[str, Any] | None = None,
        source_folder: Path | None = None,
        max_seq_len: int = 4096,
        max_batch_size: int = 1,
        kv_cache_dtype: str = "auto",
        compile: CompileMode = True,
        cuda_graphs: bool = True,
        prefix_reuse: bool = True,
        max_queue: int = 1024,
        threads: int | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """Wrap a loaded model; see `from_pretrained` for the parameters.

        source_folder: where the model came from, so that `save_quantized` can take the tokenizer's files along; it may
            be a GGUF file.
        ranks: the processes that the model was split over.

        Raises: ValueError for sizes the model cannot have, a preset that no request could set, max_queue or threads
        below 1, or an unknown kv_cache_dtype or compile; MemoryError if the KV cache does not fit.
        """
        config = model.config
        if max_seq_len > config.longest_context:
            stretched = " (stretched by YaRN)" if config.longest_context > config.max_position_embeddings else ""
            raise ValueError(
                f"max_seq_len {max_seq_len} exceeds the model's max_position_embeddings "
                f"{config.longest_context}{stretched}; choose at most that"
            )
        weight = model.model.norm.weight
        self.model, self.config, self.tokenizer = model, config, tokenizer
        self.device, self.dtype = weight.device, weight.dtype
        self.max_seq_len = max_seq_len
        self._source_folder = source_folder
        if max_queue < 1:
            raise ValueError(f"max_queue must be at least 1, got {max_queue}")
        preset = generation_config or {}
        self.default_params = SamplingParams.from_generation_config(preset)
        eos_ids = frozenset(config.eos_token_ids) | frozenset(as_id_tuple(preset.get("eos_token_id")))
        cache_dtype = parse_cache_dtype(kv_cache_dtype, self.dtype)
        cache = StaticKVCache(config, max_batch_size, max_seq_len, cache_dtype, self.device)
        if self.device.type == "cpu":
            use_threads(threads)
        if ranks is not None and compile == "auto":
            compile = True  # ranks that try a compiled form at different times would wait for each other for ever
        engine = Engine(model, cache, self.device, compile, cuda_graphs)
        self._ranks = ranks
        if ranks is not None:
            engine = lead_or_follow(engine, ranks)
        self._runner = Runner(Scheduler(engine, prefix_reuse))
        self._admission = Admission(max_queue)
        self._builder = RequestBuilder(
            tokenizer, config.vocab_size, max_seq_len, eos_ids, self.default_params, self._runner
        )
        self._has_warned_greedy_thinking = False
        self._finalizer = weakref.finalize(self, _close, self._runner, self._admission)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        quantization: str | None = None,
        max_seq_len: int = 4096,
        max_batch_size: int = 1,
        kv_cache_dtype: str = "auto",
        compile: CompileMode = True,
        cuda_graphs: bool = True,
        prefix_reuse: bool = True,
        max_queue: int = 1024,
        threads: int | None = None,
        revision: str | None = None,
        progress: bool = False,
        adapter: str | Path | None = None,
        check_weights: bool = False,
        tensor_parallel: bool = False,
    ) -> Generator:
        """Load a model and its tokenizer.

        source, device, dtype, revision, quantization, adapter, check_weights: as in `load_model`. max_seq_len: prompt
        and reply together, in tokens. max_batch_size: requests that run at once; more wait. kv_cache_dtype: "auto"
        keeps keys and values in the weights' dtype, "int8" rounds them to half of bfloat16's memory. compile: True
        compiles before the first token, "auto" while tokens come (on CPUs), False never; cuda_graphs=False launches
        each kernel from the host. Greedy tokens stay the same (in bfloat16 and quantised, but where two logits nearly
        tie). prefix_reuse: rows keep what they computed, and a prompt that begins alike goes on from there (switch it
        off to change weights in place). max_queue: requests that `submit` and `astream` let wait. threads: of the CPU,
        for the whole process; by default one a core. progress: show a bar while weights load.
        tensor_parallel: split the model over the processes that torchrun has started. The process of rank 0 gets a
        Generator like any other. In the others this does not return: they do their part of its steps until it is
        closed, and end then (SystemExit). compile="auto" is True there.
        Raises: FileNotFoundError, ValueError or MemoryError, saying what was wrong and what to do.
        """
        use_threads(threads)  # loading quantises
        ranks = Ranks.start(choose_device(device).type) if tensor_parallel else None
        tokenizer, generation_config, folder = None, None, None
        if not str(source).startswith("random:"):  # what is soon read and may be damaged comes before the weights
            folder = resolve_source(source, revision)
            tokenizer = read_tokenizer(folder)
            generation_config = _checked_preset(read_generation_config(folder), folder)
        model = load_model(
            source, device, dtype, revision, progress, quantization,
            adapter=adapter, check_weights=check_weights, ranks=ranks,
        )  # fmt: skip
        return cls(
            model,
            tokenizer,
            generation_config=generation_config,
            source_folder=folder,
            max_seq_len=max_seq_len,
            max_batch_size=max_batch_size,
            kv_cache_dtype=kv_cache_dtype,
            compile=compile,
            cuda_graphs=cuda_graphs,
            prefix_reuse=prefix_reuse,
            max_queue=max_queue,
            threads=threads,
            ranks=ranks,
        )

    @overload
    def generate(
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
        prompts: list[str] | list[list[int]],
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
        """Continue one prompt (a text or a list of token ids) or a list of prompts.

        params: one SamplingParams for all, or a list with one for each. use_cache=False is the slow reference that
        computes the whole sequence for every token. on_overflow="cut" shortens what does not fit max_seq_len:
        max_tokens first, then the oldest tokens of the prompt; "error" refuses.
        Returns: one result, or a list of results in the order of the prompts. A batch gives each prompt what it gets
        alone. With n > 1, a result is the first of its `samples`; with a seed, sample i is that of seed + i.
        Raises: ValueError for bad prompts or parameters, before anything runs; FloatingPointError for NaN logits;
        ImportError if structured output was asked for and its package is missing.
        """
        is_single = isinstance(prompts, str) or (bool(prompts) and all(isinstance(x, int) for x in prompts))
        many = [prompts] if is_single else list(prompts)
        each = list(params) if isinstance(params, list | tuple) else [params] * len(many)
        if len(each) != len(many):
            raise ValueError(f"got {len(each)} SamplingParams for {len(many)} prompts; pass one, or one for each")
        groups = [self._builder.build(prompt, p, on_overflow) for prompt, p in zip(many, each, strict=True)]
        handles = [handle for group in groups for handle in group]
        bar = tqdm(total=len(handles), desc="generating", unit="reply", disable=not progress)
        try:
            self._run(handles, use_cache, bar)
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
        Raises: QueueFullError after that time; ValueError as `generate`, and for n > 1.
        """
        handle = self._builder.build_one(prompt, params, on_overflow)
        place = self._admission.ask()
        try:
            place.result(timeout)
        except FutureTimeoutError:
            self._admission.give_up(place)
            raise QueueFullError(
                f"{self._admission.places} requests wait already (max_queue); try again later, or wait longer"
            ) from None
        except BaseException:
            self._admission.give_up(place)
            raise
        return self._start(handle)

    async def astream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, on_overflow: Overflow = "error"
    ) -> AsyncIterator[StreamChunk]:
        """Continue one prompt piece by piece, in a task of asyncio: `async for chunk in generator.astream(...)`.

        While `max_queue` requests wait already, this waits, too. A task that is cancelled frees its row, and so does
        an iterator that is closed (`contextlib.aclosing` closes it at once where a loop is left early).
        Raises: as `submit`, at the first chunk.
        """
        # In another thread: encoding a long prompt or compiling a schema would keep the event loop from other tasks.
        handle = await asyncio.to_thread(self._builder.build_one, prompt, params, on_overflow)
        place = self._admission.ask()
        try:
            await asyncio.wrap_future(place)
        except BaseException:
            self._admission.give_up(place)
            raise
        self._start(handle)
        try:
            async for chunk in handle:
                yield chunk
        finally:
            handle.cancel()

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, on_overflow: Overflow = "error"
    ) -> Iterator[StreamChunk]:
        """Continue one prompt piece by piece. Joined, the chunks' texts are `generate`'s text.

        The prompt is checked at the call; it is queued at the first chunk. A stream that is dropped frees its row.
        Raises: ValueError at the call, as `generate`, and for n > 1; at a chunk, what ended the reply, as
        `RequestHandle.result`.
        """
        return self.run(self.build(prompt, params, on_overflow=on_overflow))

    def build(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        continues: RequestHandle | None = None,
        *,
        on_overflow: Overflow = "error",
    ) -> RequestHandle:
        """A reply that is not started yet; `run` does that.

        continues: an earlier reply that the prompt goes on from: its row of the cache is taken over, not copied.
        Raises: as `submit`.
        """
        return self._builder.build_one(prompt, params, on_overflow, continues)

    def run(self, handle: RequestHandle) -> Iterator[StreamChunk]:
        """Queue what `build` made at the first chunk, and give its chunks. Dropping the iterator frees the row."""
        try:
            self._runner.add([handle.request])
            yield from handle
        finally:
            handle.cancel()

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
        beginning of the reply, as in `Tokenizer.apply_chat_template`; the result has the rest alone.
        Raises: ValueError without a chat template or for malformed messages, and as `generate`.
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
        """Reply to a conversation piece by piece: `stream` on the rendered chat template.

        Raises: ValueError at the call without a chat template or for malformed messages, and as `stream`.
        """
        prompt = self.render(messages, params, enable_thinking, tools, continue_final_message)
        return self.stream(prompt, params, on_overflow=on_overflow)

    def warmup(self, progress: bool = False) -> None:
        """Compile everything that requests with the cache need; afterwards none of them compiles anything.

        On CUDA also capture the graphs of steps, but for those with processors or log-probabilities, which the first
        request that asks for them captures.

        Raises: RuntimeError while requests are running.
        """
        engine = self._scheduler.engine
        bar = tqdm(total=engine.num_warmup_parts(), desc="warmup", unit="part", disable=not progress)

        def report(part: str) -> None:
            bar.set_postfix_str(part)
            bar.update()

        def warm_up() -> None:
            if not self._scheduler.is_idle:
                raise RuntimeError("warmup() needs all slots empty; call it before the first request")
            self._scheduler.kept.forget_all()
            engine.warmup(report)

        try:
            self._runner.call(warm_up)
        finally:
            bar.close()

    def render(
        self,
        messages: list[Message],
        params: SamplingParams | None = None,
        enable_thinking: bool = True,
        tools: Tools | None = None,
        continue_final_message: bool | str = False,
    ) -> list[int]:
        """The prompt of a conversation, as token ids, for any method that takes a prompt.

        Warns once of thinking greedily. Raises: ValueError without a chat template or for malformed messages.
        """
        if self.tokenizer is None:
            raise ValueError("random weights have no tokenizer, so they cannot chat")
        temperature = (params or SamplingParams()).with_defaults(self.default_params).temperature
        can_think = "enable_thinking" in (self.tokenizer.chat_template or "")
        if enable_thinking and can_think and temperature == 0 and not self._has_warned_greedy_thinking:
            self._has_warned_greedy_thinking = True
            warnings.warn(
                "greedy decoding (temperature 0) while thinking can repeat endlessly; Qwen3's authors ask for "
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

    @property
    def stats(self) -> GeneratorStats:
        """Compilations, memory and slots in use, after the step that is running. Raises: RuntimeError if closed."""
        return self._runner.call(self._stats)

    def _stats(self) -> GeneratorStats:
        scheduler = self._scheduler
        engine = scheduler.engine
        return GeneratorStats(
            compilations=engine.compiler.compilations,
            compile_s=engine.compiler.seconds,
            cuda_graphs=len(engine.graphs) if engine.graphs is not None else 0,
            kv_cache_bytes=engine.cache.num_bytes,
            weight_bytes=self.model.num_bytes(),
            slots_in_use=len(scheduler.active),
            max_batch_size=engine.cache.max_batch_size,
            waiting=len(scheduler.waiting),
            prefilled_tokens=scheduler.prefilled_tokens,
            reused_tokens=scheduler.reused_tokens,
        )

    def save_quantized(self, folder: str | Path) -> None:
        """Write the quantised weights, with config and tokenizer, as a folder that `from_pretrained` loads at once.

        Raises: ValueError for a model that is not quantised, or split; OSError if the folder cannot be written.
        """
        if self.config.quantization is None and any(isinstance(m, QuantizedLinear) for m in self.model.modules()):
            raise ValueError("this model's layers are in several formats; load it with quantization='int8' or 'int4'")
        if self._ranks is not None:
            raise ValueError("a model that is split over processes cannot be saved; load it in one process for that")
        if self.config.quantization is None:
            raise ValueError("this model is not quantised; load it with quantization='int8' or 'int4' first")
        save_model(self.model, Path(folder), self._source_folder)

    def close(self) -> None:
        """End all requests, which get a RuntimeError, and release the KV cache and graphs. May be called twice."""
        self._finalizer()

    def __enter__(self) -> Generator:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def _scheduler(self) -> Scheduler:
        return self._runner.scheduler

    @property
    def _engine(self) -> Engine:
        return self._runner.scheduler.engine

    def _run(self, handles: list[RequestHandle], use_cache: bool, bar: tqdm) -> None:
        """Run requests to their ends."""
        if not use_cache:
            for handle in handles:
                run = UncachedRun(self._engine, handle.request)
                while not handle.is_done:
                    self._runner.call(run.step)  # token by token: other requests run in between
                bar.update()
            return
        ended: SimpleQueue[None] = SimpleQueue()
        for handle in handles:
            handle.when_done(lambda: ended.put(None))
        self._runner.add([handle.request for handle in handles])
        for _ in handles:
            ended.get()
            bar.update()

    def _start(self, handle: RequestHandle) -> RequestHandle:
        """Queue a request that was given a place."""
        handle.request.on_leave_queue = self._admission.give_back
        try:
            self._runner.add([handle.request])
        except ClosedError:
            handle.request.leave_queue()
            raise
        return handle


def _checked_preset(preset: dict[str, Any] | None, source: Path) -> dict[str, Any] | None:
    """What a checkpoint presets for sampling, if anything.

    Raises: ValueError naming the file if it sets what no request could.
    """
    if preset is None:
        return None
    try:
        SamplingParams.from_generation_config(preset)
        as_id_tuple(preset.get("eos_token_id"))
    except ValueError as err:
        if source.is_file():
            raise ValueError(f"{source}: its settings of sampling are damaged: {err}") from err
        raise ValueError(f"{source / 'generation_config.json'}: {err}; correct it, or delete the file") from err
    return preset


def _close(runner: Runner, admission: Admission) -> None:
    """What a Generator leaves to do when it is closed, collected, or alive at the end of the program."""
    admission.close(ClosedError("the Generator was closed while this request waited"))
    runner.close()
