"""RequestHandle: a reply that is being made, to wait for, read chunk by chunk, or cancel, from any thread or task."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator

from qwen3fast.checks import checked_timeout
from qwen3fast.results import GenerationResult, RequestMetrics, StreamChunk, TokenLogprobs
from qwen3fast.scheduling.request import Request
from qwen3fast.scheduling.worker import EngineWorker
from qwen3fast.text.stream import TextStream
from qwen3fast.text.tool_calls import CallFormat, JsonCalls, parse_tool_calls


class RequestHandle:
    """One reply. Iterate over its chunks, with `for` or `async for`; or wait for `result()`.

    Each chunk goes to one reader, whoever asks first. The chunks' texts, joined, are the result's text.
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
        self._listeners: list[Callable[[], None]] = []
        self._finished: GenerationResult | None = None
        self._at_end: Callable[[], None] = lambda: None
        request.on_change = self._on_change

    @property
    def is_done(self) -> bool:
        """Whether the reply has ended, for whatever reason."""
        return self._finished is not None or self.request.error is not None

    def result(self, timeout: float | None = None) -> GenerationResult:
        """Wait for the end of the reply. A cancelled reply gives what it had, with finish_reason "cancelled".

        timeout: seconds; None waits for ever.
        Raises: TimeoutError; or the error that ended the request: FloatingPointError for NaN logits, an error of its
        logits_processor, RuntimeError if the Generator was closed. RuntimeError also where waiting would never end: in
        the Generator's own thread, or in a forked process.
        """
        self._check_caller()
        with self._changed:
            if not self._changed.wait_for(lambda: self.is_done, checked_timeout("timeout", timeout)):
                raise TimeoutError(f"the reply has not ended within {timeout} s; it goes on, cancel() would end it")
        return self._result()

    def when_done(self, call: Callable[[], None]) -> None:
        """Set a function to call at the end, before the reply starts. It runs in the Generator's thread: keep it short.

        It must not ask the Generator for replies.
        """
        self._at_end = call

    def cancel(self) -> None:
        """End the reply before the next step, and free its slot. Without effect if it has ended."""
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

    async def __aiter__(self) -> AsyncIterator[StreamChunk]:
        """Yield chunks as they come, without blocking the event loop; the last one has the result.

        Raises: as `result`.
        """
        loop, news = asyncio.get_running_loop(), asyncio.Event()

        def listener() -> None:
            try:
                loop.call_soon_threadsafe(news.set)
            except RuntimeError:  # the loop is closed: nobody listens any more
                self.cancel()

        with self._changed:
            self._listeners.append(listener)
        try:
            while not self._is_over:
                self._check_caller()
                with self._changed:
                    chunk = self._take() if self._has_news() else None
                if chunk is None:
                    await news.wait()
                    news.clear()
                else:
                    yield chunk
        finally:
            with self._changed:
                self._listeners.remove(listener)

    def _check_caller(self) -> None:
        """Raise RuntimeError where waiting would never end."""
        if not self.is_done:
            self._worker.check_waiting()

    def _on_change(self) -> None:
        """Record what is new, and wake those that wait. Called in the worker's thread."""
        request = self.request
        with self._changed:
            if request.finish_reason is not None:
                self._stream.finish()
            self._pieces.append(self._stream.take())
            self._num_seen = len(request.output_ids)
            if request.finish_reason is not None and request.error is None:
                self._finished = self._make_result()
            self._changed.notify_all()
            listeners = list(self._listeners)
        for listener in listeners:
            listener()
        if request.finish_reason is not None:
            self._at_end()

    def _has_news(self) -> bool:
        return self.is_done or self._num_seen > self._num_given

    def _take(self) -> StreamChunk:
        pieces, self._pieces = self._pieces, []
        text, reasoning, answer = ("".join(part) for part in zip(*pieces, strict=True)) if pieces else ("", "", "")
        new = self.request.output_ids[self._num_given : self._num_seen]
        logprobs = self._logprobs(self._num_given, self._num_seen)
        self._num_given = self._num_seen
        result = self._result() if self.is_done else None
        self._is_over = result is not None
        return StreamChunk(text, new, result.finish_reason if result else None, result, reasoning, answer, logprobs)

    def _result(self) -> GenerationResult:
        if self.request.error is not None:
            raise self.request.error
        assert self._finished is not None, "asked for when it is done"
        return self._finished

    def _make_result(self) -> GenerationResult:
        request, stream = self.request, self._stream
        first_s = request.first_token_s or request.finished_s  # cancelled before there was one
        prefill_started_s = request.prefill_started_s or request.finished_s
        metrics = RequestMetrics(
            prompt_tokens=len(request.prompt_ids),
            new_tokens=len(request.output_ids),
            queue_s=prefill_started_s - request.submitted_s,
            time_to_first_token_s=first_s - request.submitted_s,
            prefill_s=first_s - prefill_started_s,
            decode_s=request.finished_s - first_s,
            reused_tokens=request.reused_tokens,
        )
        parsed = parse_tool_calls(stream.answer, self._call_format)
        logprobs = self._logprobs(0, len(request.output_ids))
        return GenerationResult(
            stream.text,
            list(request.output_ids),
            str(request.finish_reason),
            metrics,
            stream.reasoning,
            parsed.content,
            parsed.tool_calls,
            parsed.malformed,
            logprobs,
        )

    def _logprobs(self, begin: int, end: int) -> list[TokenLogprobs] | None:
        """Return the log-probabilities of tokens begin..end - 1, if they were asked for."""
        request = self.request
        if request.logprobs is None:
            return None
        pairs = zip(request.output_ids[begin:end], request.output_logprobs[begin:end], strict=True)
        return [TokenLogprobs(token, at.chosen, list(zip(at.ids, at.values, strict=True))) for token, at in pairs]
