"""Requests in and out of the rows of the cache: wait, prefill, decode together, leave at their own end.

Continuous batching (Orca, OSDI 2022) with prompts in chunks between decode steps (Sarathi, arXiv:2308.16369): a reply
that is running waits for one chunk of another's prompt at most, and a row is given on as soon as it is free.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import Tensor

from qwen3fast.engine.engine import Engine
from qwen3fast.sampling import kind_for


@dataclass(eq=False)
class Request:
    """One prompt on its way to a result. The caller sets the first group of fields; the scheduler fills the rest.

    on_token: called with each token that is not a stop id; returning True ends the request (a stop string).
    finish_reason: "stop", "length", "cancelled" or "error"; None while running. error says what went wrong.
    Times are those of time.perf_counter(), in seconds.
    """

    prompt_ids: list[int]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    max_tokens: int
    stop_ids: frozenset[int]
    on_token: Callable[[int], bool] = lambda token: False

    output_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    error: Exception | None = None
    row: int | None = None
    launched: int = 0  # tokens that were started, the first one included; those not collected yet are in flight
    prefilling: Iterator[Tensor | None] | None = None  # see Engine.prefill
    submitted_s: float = field(default_factory=time.perf_counter)
    prefill_started_s: float = 0.0
    first_token_s: float = 0.0
    finished_s: float = 0.0

    def accept(self, token: int) -> None:
        """Take a sampled token and decide whether the request ends with it."""
        if not self.output_ids:
            self.first_token_s = time.perf_counter()
        if token < 0:
            self.error = FloatingPointError(
                f"the model's logits are NaN or infinite at token {len(self.output_ids)} of the reply; the weights or "
                "the dtype are unsuitable (float16 overflows where bfloat16 does not)"
            )
            self.finish("error")
            return
        self.output_ids.append(token)
        if token in self.stop_ids or self.on_token(token):
            self.finish("stop")
        elif len(self.output_ids) >= self.max_tokens:
            self.finish("length")

    def finish(self, reason: str) -> None:
        """End the request."""
        self.finish_reason = reason
        self.finished_s = time.perf_counter()


class Scheduler:
    """Runs any number of requests through the rows of an engine. Not thread-safe: one caller at a time.

    Steps may run ahead (`Engine.lookahead`): a request's end by length is known beforehand, its end by a stop token is
    noticed when the token is collected, and what was launched for it meanwhile is dropped.

    Attributes:
        dropped_tokens: computed after their request had ended, so far; at most `lookahead` for each request.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.waiting: deque[Request] = deque()
        self.active: dict[int, Request] = {}
        self._in_flight: deque[dict[int, Request]] = deque()  # rows of each launched step, oldest first
        self.dropped_tokens = 0

    def add(self, request: Request) -> None:
        """Queue a request."""
        self.waiting.append(request)

    def cancel(self, request: Request) -> None:
        """Take a request out, wherever it is; its row is free at once."""
        if request.finish_reason is None:
            request.finish("cancelled")
        if request in self.waiting:
            self.waiting.remove(request)
        self._release_finished()

    def step(self) -> None:
        """One chunk of a prompt, if there is one to compute, and one decode step for all requests that have begun."""
        request = self._next_to_prefill()
        if request is not None:
            self._prefill(request)
        rows = {row: r for row, r in self.active.items() if 0 < r.launched < r.max_tokens}
        if rows:
            self._launch(rows)
        if self._in_flight and (not rows or len(self._in_flight) > self.engine.lookahead):
            self._collect()

    def _launch(self, rows: dict[int, Request]) -> None:
        # Of a row's tokens, all but the newest are in the cache already; this step writes the newest.
        used = max(len(request.prompt_ids) + request.launched for request in rows.values())
        kind = kind_for((request.temperature, request.top_k) for request in rows.values())
        self.engine.launch(max(rows) + 1, used, kind)
        self._in_flight.append(rows)
        for row, request in rows.items():
            request.launched += 1
            if request.launched == request.max_tokens:
                self.engine.clear_row(row)  # it must not go on while others do

    def _collect(self) -> None:
        tokens, rows = self.engine.collect(), self._in_flight.popleft()
        error: BaseException | None = None
        for row, request in rows.items():
            if request.finish_reason is not None:
                self.dropped_tokens += 1
                continue
            try:
                request.accept(tokens[row])
            except BaseException as err:  # of one request; the others must not lose their token
                request.finish("cancelled")
                error = err
        self._release_finished()
        if error is not None:
            raise error

    def _next_to_prefill(self) -> Request | None:
        """The request whose prompt is being computed, or the next one, in a row of its own now; None without any."""
        for request in self.active.values():
            if request.prefilling is not None:
                return request
        if not self.waiting or len(self.active) == self.engine.cache.max_batch_size:
            return None
        request = self.waiting.popleft()
        request.row = next(r for r in range(self.engine.cache.max_batch_size) if r not in self.active)
        request.prefill_started_s = time.perf_counter()
        request.prefilling = self.engine.prefill(request.row, request.prompt_ids)
        self.active[request.row] = request
        return request

    def _prefill(self, request: Request) -> None:
        """One chunk; after the last one, the first token."""
        assert request.prefilling is not None and request.row is not None, "it has been given a row"
        row = request.row
        try:
            logits_1V = next(request.prefilling)
            if logits_1V is not None:
                request.prefilling = None
                sampling = (request.temperature, request.top_k, request.top_p, request.min_p, request.seed)
                self.engine.set_row(row, len(request.prompt_ids), *sampling)
                kind = kind_for([(request.temperature, request.top_k)])
                request.launched = 1
                request.accept(self.engine.sample_first(row, logits_1V, kind))
        except BaseException:
            request.finish("cancelled")
            raise
        finally:
            self._release_finished()

    def _release_finished(self) -> None:
        for row in [row for row, request in self.active.items() if request.finish_reason is not None]:
            self.active.pop(row).prefilling = None
            self.engine.clear_row(row)
        if not self.active:  # nobody waits for what is in flight
            self.dropped_tokens += sum(len(rows) for rows in self._in_flight)
            self._in_flight.clear()
            self.engine.ring.clear()
