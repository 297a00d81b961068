"""RequestBuilder: prompts and SamplingParams become requests, with defaults filled in and everything checked."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from qwen3fast.engine.prompt_logprobs import WantedLogprobs
from qwen3fast.engine.state import RowSampling
from qwen3fast.model.config import ModelConfig
from qwen3fast.sampling.constraints import AfterReasoning, AllOf, MinTokens, ThinkingBudget, TokenConstraint
from qwen3fast.sampling.grammar import GrammarCompiler
from qwen3fast.sampling_params import SamplingParams
from qwen3fast.scheduling.adapter_registry import AdapterRegistry
from qwen3fast.scheduling.handle import RequestHandle
from qwen3fast.scheduling.prompt import ContextLengthError, Overflow, fit_context, prompt_to_ids
from qwen3fast.scheduling.request import Request
from qwen3fast.scheduling.worker import EngineWorker
from qwen3fast.text.chat_template import Tools, read_tools
from qwen3fast.text.reasoning import BEGIN_REASONING, END_REASONING, ReasoningFormat, ReasoningTracker
from qwen3fast.text.stream import TextStream
from qwen3fast.text.tokenizer import Tokenizer
from qwen3fast.text.tool_calls import call_format_of

# Temperature and top_p that Qwen3's model cards recommend, with reasoning (also in generation_config.json) and without.
WITH_REASONING, WITHOUT_REASONING = (0.6, 0.95), (0.7, 0.8)


class RequestBuilder:
    """A builder of requests for one model. Thread-safe."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        config: ModelConfig,
        max_seq_len: int,
        eos_ids: frozenset[int],
        default_params: SamplingParams,
        worker: EngineWorker,
        adapters: AdapterRegistry,
    ) -> None:
        self._tokenizer, self._vocab_size, self._max_seq_len = tokenizer, config.vocab_size, max_seq_len
        self._eos_ids, self._default_params, self._worker = eos_ids, default_params, worker
        self._adapters, self._longest_context = adapters, config.longest_context
        self._reasoning = ReasoningFormat(tokenizer)
        self._compiler: GrammarCompiler | None = None
        self._compiling = threading.Lock()

    def build(
        self,
        prompt: Any,
        params: SamplingParams | None,
        on_overflow: Overflow,
        continues: RequestHandle | None = None,
        tools: Tools | None = None,
    ) -> list[RequestHandle]:
        """Return a request for each of `params.n` replies, none of them started.

        The first one computes the log-probabilities of the prompt, if they are asked for.
        continues: an earlier reply that the prompt continues. tools: the functions that the prompt offers.
        Raises: ValueError for anything that cannot run, ImportError for a package that is missing; RuntimeError if the
        Generator is closed, in its own thread, and in a forked process.
        """
        self._worker.check_caller()
        if not isinstance(params, SamplingParams | None):
            raise ValueError(f"params must be a SamplingParams, got {type(params).__name__}")
        asked = params or SamplingParams()
        p = asked.with_defaults(self._default_params)
        if p.stop and self._tokenizer is None:
            raise ValueError("stop strings need a tokenizer, which this model does not have; use stop_token_ids")
        for name, ids in (("logit_bias", p.logit_bias or ()), ("allowed_token_ids", p.allowed_token_ids or ())):
            if (largest := max(ids, default=0)) >= self._vocab_size:
                raise ValueError(f"{name}: token id {largest} is outside the vocabulary (0 to {self._vocab_size - 1})")
        adapter = self._adapters.find(p.adapter) if p.adapter is not None else None
        whole_ids = prompt_to_ids(prompt, self._tokenizer, self._vocab_size, self._max_seq_len, on_overflow)
        default = self._default_params.max_tokens  # a default never refuses a prompt: it takes what room there is
        ids, max_tokens = fit_context(
            whole_ids, asked.max_tokens, self._max_seq_len, on_overflow, default, self._longest_context
        )
        first_seed = p.seed if p.seed is not None else secrets.randbits(63)
        seeds = [(first_seed + i + 2**63) % 2**64 - 2**63 for i in range(p.n)]  # 64-bit integers wrap around
        tracker = self._reasoning.tracker_after(whole_ids)
        ends_at_eos = not p.ignore_eos or p.is_structured  # nothing may follow these
        eos_ids = self._eos_ids if ends_at_eos else frozenset()
        stop_ids = eos_ids | frozenset(p.stop_token_ids or ())
        constraint = self._constraint_maker(p, whole_ids, tracker, stop_ids)
        template = self._tokenizer.chat_template if self._tokenizer is not None else None
        call_format = call_format_of(template, read_tools(tools))
        handles = []
        for index, seed in enumerate(seeds):
            stream = TextStream(self._tokenizer, tuple(p.stop or ()), tracker, p.min_tokens)
            request = Request(
                prompt_ids=ids,
                sampling=RowSampling(p.temperature or 0.0, p.top_k or 0, p.top_p or 1.0, p.min_p or 0.0, seed),
                max_tokens=max_tokens,
                stop_ids=stop_ids,
                eos_ids=eos_ids,
                on_token=stream.push,
                repetition_penalty=p.repetition_penalty or 1.0,
                presence_penalty=p.presence_penalty,
                frequency_penalty=p.frequency_penalty,
                logit_bias=p.logit_bias or None,
                allowed_token_ids=frozenset(p.allowed_token_ids) if p.allowed_token_ids is not None else None,
                constraint=constraint(),
                logits_processor=p.logits_processor,
                logprobs=p.logprobs,
                wanted_logprobs=None if p.prompt_logprobs is None or index else WantedLogprobs(1, p.prompt_logprobs),
                adapter=adapter,
                continues=continues.request if continues is not None else None,
            )
            handles.append(RequestHandle(request, stream, self._worker, call_format))
        return handles

    def build_one(
        self,
        prompt: Any,
        params: SamplingParams | None,
        on_overflow: Overflow = "error",
        continues: RequestHandle | None = None,
        tools: Tools | None = None,
    ) -> RequestHandle:
        """Return the request of a single reply. Raises: as `build`; ValueError for n > 1."""
        if params is not None and isinstance(params, SamplingParams) and params.n > 1:
            raise ValueError(f"n is {params.n}, but a stream is one reply; use generate(), or start n of them")
        return self.build(prompt, params, on_overflow, continues, tools)[0]

    def build_score(self, prompt: Any, continuation: Any, adapter: str | None = None) -> RequestHandle:
        """Return the request that computes the log-probabilities of a continuation: its prompt is both together.

        It samples one token, since a request ends with a token, and reuses what the KV cache holds of `prompt`.
        Raises: as `build`.
        """
        self._worker.check_caller()
        about = (self._tokenizer, self._vocab_size, self._max_seq_len, None)
        ids, continuation_ids = prompt_to_ids(prompt, *about), prompt_to_ids(continuation, *about, name="continuation")
        needed = len(ids) + len(continuation_ids) + 1
        if needed > self._max_seq_len:
            can_grow = needed <= self._longest_context
            raise ContextLengthError(
                f"prompt ({len(ids)} tokens) + continuation ({len(continuation_ids)} tokens) + 1 = {needed} exceeds "
                f"max_seq_len {self._max_seq_len}; shorten one"
                + (f", or set max_seq_len to {needed} or more" if can_grow else "")
            )
        found = self._adapters.find(adapter) if adapter is not None else None
        request = Request(ids + continuation_ids, wanted_logprobs=WantedLogprobs(len(ids), 1), adapter=found)
        return RequestHandle(request, TextStream(None), self._worker)

    def without_reasoning(self, params: SamplingParams | None, prompt_ids: list[int]) -> SamplingParams:
        """Return the parameters for a conversation that was rendered with enable_thinking=False.

        If the prompt ends inside reasoning, which some chat templates open all the same, `thinking_budget` is 0, to
        close it at once. Where the template has the switch, and the checkpoint's preset is the one for reasoning,
        temperature and top_p are the ones for answers without it. Values that are set are kept.
        """
        params = params or SamplingParams()
        if self._reasoning.tracker_after(prompt_ids).is_open:
            return params if params.thinking_budget is not None else replace(params, thinking_budget=0)
        preset = self._default_params
        if self._reasoning.has_switch and (preset.temperature, preset.top_p) == WITH_REASONING:
            temperature, top_p = WITHOUT_REASONING
            params = params.with_defaults(SamplingParams(temperature=temperature, top_p=top_p))
        return params

    def _constraint_maker(
        self, p: SamplingParams, ids: list[int], tracker: ReasoningTracker, stop_ids: frozenset[int]
    ) -> Callable[[], TokenConstraint | None]:
        """Return a function that makes a constraint for each reply, or None. tracker: in its state after the prompt."""
        grammar = None
        if p.is_structured:
            compiler = self.grammar_compiler()
            if p.json_schema is not None:
                grammar = compiler.json_schema(p.json_schema)
            else:
                grammar = compiler.regex(p.regex) if p.regex is not None else compiler.lark(str(p.grammar))
        if grammar is None and p.thinking_budget is None and not p.min_tokens:
            return lambda: None
        reasoning = self._reasoning
        if p.thinking_budget is not None and not reasoning.has_tags:
            raise ValueError(f"thinking_budget needs a tokenizer with the tokens {BEGIN_REASONING} and {END_REASONING}")
        may_begin, separator_ids = reasoning.may_begin(ids), reasoning.separator_after(ids)

        def make() -> TokenConstraint:
            rules: list[TokenConstraint] = []
            if p.thinking_budget is not None:
                rules.append(ThinkingBudget(p.thinking_budget, reasoning, tracker))
            if grammar is not None:
                rule: TokenConstraint = grammar.start()
                if may_begin or separator_ids:
                    rule = AfterReasoning(rule, reasoning, tracker, separator_ids, self._eos_ids)
                rules.append(rule)
            if p.min_tokens:
                rules.append(MinTokens(p.min_tokens, stop_ids))
            return rules[0] if len(rules) == 1 else AllOf(rules)

        return make

    def grammar_compiler(self) -> GrammarCompiler:
        """Return the compiler of schemas, patterns and grammars. The first call builds it, which takes a second.

        Raises: ValueError without a tokenizer; ImportError without the package.
        """
        if self._tokenizer is None:
            raise ValueError("json_schema, regex and grammar need a tokenizer, which this model does not have")
        with self._compiling:
            if self._compiler is None:
                self._compiler = GrammarCompiler(self._tokenizer, self._vocab_size, self._eos_ids)
            return self._compiler
