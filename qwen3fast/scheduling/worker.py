"""Runner: the one thread that steps a scheduler. Others hand it work, and wait for what comes of it.

Everything that the scheduler and the engine own is touched by this thread alone, so nothing there needs a lock: other
threads leave jobs in an inbox, which is emptied between steps.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

import torch

from qwen3fast.scheduling.request import Request
from qwen3fast.scheduling.scheduler import Scheduler

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
CLOSED = "this Generator is closed; build a new one"


class ClosedError(RuntimeError):
    """The Generator was closed."""


class Job(NamedTuple):
    """Something to do in the thread; `refuse` is called in its place, with the reason, if the thread has ended."""

    run: Callable[[], None]
    refuse: Callable[[BaseException], None] = lambda error: None


class Runner:
    """Runs a scheduler in a thread of its own, which starts with the first job and sleeps when there is nothing to do.

    It refers to nothing that refers to it, so that a Generator that nobody holds any longer can end it. No lock is held
    where Python may collect garbage, since closing a Generator may be what is collected.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler: Scheduler | None = scheduler
        self._inbox: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._starting = threading.RLock()
        self._thread: threading.Thread | None = None
        self._is_closed = False  # no more jobs are taken
        self._has_ended = False  # none is run any more
        self._end_error: BaseException = ClosedError("the Generator was closed while this request was running")

    @property
    def scheduler(self) -> Scheduler:
        """What it runs. Raises: ClosedError after `close`."""
        scheduler = self._scheduler
        if scheduler is None:
            raise ClosedError(CLOSED)
        return scheduler

    def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Run a function in the thread, between two steps. Returns what it returns, or raises what it raises.

        Raises: ClosedError after `close`.
        """
        if threading.current_thread() is self._thread:  # from a callback of a request
            return function(*arguments)
        future: Future[Result] = Future()

        def run() -> None:
            try:
                future.set_result(function(*arguments))
            except BaseException as err:
                future.set_exception(err)

        self._post(Job(run, future.set_exception))
        return future.result()

    def add(self, requests: list[Request]) -> None:
        """Queue requests, all before the next step, so that they are run alike each time."""

        def add() -> None:
            for request in requests:
                self.scheduler.add(request)

        def refuse(error: BaseException) -> None:
            for request in requests:
                request.leave_queue()
                request.fail(error)

        self._post(Job(add, refuse))

    def cancel(self, request: Request) -> None:
        """Take a request out before the next step; without effect once it has ended."""
        with suppress(ClosedError):  # then it has ended
            self._post(Job(lambda: self.scheduler.cancel(request)))

    def close(self) -> None:
        """End all requests and the thread. May be called twice."""
        self._is_closed = True
        self._inbox.put(Job(self._end))
        with self._starting:
            thread = self._thread
            if thread is None:  # nor will there be one
                self._end()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _post(self, job: Job) -> None:
        if self._is_closed:
            raise ClosedError(CLOSED)
        if self._thread is None:
            with self._starting:
                if self._thread is None and not self._has_ended:
                    self._thread = threading.Thread(target=self._run, name="qwen3fast", daemon=True)
                    self._thread.start()
        self._inbox.put(job)
        if self._has_ended:  # meanwhile; what came too late is refused, by whoever finds it
            self._refuse_jobs()

    def _run(self) -> None:
        scheduler = self.scheduler
        if scheduler.engine.device.type == "cuda":
            torch.cuda.set_device(scheduler.engine.device)
        while not self._has_ended:
            try:
                job = self._next_job(wait=scheduler.is_idle)
                if job is not None:
                    job.run()
                else:
                    scheduler.step()
            except BaseException as err:  # whatever it is, nobody must wait for ever for a thread that is gone
                self._recover(scheduler, err)

    def _next_job(self, wait: bool) -> Job | None:
        try:
            return self._inbox.get(block=wait)
        except queue.Empty:
            return None

    def _recover(self, scheduler: Scheduler, error: BaseException) -> None:
        logger.error("a step failed; the requests in it end with this error", exc_info=error)
        try:
            scheduler.fail_all(error)
        except BaseException:  # the device does not even clean up: nothing can be run any more
            logger.exception("cleaning up failed as well; this Generator is closed")
            self._is_closed, self._end_error = True, error
            self._end()

    def _end(self) -> None:
        """The last job."""
        scheduler, self._scheduler, self._has_ended = self._scheduler, None, True
        if scheduler is not None:
            scheduler.end_all(self._end_error)
            with suppress(Exception):  # of a device that is broken
                scheduler.engine.close()
        self._refuse_jobs()

    def _refuse_jobs(self) -> None:
        while (job := self._next_job(wait=False)) is not None:
            job.refuse(self._end_error)
