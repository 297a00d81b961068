"""Generator: the one object that applications hold. Text in, text out; the engine below knows only tokens."""

from __future__ import annotations

import secrets
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, overload

import torch
from huggingface_hub.utils import tqdm

from qwen3fast.checkpoint import load_model, resolve_source
from qwen3fast.checkpoint.save import save_model
from qwen3fast.config import as_id_tuple, read_json
from qwen3fast.engine import Engine, Request, Scheduler, run_uncached
from qwen3fast.engine.compile import CompileMode
from qwen3fast.kv_cache import StaticKVCache, parse_cache_dtype
from qwen3fast.model import Qwen3
from qwen3fast.prompt import Overflow, Prompt, fit_context, prompt_to_ids
from qwen3fast.results import GenerationResult, GeneratorStats, RequestMetrics, StreamChunk
from qwen3fast.sampling import SamplingParams
from qwen3fast.text_stream import TextStream
from qwen3fast.threads import use_threads
from qwen3fast.tokenizer import Message, Tokenizer


class Generator:
    """Generates text with a Qwen3 model on a static KV cache.

    Calls may come from several threads; they take turns, a step each. Use `close()` or a `with` statement to release
    memory early.

    Attributes:
        model: the Qwen3 module. config: its ModelConfig.
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
        threads: int | None = None,
    ) -> None:
        """Wrap a loaded model; see `from_pretrained` for the parameters.

        source_folder: where the model came from, so that `save_quantized` can take the tokenizer's files along.

        Raises: ValueError for sizes the model cannot have; MemoryError if the KV cache does not fit.
        """
        config = model.config
        if max_seq_len > config.max_position_embeddings:
            raise ValueError(
                f"max_seq_len {max_seq_len} exceeds the model's max_position_embeddings "
                f"{config.max_position_embeddings}; choose at most that"
            )
        weight = model.model.norm.weight
        self.model, self.config, self.tokenizer = model, config, tokenizer
        self.device, self.dtype = weight.device, weight.dtype
        self.max_seq_len = max_seq_len
        self._source_folder = source_folder
        preset = generation_config or {}
        self.default_params = SamplingParams.from_generation_config(preset)
        self._eos_ids = frozenset(config.eos_token_ids) | frozenset(as_id_tuple(preset.get("eos_token_id")))
        cache_dtype = parse_cache_dtype(kv_cache_dtype, self.dtype)
        cache = StaticKVCache(config, max_batch_size, max_seq_len, cache_dtype, self.device)
        if self.device.type == "cpu":
            use_threads(threads)
        self._engine: Engine | None = Engine(model, cache, self.device, compile, cuda_graphs)
        self._scheduler = Scheduler(self._engine)
        self._lock = threading.RLock()
        self._has_warned_greedy_thinking = False

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
        threads: int | None = None,
        revision: str | None = None,
        progress: bool = False,
    ) -> Generator:
        """Load a model and its tokenizer.

        source, device, dtype, revision, quantization: as in `load_model`. max_seq_len: prompt and reply together, in
        tokens. max_batch_size: requests that run at once; more wait. kv_cache_dtype: "auto" keeps keys and values in
        the weights' dtype, "int8" rounds them to half of bfloat16's memory. compile: True compiles before the first
        token, "auto" while tokens come (on CPUs), False never; cuda_graphs=False launches each kernel from the host.
        Greedy tokens stay the same (in bfloat16 and quantised, but where two logits nearly tie). threads: of the CPU,
        for the whole process; by default one a core. progress: show a bar while weights load.
        Raises: FileNotFoundError, ValueError or MemoryError, saying what was wrong and what to do.
        """
        use_threads(threads)  # loading quantises
        model = load_model(source, device, dtype, revision, progress, quantization)
        tokenizer, generation_config, folder = None, None, None
        if not str(source).startswith("random:"):
            folder = resolve_source(source, revision)
            tokenizer = Tokenizer.from_folder(folder)
            preset_file = folder / "generation_config.json"
            generation_config = read_json(preset_file) if preset_file.is_file() else None
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
            threads=threads,
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
        alone.
        Raises: ValueError for bad prompts or parameters, before anything runs; FloatingPointError for NaN logits.
        """
        is_single = isinstance(prompts, str) or (bool(prompts) and all(isinstance(x, int) for x in prompts))
        many = [prompts] if is_single else list(prompts)
        each = list(params) if isinstance(params, list | tuple) else [params] * len(many)
        if len(each) != len(many):
            raise ValueError(f"got {len(each)} SamplingParams for {len(many)} prompts; pass one, or one for each")
        streams = []
        requests = []
        for prompt, p in zip(many, each, strict=True):
            request, stream = self._new_request(prompt, p, on_overflow)
            requests.append(request)
            streams.append(stream)
        bar = tqdm(total=len(requests), desc="generating", unit="reply", disable=not progress)
        try:
            for request in requests:
                if use_cache:
                    with self._lock:
                        self._scheduler.add(request)
                else:
                    with self._lock:
                        run_uncached(self._open_engine(), request)
                    bar.update()
            while use_cache and any(r.finish_reason is None for r in requests):
                self._step()
                bar.update(sum(r.finish_reason is not None for r in requests) - bar.n)
        finally:
            bar.close()
            self._cancel(requests)
        results = [self._result(request, stream) for request, stream in zip(requests, streams, strict=True)]
        return results[0] if is_single else results

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, on_overflow: Overflow = "error"
    ) -> Iterator[StreamChunk]:
        """Continue one prompt piece by piece. Joined, the chunks' texts are `generate`'s text.

        The prompt is checked at the call; the work is done while iterating. A stream that is dropped frees its row.
        """
        request, stream = self._new_request(prompt, params, on_overflow)
        return self._iterate(request, stream)

    def chat(
        self,
        messages: list[Message],
        params: SamplingParams | None = None,
        *,
        enable_thinking: bool = True,
        tools: list[dict[str, Any]] | None = None,
        on_overflow: Overflow = "error",
    ) -> GenerationResult:
        """Reply to a conversation: `generate` on the rendered chat template.

        Raises: ValueError without a chat template or for malformed messages, and as `generate`.
        """
        prompt = self._render(messages, params, enable_thinking, tools)
        return self.generate(prompt, params, on_overflow=on_overflow)

    def stream_chat(
        self,
        messages: list[Message],
        params: SamplingParams | None = None,
        *,
        enable_thinking: bool = True,
        tools: list[dict[str, Any]] | None = None,
        on_overflow: Overflow = "error",
    ) -> Iterator[StreamChunk]:
        """Reply to a conversation piece by piece: `stream` on the rendered chat template."""
        prompt = self._render(messages, params, enable_thinking, tools)
        return self.stream(prompt, params, on_overflow=on_overflow)

    def warmup(self, progress: bool = False) -> None:
        """Compile, and on CUDA capture, everything a request can need; afterwards no request compiles anything.

        Raises: RuntimeError while requests are running.
        """
        with self._lock:
            engine = self._open_engine()
            if self._scheduler.active:
                raise RuntimeError("warmup() needs all slots empty; call it before the first request")
            bar = tqdm(total=engine.num_warmup_parts(), desc="warmup", unit="part", disable=not progress)

            def report(part: str) -> None:
                bar.set_postfix_str(part)
                bar.update()

            engine.warmup(report)
            bar.close()

    @property
    def stats(self) -> GeneratorStats:
        """Compilations, memory and slots in use, now."""
        engine = self._open_engine()
        return GeneratorStats(
            compilations=engine.compiler.compilations,
            compile_s=engine.compiler.seconds,
            cuda_graphs=len(engine.graphs) if engine.graphs is not None else 0,
            kv_cache_bytes=engine.cache.num_bytes,
            weight_bytes=self.model.num_bytes(),
            slots_in_use=len(self._scheduler.active),
            max_batch_size=engine.cache.max_batch_size,
            waiting=len(self._scheduler.waiting),
        )

    def save_quantized(self, folder: str | Path) -> None:
        """Write the quantised weights, with config and tokenizer, as a folder that `from_pretrained` loads at once.

        Raises: ValueError for a model that is not quantised; OSError if the folder cannot be written.
        """
        if self.config.quantization is None:
            raise ValueError("this model is not quantised; load it with quantization='int8' or 'int4' first")
        save_model(self.model, Path(folder), self._source_folder)

    def close(self) -> None:
        """Release the KV cache and graphs; running streams end with an error. May be called twice."""
        with self._lock:
            if self._engine is not None:
                self._cancel([*self._scheduler.waiting, *self._scheduler.active.values()])
                self._engine.close()
                self._engine = None
                del self._scheduler.engine

    def __enter__(self) -> Generator:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _open_engine(self) -> Engine:
        if self._engine is None:
            raise RuntimeError("this Generator is closed; build a new one")
        return self._engine

    def _step(self) -> None:
        with self._lock:
            self._open_engine()
            self._scheduler.step()

    def _cancel(self, requests: list[Request]) -> None:
        with self._lock:
            if self._engine is not None:
                for request in requests:
                    self._scheduler.cancel(request)

    def _iterate(self, request: Request, stream: TextStream) -> Iterator[StreamChunk]:
        with self._lock:
            self._open_engine()
            self._scheduler.add(request)
        sent = 0
        try:
            while request.finish_reason is None:
                self._step()
                if request.finish_reason is None and len(request.output_ids) > sent:
                    new, sent = request.output_ids[sent:], len(request.output_ids)
                    yield StreamChunk(stream.take(), new)
            result = self._result(request, stream)
            yield StreamChunk(stream.take(), request.output_ids[sent:], result.finish_reason, result)
        finally:
            self._cancel([request])

    def _new_request(
        self, prompt: Any, params: SamplingParams | None, on_overflow: Overflow
    ) -> tuple[Request, TextStream]:
        self._open_engine()
        if not isinstance(params, SamplingParams | None):
            raise ValueError(f"params must be a SamplingParams, got {type(params).__name__}")
        p = (params or SamplingParams()).with_defaults(self.default_params)
        if p.stop and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer, which random weights do not have; use stop_token_ids")
        ids = prompt_to_ids(prompt, self.tokenizer, self.config.vocab_size)
        ids, max_tokens = fit_context(ids, p.max_tokens, self.max_seq_len, on_overflow)
        stream = TextStream(self.tokenizer, tuple(p.stop))
        request = Request(
            prompt_ids=ids,
            temperature=float(p.temperature or 0.0),
            top_k=int(p.top_k or 0),
            top_p=float(p.top_p or 1.0),
            min_p=float(p.min_p or 0.0),
            seed=p.seed if p.seed is not None else secrets.randbits(63),
            max_tokens=max_tokens,
            stop_ids=frozenset(p.stop_token_ids) | (frozenset() if p.ignore_eos else self._eos_ids),
            on_token=stream.push,
        )
        return request, stream

    def _render(
        self, messages: list[Message], params: SamplingParams | None, enable_thinking: bool, tools: Any
    ) -> list[int]:
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
        ids = self.tokenizer.apply_chat_template(messages, tools=tools, enable_thinking=enable_thinking, tokenize=True)
        assert isinstance(ids, list), "tokenize=True gives ids"
        return ids

    def _result(self, request: Request, stream: TextStream) -> GenerationResult:
        if request.error is not None:
            raise request.error
        if request.finish_reason in (None, "cancelled"):
            raise RuntimeError("the request was cancelled because its Generator was closed or failed")
        stream.finish()
        metrics = RequestMetrics(
            prompt_tokens=len(request.prompt_ids),
            new_tokens=len(request.output_ids),
            queue_s=request.prefill_started_s - request.submitted_s,
            time_to_first_token_s=request.first_token_s - request.submitted_s,
            prefill_s=request.first_token_s - request.prefill_started_s,
            decode_s=request.finished_s - request.first_token_s,
        )
        return GenerationResult(stream.text, request.output_ids, str(request.finish_reason), metrics)
