"""Dispatcher: passes requests to a worker, at once or through a bounded queue, and waits for replies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import TimeoutError as FutureTimeoutError
from queue import SimpleQueue

from qwen3fast.engine import Engine
from qwen3fast.results import GeneratorStats, StreamChunk
from qwen3fast.scheduling.admission import Admission, QueueFullError
from qwen3fast.scheduling.handle import RequestHandle
from qwen3fast.scheduling.scheduler import Scheduler
from qwen3fast.scheduling.uncached import UncachedRun
from qwen3fast.scheduling.worker import ClosedError, EngineWorker


class Dispatcher:
    """The owner of a Generator's engine, scheduler, worker and admission, which runs its requests. Thread-safe.

    Methods that wait raise RuntimeError where they would wait forever: in the worker's own thread, and in a process
    forked after its first request.

    Attributes:
        worker: only its thread may touch engine and scheduler while requests run: `worker.call(function, ...)` runs a
            function there, between two steps.
    """

    def __init__(self, engine: Engine, max_queue: int, prefix_reuse: bool) -> None:
        self.worker = EngineWorker(Scheduler(engine, prefix_reuse))
        self.admission = Admission(max_queue)

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler. Raises: ClosedError after `close`."""
        return self.worker.scheduler

    @property
    def engine(self) -> Engine:
        """The engine. Raises: ClosedError after `close`."""
        return self.worker.scheduler.engine

    def run(self, handles: list[RequestHandle], use_cache: bool, report: Callable[[], object]) -> None:
        """Run requests to completion. use_cache: False computes without a cache. report: called after each reply."""
        if not use_cache:
            for handle in handles:
                run = self.worker.call(UncachedRun, self.engine, handle.request)
                while not handle.is_done:
                    self.worker.call(run.step)  # one token at a time: other requests run in between
                report()
            return
        ended: SimpleQueue[None] = SimpleQueue()
        for handle in handles:
            handle.when_done(lambda: ended.put(None))
        self.worker.add([handle.request for handle in handles])
        for _ in handles:
            ended.get()
            report()

    def stream(self, handle: RequestHandle) -> Iterator[StreamChunk]:
        """Queue a request at the first chunk and yield its chunks. Dropping the iterator frees the request's slot."""
        try:
            self.worker.add([handle.request])
            yield from handle
        finally:
            handle.cancel()

    def submit(self, handle: RequestHandle, timeout: float | None) -> RequestHandle:
        """Queue a request, waiting while the queue is full.

        timeout: seconds to wait; None waits without limit.
        Raises: QueueFullError after the timeout; ClosedError.
        """
        place = self.admission.ask()
        try:
            place.result(timeout)
        except FutureTimeoutError:
            self.admission.give_up(place)
            raise QueueFullError(
                f"{self.admission.places} requests wait already (max_queue); try again later, or wait longer"
            ) from None
        except BaseException:
            self.admission.give_up(place)
            raise
        self._start(handle)
        return handle

    async def astream(self, handle: RequestHandle) -> AsyncGenerator[StreamChunk, None]:
        """Queue a request as `submit` does and yield its chunks, without blocking the event loop."""
        place = self.admission.ask()
        try:
            await asyncio.wrap_future(place)
        except BaseException:
            self.admission.give_up(place)
            raise
        self._start(handle)
        try:
            async for chunk in handle:
                yield chunk
        finally:
            handle.cancel()

    def warmup(self, report: Callable[[str], None]) -> None:
        """Compile and capture everything that requests with a cache need; see `Engine.warmup`.

        Raises: RuntimeError while requests are running.
        """
        self.worker.check_caller()
        scheduler = self.scheduler

        def warm_up() -> None:
            if not scheduler.is_idle:
                raise RuntimeError("warmup() needs all slots empty; call it before the first request")
            scheduler.prefixes.forget_all()
            scheduler.engine.warmup(report)

        self.worker.call(warm_up)

    def stats(self, weight_bytes: int) -> GeneratorStats:
        """Return statistics, taken after the current step."""
        return self.worker.call(self._stats, weight_bytes)

    def close(self) -> None:
        """End all requests, also queued ones, and the worker's thread. May be called more than once."""
        self.admission.close(ClosedError("the Generator was closed while this request waited"))
        self.worker.close()

    def _start(self, handle: RequestHandle) -> None:
        """Queue a request that has a place."""
        try:
            handle.request.on_leave_queue = self.admission.give_back
            self.worker.add([handle.request])
        except RuntimeError:  # closed meanwhile, or no thread to run it
            handle.request.leave_queue()
            raise
        except BaseException:  # interrupted, perhaps after it was queued: nobody else has the handle
            handle.cancel()
            raise

    def _stats(self, weight_bytes: int) -> GeneratorStats:
        scheduler, engine = self.scheduler, self.engine
        return GeneratorStats(
            compilations=engine.compiler.compilations,
            compile_s=engine.compiler.seconds,
            cuda_graphs=len(engine.graphs) if engine.graphs is not None else 0,
            kv_cache_bytes=engine.cache.num_bytes,
            weight_bytes=weight_bytes,
            slots_in_use=len(scheduler.active),
            max_batch_size=engine.cache.max_batch_size,
            waiting=len(scheduler.waiting),
            prefilled_tokens=scheduler.prefilled_tokens,
            reused_tokens=scheduler.reused_tokens,
            adapter_bytes=engine.adapters.num_bytes if engine.adapters is not None else 0,
            forms=dict(engine.parts.forms.choices),
            compiling=engine.compiler.waiting,
        )
