"""Generation without a cache: the slow reference of all fast paths."""

from __future__ import annotations

import time

import torch

from qwen3fast.engine.decode import choose_tokens
from qwen3fast.engine.engine import Engine
from qwen3fast.engine.state import DecodeState, LogprobState, ProcessorState
from qwen3fast.sampling.samplers import kind_for
from qwen3fast.scheduling.request import Request


class UncachedRun:
    """A request that computes its whole sequence for each token, with the same rules of sampling and stopping."""

    def __init__(self, engine: Engine, request: Request) -> None:
        self._engine, self._request = engine, request
        self._vocab_size = engine.model.config.vocab_size
        self._state = DecodeState.allocate(1, engine.device)
        self._state.begin([0], [0], [request.sampling])
        self._processors = self._logprobs = None
        if request.is_processed:
            self._processors = ProcessorState(1, self._vocab_size, engine.device)
            self._processors.begin(0, request.prompt_ids, *request.processor_arguments)
        if request.logprobs is not None:
            self._logprobs = LogprobState.allocate(1, self._vocab_size, engine.device)

    @torch.no_grad()
    def step(self) -> None:
        """Compute one token.

        Raises: exceptions of the constraint or the logits_processor; RuntimeError if the adapter was unloaded.
        """
        engine, request = self._engine, self._request
        if request.adapter is not None:
            request.adapter.check_loaded()
        request.prefill_started_s = request.prefill_started_s or time.perf_counter()
        if request.wanted_logprobs is not None and not request.output_ids:
            wanted = (request.prompt_ids, request.wanted_logprobs, request.sampling.adapter)
            request.accept_prompt(engine.prompt_logprobs_uncached(*wanted))
        logits_1V = engine.logits_uncached(request.prompt_ids + request.output_ids, request.sampling.adapter)
        words_W = request.allowed_words(self._vocab_size)
        if words_W is not None and self._processors is not None:
            self._processors.allow(0, words_W)
        hook = (lambda logits_1V: request.process(logits_1V[0])[None]) if request.logits_processor is not None else None
        sampler = kind_for([request.sampling[:2]])
        extras = (self._processors, self._logprobs, hook)
        token_1 = choose_tokens(engine.parts, logits_1V, self._state, slice(1), sampler, *extras)
        self._state.step_R.add_(1)
        request.accept(int(token_1), self._logprobs.read(0) if self._logprobs is not None else None)
