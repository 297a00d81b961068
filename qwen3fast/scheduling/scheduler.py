"""Scheduler: requests wait for a slot of the cache, are prefilled, decode together, and leave when they end.

Continuous batching (Orca, OSDI 2022) with prompts in chunks between decode steps (Sarathi, arXiv:2308.16369): a
running reply waits for at most one chunk, of one prompt or of several prompts together, and a free slot goes to the
next request at once. A slot keeps its contents after its request has ended, and prompts with the same beginning reuse
them (prefix_cache.py).
"""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future

from qwen3fast.engine.engine import Engine
from qwen3fast.engine.parts import CHUNK_SIZES
from qwen3fast.engine.state import StepKind
from qwen3fast.sampling.samplers import kind_for
from qwen3fast.scheduling.first_token import hook_for, restrict, sample_first
from qwen3fast.scheduling.prefix_cache import PrefixCache
from qwen3fast.scheduling.request import Adapter, Request


class Scheduler:
    """A scheduler of any number of requests on the slots of an engine. Not thread-safe: one caller at a time.

    A step runs all slots up to the last one in use, so requests get the lowest free one.

    Steps may run ahead (`Engine.lookahead`). A request's end by length is known in advance; its end by a stop token is
    found when the token is collected, and tokens launched for it in the meantime are dropped. Steps do not run ahead
    while a token within reach depends on the host (constraints, logits processors).

    If a request fails, the others continue; its `error` is the reason. An error of a whole step ends all requests that
    have a slot.

    Attributes:
        waiting: queued requests, oldest first. active: requests that have a slot, by slot.
        prefixes: the contents of slots.
        dropped_tokens: tokens computed after their request had ended, so far; at most `lookahead` per request, and one
            more if its logits_processor failed.
        reused_tokens, prefilled_tokens: prompt tokens found in the cache, and computed, so far.
    """

    def __init__(self, engine: Engine, reuse_prefixes: bool = True) -> None:
        self.engine = engine
        self.waiting: deque[Request] = deque()
        self.active: dict[int, Request] = {}
        # On CUDA, reductions over positions need multiples of the smallest chunk size, or are fastest at them.
        multiple = CHUNK_SIZES[0] if engine.device.type == "cuda" else 1
        cache = engine.cache
        self.prefixes = PrefixCache(cache.max_batch_size, cache.allocated_len, multiple, reuse_prefixes)
        self._in_flight: deque[dict[int, Request]] = deque()  # slots of each launched step, oldest first
        self._retiring: dict[Adapter, Future[None]] = {}  # adapters whose requests finish
        self.dropped_tokens = self.reused_tokens = self.prefilled_tokens = 0

    def add(self, request: Request) -> None:
        """Queue a request. It fails at once if its adapter is being unloaded."""
        try:
            if request.adapter is not None:
                request.adapter.check_loaded()
        except RuntimeError as err:
            request.leave_queue()
            return request.fail(err)
        self.waiting.append(request)

    def retire(self, adapter: Adapter) -> Future[None]:
        """Accept no more requests with an adapter. Returns: a future that is done when the earlier ones have ended."""
        adapter.is_loaded = False
        ended = self._retiring[adapter] = Future()
        self._release_finished()
        return ended

    def cancel(self, request: Request) -> None:
        """Cancel a request, queued, running or not yet added; its slot or its place in the queue is free at once."""
        if request.finish_reason is None:
            request.finish("cancelled")
        if request in self.waiting:
            self.waiting.remove(request)
        request.leave_queue()
        self._release_finished()

    @property
    def is_idle(self) -> bool:
        """True if no request waits or runs."""
        return not self.waiting and not self.active

    def step(self) -> None:
        """Compute a chunk of one prompt or more, if there is one, and one decode step for all requests past theirs."""
        requests = self._next_to_prefill()
        if requests:
            self._prefill(requests)
        # Before the first token, a request has launched 0; once all are launched, it only waits for results.
        slots = {slot: r for slot, r in self.active.items() if 0 < r.launched < r.max_tokens}
        if slots:
            self._launch(slots)
        while len(self._in_flight) > self._max_ahead(slots):
            self._collect()

    def _max_ahead(self, slots: dict[int, Request]) -> int:
        """Return how many steps may be in flight when the next one is launched. slots: of the last step."""
        ahead = self.engine.lookahead
        return ahead if slots and all(r.is_free_for(ahead + 1) for r in slots.values()) else 0

    def fail_all(self, error: BaseException) -> None:
        """End all requests that have a slot: a step failed, and its results cannot be trusted."""
        for request in self.active.values():
            if request.finish_reason is None:
                request.fail(error)
        self.prefixes.forget_all()
        self._release_finished()
        self._in_flight.clear()
        self.engine.forget()

    def end_all(self, error: BaseException) -> None:
        """End all requests without using the engine; nothing can run afterwards."""
        for request in [*self.waiting, *self.active.values()]:
            request.leave_queue()
            if request.finish_reason is None:
                request.fail(error)
        self.waiting.clear()
        self.active.clear()
        self._in_flight.clear()
        for ended in self._retiring.values():
            ended.set_exception(error)
        self._retiring.clear()

    def _launch(self, slots: dict[int, Request]) -> None:
        for slot, request in slots.items():
            restrict(self.engine, slot, request)
        slots = {slot: request for slot, request in slots.items() if request.error is None}
        if not slots:
            return self._release_finished()
        # Of a slot's tokens, all but the newest are in the cache already; this step writes the newest.
        used = max(request.positions for request in slots.values())
        kind = StepKind(
            kind_for(request.sampling[:2] for request in slots.values()),
            any(request.is_processed for request in slots.values()),
            any(request.logprobs is not None for request in slots.values()),
            any(request.adapter is not None for request in slots.values()),
        )
        self.engine.launch(max(slots) + 1, used, kind, hook_for(slots))
        self._in_flight.append(slots)
        for slot, request in slots.items():
            request.launched += 1
            if request.launched == request.max_tokens:
                self.engine.clear_row(slot)  # later steps must not advance it

    def _collect(self) -> None:
        result, slots = self.engine.collect(), self._in_flight.popleft()
        for slot, request in slots.items():
            if request.finish_reason is not None:
                self.dropped_tokens += 1
                continue
            request.accept(result.tokens[slot], result.logprobs[slot] if result.logprobs else None)
        self._release_finished()

    def _next_to_prefill(self) -> list[Request]:
        """Return the requests that compute a chunk of their prompt in this step; admit waiting ones, oldest first.

        Other prompts join the oldest one if their next chunk fits the size of its chunk, up to `Engine.max_prompts`.
        A request whose whole prompt was found in the cache has no chunk left; only its first token is sampled.
        """
        prompts = sorted((r for r in self.active.values() if r.prefill is not None), key=lambda r: r.prefill_started_s)
        first = prompts[0] if prompts else self._admit_next()
        if first is None:
            return []
        size = first.prefill.chunks[0] if first.prefill is not None else 0
        most = self.engine.max_prompts(size) if first.prefill is not None and first.prefill.fits(size) else 1
        together = [first, *(r for r in prompts[1:] if r.prefill is not None and r.prefill.fits(size))][:most]
        while len(together) < most and not self._gains_by_waiting():
            request = self._admit_next()
            if request is None:
                break
            if request.prefill is None or request.prefill.fits(size):
                together.append(request)
        return together

    def _admit_next(self) -> Request | None:
        """Give the oldest waiting request a slot; None if none waits or none is free."""
        while self.waiting and len(self.active) < self.engine.cache.max_batch_size:
            request = self.waiting.popleft()
            request.leave_queue()
            if request.finish_reason is None:
                try:
                    self._admit(request)
                except BaseException as err:  # it is in no list now, and its readers must not wait forever
                    request.fail(err)
                    raise
                return request
        return None

    def _gains_by_waiting(self) -> bool:
        """Return whether the next request can reuse more of its prompt once the prompts at hand are computed."""
        if not self.waiting:
            return False
        request = self.waiting[0]
        return self.prefixes.is_coming(request.prompt_ids, self.active, request.most_reused, request.adapter)

    def _admit(self, request: Request) -> None:
        """Give a request a slot, and copy the part of its prompt that another slot holds."""
        wanted = (request.prompt_ids, self.active, request.continues, request.most_reused, request.adapter)
        plan = self.prefixes.plan(*wanted)
        source = plan.source
        if plan.evicted != plan.slot:  # the request gets the lowest free slot; contents worth keeping move away from it
            self._swap(plan.slot, plan.evicted)
            source = {plan.slot: plan.evicted, plan.evicted: plan.slot}.get(source, source)
        if plan.reused and source != plan.slot:
            self.engine.copy_row(source, plan.slot, plan.reused)
        request.slot, request.reused_tokens = plan.slot, plan.reused
        self.reused_tokens += plan.reused
        self.prefilled_tokens += len(request.prompt_ids) - plan.reused
        self.active[plan.slot] = request
        request.prefill_started_s, request.prompt_logits_1V = time.perf_counter(), plan.logits_1V
        unproven = self.prefixes.take(plan.slot)
        if unproven > plan.reused:
            self._erase(plan.slot, plan.reused, unproven)
        if plan.logits_1V is None:
            request.prefill = self.engine.begin_prefill(
                plan.slot, request.prompt_ids, plan.reused, request.wanted_logprobs, request.sampling.adapter
            )

    def _prefill(self, requests: list[Request]) -> None:
        """Compute one chunk of each; after a prompt's last one, sample its first token.

        If this fails, the requests without a token fail.
        """
        try:
            self._compute_chunks([request for request in requests if request.prefill is not None])
            sample_first(self.engine, [request for request in requests if request.prompt_logits_1V is not None])
        except Exception as err:
            for request in requests:
                if request.finish_reason is None and not request.output_ids:
                    request.fail(err)
        self._release_finished()

    def _compute_chunks(self, requests: list[Request]) -> None:
        prefills = [request.prefill for request in requests if request.prefill is not None]
        if len(prefills) > 1:
            logits = self.engine.prefill_together(prefills)
        else:
            logits = [self.engine.prefill_step(prefill) for prefill in prefills]
        for request, prefill, logits_1V in zip(requests, prefills, logits, strict=True):
            logprobs, prefill.logprobs = prefill.logprobs, []
            request.accept_prompt(logprobs)
            if logits_1V is not None:
                request.prefill, request.prompt_logits_1V = None, logits_1V

    def _release_finished(self) -> None:
        for slot in [slot for slot, request in self.active.items() if request.finish_reason is not None]:
            request = self.active.pop(slot)
            self.prefixes.keep(slot, request)
            self.engine.clear_row(slot)
            if request.error is not None or request.launched > len(request.output_ids):  # some are in flight
                self._erase(slot, len(request.proven_ids), request.positions)
            if request.is_processed:
                self.engine.clear_processors(slot)
        if not self.active:  # nobody waits for the tokens in flight
            self.dropped_tokens += sum(len(slots) for slots in self._in_flight)
            self._in_flight.clear()
            self.engine.forget()
        self._close_gaps()
        if self._retiring:
            self._end_retired()

    def _end_retired(self) -> None:
        """Clear the slots of adapters that are being unloaded and that no request uses any more."""
        used = {request.adapter for request in (*self.waiting, *self.active.values())}
        for adapter in [adapter for adapter in self._retiring if adapter not in used]:
            self.engine.write_adapter(adapter.slot, {})
            self._retiring.pop(adapter).set_result(None)

    def _close_gaps(self) -> None:
        """Move requests to lower free slots where this makes steps smaller."""
        if self.waiting:  # they will fill the gaps
            return
        bucket = self.engine.batch_bucket
        while self.active and bucket(max(self.active) + 1) > bucket(len(self.active)):
            last, free = max(self.active), min(set(range(max(self.active))) - set(self.active))
            request = self.active[last]
            self._swap(last, free, request.positions)
            self.active[free] = self.active.pop(last)
            request.slot = free
            if request.prefill is not None:
                request.prefill.row = free

    def _erase(self, slot: int, start: int, end: int) -> None:
        """Zero positions start..end-1 of a slot, which may hold NaN, and the padding of a last chunk after them."""
        self.engine.erase(slot, start, end + CHUNK_SIZES[-1])

    def _swap(self, slot: int, other: int, positions: int = 0) -> None:
        """Exchange two slots. positions: in use by the request in one of them."""
        length = max(positions, *(len(self.prefixes.tokens(s, self.active)) for s in (slot, other)))
        if length:
            self.engine.swap_rows(slot, other, length)
        self.prefixes.swap(slot, other)
