"""RequestHandle: a reply in progress, to wait for, stream or cancel, from any thread or task."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager

from qwen3fast.checks import checked_timeout
from qwen3fast.results import GenerationResult, StreamChunk
from qwen3fast.scheduling.reply import logprobs_of, prompt_logprobs_of, result_of
from qwen3fast.scheduling.request import Request
from qwen3fast.scheduling.waiter import For, Waiter
from qwen3fast.scheduling.worker import EngineWorker
from qwen3fast.text.stream import TextStream
from qwen3fast.text.tool_calls import CallFormat, JsonCalls


class RequestHandle:
    """A reply in progress: iterate over its chunks with `for` or `async for`, or wait for `result()`.

    With several readers, each chunk goes to only one of them. The texts of all chunks, joined, are the result's text.
    """

    def __init__(
        self, request: Request, stream: TextStream, worker: EngineWorker, call_format: CallFormat | None = None
    ) -> None:
        """call_format: of the tool calls in the answer; Qwen3's JSON by default."""
        self.request, self._stream, self._worker = request, stream, worker
        self._call_format: CallFormat = call_format or JsonCalls()
        self._changed = threading.Condition()
        self._pieces: list[tuple[str, str, str]] = []  # text, reasoning, answer
        self._num_seen = self._num_given = 0  # tokens so far, and tokens already in chunks
        self._is_over = False  # the last chunk has been read
        self._waiters: list[Waiter] = []
        self._finished: GenerationResult | None = None
        self._at_end: Callable[[], None] = lambda: None
        request.on_change = self._on_change

    @property
    def is_done(self) -> bool:
        """True once the reply has ended, for any reason."""
        return self._finished is not None or self.request.error is not None

    def result(self, timeout: float | None = None) -> GenerationResult:
        """Wait for the end of the reply and return it.

        The result of a canceled reply has the tokens so far and finish_reason "cancelled".

        timeout: seconds; None waits without limit.
        Raises: TimeoutError; the error that ended the request: FloatingPointError for NaN logits, an exception of its
        logits_processor, RuntimeError if the Generator was closed; RuntimeError in the Generator's own thread and in a
        forked process, where it would wait forever.
        """
        self._check_caller()
        with self._changed:
            if not self._changed.wait_for(lambda: self.is_done, checked_timeout("timeout", timeout)):
                raise TimeoutError(f"the reply has not ended within {timeout} s; it continues; cancel() ends it")
        return self._result()

    def when_done(self, call: Callable[[], None]) -> None:
        """Set a function to call at the end of the reply; set it before the reply starts.

        It runs in the Generator's thread: keep it short. It must not ask the Generator for replies.
        """
        self._at_end = call

    def cancel(self) -> None:
        """End the reply before the next step and free its slot. No effect if it has ended."""
        if not self.is_done:
            self._worker.cancel(self.request)

    def __iter__(self) -> Iterator[StreamChunk]:
        """Yield chunks as they come; the last one has the result. Raises: as `result`."""
        while not self._is_over:
            self._check_caller()
            with self._changed:
                self._changed.wait_for(self._has_news)
                chunk = self._take()
            yield chunk

    def __aiter__(self) -> AsyncIterator[StreamChunk]:
        """Yield chunks as they come, without blocking the event loop; the last one has the result.

        Raises: as `result`.
        """
        return self.chunks()

    async def chunks(self, min_interval_s: float = 0.0) -> AsyncIterator[StreamChunk]:
        """Yield chunks, without blocking the event loop, at least `min_interval_s` apart; the last one comes at once.

        An interval lets several tokens share the cost of a chunk. Raises: as `result`.
        """
        with self._waiter() as waiter:
            while not self._is_over:
                self._check_caller()
                with self._changed:
                    chunk = self._take() if self._has_news() else None
                    waiter.waits_for = For.NEWS if chunk is None else For.NOTHING
                if chunk is None:
                    await waiter.wait()
                    continue
                taken_s = time.perf_counter()
                yield chunk
                await self._wait_until(taken_s + min_interval_s, waiter)

    async def aresult(self) -> GenerationResult:
        """Wait for the end of the reply, without blocking the event loop. Raises: as `result`."""
        with self._waiter() as waiter:
            while True:
                self._check_caller()
                with self._changed:
                    if self.is_done:
                        return self._result()
                    waiter.waits_for = For.END
                await waiter.wait()

    async def _wait_until(self, until_s: float, waiter: Waiter) -> None:
        """Wait until a time of time.perf_counter(), or for the end of the reply."""
        left_s = until_s - time.perf_counter()
        if left_s <= 0:
            return
        with self._changed:
            if self.is_done:
                return
            waiter.waits_for = For.END
        await waiter.wait(left_s)

    @contextmanager
    def _waiter(self) -> Iterator[Waiter]:
        """Yield a waiter that news of the reply wake."""
        waiter = Waiter(lost=self.cancel)
        with self._changed:
            self._waiters.append(waiter)
        try:
            yield waiter
        finally:
            with self._changed:
                self._waiters.remove(waiter)

    def _check_caller(self) -> None:
        """Raise RuntimeError where the caller would wait forever."""
        if not self.is_done:
            self._worker.check_waiting()

    def _on_change(self) -> None:
        """Record new tokens and wake waiting readers. Called in the worker's thread."""
        request = self.request
        with self._changed:
            if request.finish_reason is not None:
                self._stream.finish()
            self._pieces.append(self._stream.take())
            self._num_seen = len(request.output_ids)
            if request.finish_reason is not None and request.error is None:
                self._finished = result_of(request, self._stream, self._call_format)
            self._changed.notify_all()
            woken = [waiter for waiter in self._waiters if waiter.is_woken_by(self.is_done)]
        for waiter in woken:
            self._worker.wake(waiter)
        if request.finish_reason is not None:
            self._at_end()

    def _has_news(self) -> bool:
        return self.is_done or self._num_seen > self._num_given

    def _take(self) -> StreamChunk:
        pieces, self._pieces = self._pieces, []
        text, reasoning, answer = ("".join(part) for part in zip(*pieces, strict=True)) if pieces else ("", "", "")
        new = self.request.output_ids[self._num_given : self._num_seen]
        logprobs = logprobs_of(self.request, self._num_given, self._num_seen)
        prompt_logprobs = prompt_logprobs_of(self.request) if not self._num_given else None
        self._num_given = self._num_seen
        result = self._result() if self.is_done else None
        self._is_over = result is not None
        reason = result.finish_reason if result else None
        return StreamChunk(text, new, reason, result, reasoning, answer, logprobs, prompt_logprobs)

    def _result(self) -> GenerationResult:
        if self.request.error is not None:
            # Other requests may have the same error, and each raising of it appends to its traceback.
            raise self.request.error.with_traceback(self.request.error_traceback)
        assert self._finished is not None, "asked for when it is done"
        return self._finished
