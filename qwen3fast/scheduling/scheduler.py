"""Requests in and out of the rows of the cache: wait, prefill, decode together, leave at their own end.

Continuous batching (Orca, OSDI 2022) with prompts in chunks between decode steps (Sarathi, arXiv:2308.16369): a reply
that is running waits for one chunk of another's prompt at most, and a row is given on as soon as it is free. What a
row holds stays known after its request has ended, so that a prompt that begins alike need not be computed again
(prefix_cache.py).
"""

from __future__ import annotations

from collections import deque

from torch import Tensor

from qwen3fast.engine.decode import Hook, StepKind
from qwen3fast.engine.engine import Engine
from qwen3fast.engine.prefill import CHUNK_SIZES
from qwen3fast.sampling.samplers import kind_for
from qwen3fast.scheduling.prefix_cache import PrefixCache
from qwen3fast.scheduling.request import Request


class Scheduler:
    """Runs any number of requests through the rows of an engine. Not thread-safe: one caller at a time.

    Steps may run ahead (`Engine.lookahead`): a request's end by length is known beforehand, its end by a stop token is
    noticed when the token is collected, and what was launched for it meanwhile is dropped. Requests whose next token
    depends on what the host makes of the last one (constraints, hooks) are never run ahead of.

    A request that fails, fails alone: its `error` says why. What breaks a whole step ends all requests in it.

    Attributes:
        waiting: queued requests, oldest first. active: those that have a row, by row.
        dropped_tokens: computed after their request had ended, so far; at most `lookahead` for each request, and one
            more where its logits_processor failed.
        reused_tokens, prefilled_tokens: of prompts, so far.
    """

    def __init__(self, engine: Engine, reuse_prefixes: bool = True) -> None:
        self.engine = engine
        self.waiting: deque[Request] = deque()
        self.active: dict[int, Request] = {}
        # On CUDA, sums over positions are fastest, or possible at all, at round numbers of them.
        multiple = CHUNK_SIZES[0] if engine.device.type == "cuda" else 1
        cache = engine.cache
        self.prefixes = PrefixCache(cache.max_batch_size, cache.allocated_len, multiple, reuse_prefixes)
        self._in_flight: deque[dict[int, Request]] = deque()  # rows of each launched step, oldest first
        self.dropped_tokens = self.reused_tokens = self.prefilled_tokens = 0

    def add(self, request: Request) -> None:
        """Queue a request."""
        self.waiting.append(request)

    def cancel(self, request: Request) -> None:
        """Take a request out, wherever it is; its row is free at once."""
        if request.finish_reason is None:
            request.finish("cancelled")
        if request in self.waiting:
            self.waiting.remove(request)
            request.leave_queue()
        self._release_finished()

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.waiting and not self.active

    def step(self) -> None:
        """One chunk of a prompt, if there is one to compute, and one decode step for all requests that have begun."""
        request = self._next_to_prefill()
        if request is not None:
            self._prefill(request)
        rows = {row: r for row, r in self.active.items() if 0 < r.launched < r.max_tokens}
        if rows:
            self._launch(rows)
        most = 0 if not rows or any(r.is_watched for r in rows.values()) else self.engine.lookahead
        while len(self._in_flight) > most:
            self._collect()

    def fail_all(self, error: BaseException) -> None:
        """End every request that has a row: a step broke, and what they have computed cannot be trusted."""
        for request in self.active.values():
            if request.finish_reason is None:
                request.fail(error)
        self.prefixes.forget_all()
        self._release_finished()
        self._in_flight.clear()
        self.engine.forget()

    def end_all(self, error: BaseException) -> None:
        """End every request there is, without touching the engine; nothing can be run afterwards."""
        for request in [*self.waiting, *self.active.values()]:
            request.leave_queue()
            if request.finish_reason is None:
                request.fail(error)
        self.waiting.clear()
        self.active.clear()
        self._in_flight.clear()

    def _launch(self, rows: dict[int, Request]) -> None:
        for row, request in rows.items():
            self._restrict(row, request)
        rows = {row: request for row, request in rows.items() if request.error is None}
        if not rows:
            return self._release_finished()
        # Of a row's tokens, all but the newest are in the cache already; this step writes the newest.
        used = max(request.positions for request in rows.values())
        kind = StepKind(
            kind_for((request.temperature, request.top_k) for request in rows.values()),
            any(request.is_processed for request in rows.values()),
            any(request.logprobs is not None for request in rows.values()),
        )
        self.engine.launch(max(rows) + 1, used, kind, _hook_for(rows))
        self._in_flight.append(rows)
        for row, request in rows.items():
            request.launched += 1
            if request.launched == request.max_tokens:
                self.engine.clear_row(row)  # it must not go on while others do

    def _collect(self) -> None:
        result, rows = self.engine.collect(), self._in_flight.popleft()
        for row, request in rows.items():
            if request.finish_reason is not None:
                self.dropped_tokens += 1
                continue
            request.accept(result.tokens[row], result.logprobs[row] if result.logprobs else None)
        self._release_finished()

    def _next_to_prefill(self) -> Request | None:
        """The request whose prompt is being computed, or the next one, in a row of its own now; None without any."""
        for request in self.active.values():
            if request.prefill is not None:
                return request
        while self.waiting and len(self.active) < self.engine.cache.max_batch_size:
            request = self.waiting.popleft()
            request.leave_queue()
            if request.finish_reason is None:
                try:
                    self._give_row(request)
                except BaseException as err:  # it is in no list now, and must not be waited for
                    request.fail(err)
                    raise
                return request
        return None

    def _give_row(self, request: Request) -> None:
        """A row for a request, with as much of its prompt in it as other rows hold."""
        plan = self.prefixes.plan(request.prompt_ids, self.active, request.continues)
        source = plan.source
        if plan.given_up != plan.row:
            self._swap(plan.row, plan.given_up)
            source = {plan.row: plan.given_up, plan.given_up: plan.row}.get(source, source)
        if plan.reused and source != plan.row:
            self.engine.copy_row(source, plan.row, plan.reused)
        request.row, request.reused_tokens = plan.row, plan.reused
        self.reused_tokens += plan.reused
        self.prefilled_tokens += len(request.prompt_ids) - plan.reused
        self.active[plan.row] = request
        request.begin_prompt(plan.logits_1V)
        unproven = self.prefixes.take(plan.row)
        if unproven > plan.reused:
            self._erase(plan.row, plan.reused, unproven)
        if plan.logits_1V is None:
            request.prefill = self.engine.begin_prefill(plan.row, request.prompt_ids, plan.reused)

    def _prefill(self, request: Request) -> None:
        """One chunk; after the last one, the first token. (Nothing to compute where the whole prompt was there.)"""
        assert request.row is not None, "it has been given a row"
        try:
            logits_1V = request.prompt_logits_1V
            if request.prefill is not None:
                logits_1V = self.engine.prefill_step(request.prefill)
            if logits_1V is not None:
                request.prefill, request.prompt_logits_1V = None, logits_1V
                self._sample_first(request.row, request, logits_1V)
        except Exception as err:
            request.fail(err)
        self._release_finished()

    def _sample_first(self, row: int, request: Request, logits_1V: Tensor) -> None:
        sampling = (request.temperature, request.top_k, request.top_p, request.min_p, request.seed)
        self.engine.set_row(row, len(request.prompt_ids), *sampling)
        if request.is_processed:
            self.engine.set_processors(row, request.prompt_ids, *request.processor_arguments)
        self._restrict(row, request)
        if request.error is not None:
            return
        request.launched = 1
        kind = StepKind(
            kind_for([(request.temperature, request.top_k)]), request.is_processed, request.logprobs is not None
        )
        result = self.engine.sample_first(row, logits_1V, kind, _hook_for({0: request}))
        if request.error is not None:
            return
        request.accept(result.tokens[0], result.logprobs[0] if result.logprobs else None)

    def _restrict(self, row: int, request: Request) -> None:
        """Tell the device what a request's constraint allows next. If the constraint fails, so does the request."""
        try:
            words_W = request.allowed_words(self.engine.model.config.vocab_size)
        except Exception as err:
            return request.fail(err)
        if words_W is not None:
            self.engine.set_allowed(row, words_W)

    def _release_finished(self) -> None:
        for row in [row for row, request in self.active.items() if request.finish_reason is not None]:
            request = self.active.pop(row)
            self.prefixes.keep(row, request)
            self.engine.clear_row(row)
            if request.error is not None or request.launched > len(request.output_ids):  # some are in flight
                self._erase(row, len(request.proven_ids), request.positions)
            if request.is_processed:
                self.engine.clear_processors(row)
        if not self.active:  # nobody waits for what is in flight
            self.dropped_tokens += sum(len(rows) for rows in self._in_flight)
            self._in_flight.clear()
            self.engine.forget()
        self._close_gaps()

    def _close_gaps(self) -> None:
        """Move requests down to free rows where steps get smaller by it: a step runs all rows up to the last in use.

        Not while others wait, who will fill the gaps.
        """
        if self.waiting:
            return
        bucket = self.engine.batch_bucket
        while self.active and bucket(max(self.active) + 1) > bucket(len(self.active)):
            last, free = max(self.active), min(set(range(max(self.active))) - set(self.active))
            request = self.active[last]
            self._swap(last, free, request.positions)
            self.active[free] = self.active.pop(last)
            request.row = free
            if request.prefill is not None:
                request.prefill.row = free

    def _erase(self, row: int, start: int, end: int) -> None:
        """Rid a row of what may be NaN: keys and values of tokens that led to no other token, and the last padding."""
        self.engine.erase(row, start, end + CHUNK_SIZES[-1])

    def _swap(self, row: int, other: int, positions: int = 0) -> None:
        """Exchange two rows. positions: in use by the request in one of them."""
        length = max(positions, *(len(self.prefixes.tokens(r, self.active)) for r in (row, other)))
        if length:
            self.engine.swap_rows(row, other, length)
        self.prefixes.swap(row, other)


def _hook_for(rows: dict[int, Request]) -> Hook | None:
    """What runs the logits_processor of each row that has one; None if none has. If one fails, so does its request,
    and what the step samples for it is dropped."""
    hooked = {row: request for row, request in rows.items() if request.logits_processor is not None}
    if not hooked:
        return None

    def hook(logits_BV: Tensor) -> Tensor:
        logits_BV = logits_BV.clone()
        for row, request in hooked.items():
            try:
                logits_BV[row] = request.process(logits_BV[row])
            except Exception as err:
                request.fail(err)
        return logits_BV

    return hook
