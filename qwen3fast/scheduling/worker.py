"""EngineWorker: the thread that steps a scheduler. Other threads send it jobs and wait for their results.

Only the worker's thread uses the scheduler and the engine, which need no locks: jobs of other threads wait in an inbox,
which the worker empties between steps.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

import torch

from qwen3fast.scheduling.request import Request
from qwen3fast.scheduling.scheduler import Scheduler
from qwen3fast.scheduling.waiter import Waiter, wake_all

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
CLOSED = "this Generator is closed; build a new one"
FORKED = (
    "this Generator was used before os.fork(), and its thread does not exist in the child process; build another one "
    "there, or fork before the first use (gunicorn: without --preload; multiprocessing: start method 'spawn')"
)
OWN_THREAD = (
    "this call would wait for itself: it was made in the Generator's own thread, by a logits_processor or another "
    "callback of a request; make it from another thread, after the callback has returned"
)


class ClosedError(RuntimeError):
    """The error of calls to a closed Generator."""


class Job(NamedTuple):
    """A job for the thread. If the thread has ended, `refuse` is called with the reason, instead of `run`."""

    run: Callable[[], None]
    refuse: Callable[[BaseException], None] = lambda error: None


class EngineWorker:
    """A thread that runs a scheduler. It starts with the first job and sleeps while there is nothing to do.

    It has no reference to its Generator: an unused Generator is garbage collected, which ends the thread. No lock is
    held where Python may collect garbage, as this may close a Generator.

    thread: None before the first job.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler: Scheduler | None = scheduler
        self._inbox: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._starting = threading.RLock()
        self._process_id = os.getpid()  # of the thread, once it runs
        self.thread: threading.Thread | None = None
        self._to_wake: list[Waiter] = []  # after this step
        self._is_closed = False  # no more jobs are accepted
        self._has_ended = False  # no more jobs are run
        self._end_error: BaseException = ClosedError("the Generator was closed while this request was running")

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler. Raises: ClosedError after `close`."""
        scheduler = self._scheduler
        if scheduler is None:
            raise ClosedError(CLOSED)
        return scheduler

    @property
    def is_own_thread(self) -> bool:
        """True if the caller runs in the worker's thread, as callbacks of requests do."""
        return threading.current_thread() is self.thread

    @property
    def is_forked(self) -> bool:
        """True in a child process that was forked after the thread had started: it does not have the thread."""
        return self.thread is not None and os.getpid() != self._process_id

    def check_waiting(self) -> None:
        """Check that the caller may wait for the worker.

        Raises: RuntimeError in the worker's own thread and in a forked process, where it would wait forever.
        """
        if self.is_own_thread:
            raise RuntimeError(OWN_THREAD)
        self._check_process()

    def check_caller(self) -> None:
        """Check that the caller may ask for replies. Raises: as `check_waiting`; ClosedError after `close`."""
        self.check_waiting()
        self.scheduler  # noqa: B018  raises if it is closed

    def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Run a function in the thread, between two steps; called in the thread itself, run it at once.

        Returns: the function's result. Raises: the function's exceptions; ClosedError after `close`.
        """
        if self.is_own_thread:
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
        """Queue requests, all of them before the next step: their batches do not depend on timing."""

        def add() -> None:
            for request in requests:
                self.scheduler.add(request)

        def refuse(error: BaseException) -> None:
            for request in requests:
                request.leave_queue()
                request.fail(error)

        self._post(Job(add, refuse))

    def cancel(self, request: Request) -> None:
        """Cancel a request before the next step. No effect if it has ended."""
        if not self.is_forked:
            with suppress(ClosedError):  # then it has ended
                self._post(Job(lambda: self.scheduler.cancel(request)))

    def wake(self, waiter: Waiter) -> None:
        """Wake a coroutine; in the worker's thread, when the step has ended: all of a step's with one call."""
        if self.is_own_thread:
            self._to_wake.append(waiter)
        else:
            wake_all([waiter])

    def close(self) -> None:
        """End all requests and the thread. May be called more than once; in a forked process, it only forgets them."""
        self._is_closed = True
        if self.is_forked:
            self._scheduler, self._has_ended = None, True
            return
        self._inbox.put(Job(self._end))
        with self._starting:
            thread = self.thread
            if thread is None:  # and none will start
                self._end()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _check_process(self) -> None:
        if self.is_forked:
            raise RuntimeError(FORKED)

    def _post(self, job: Job) -> None:
        if self._is_closed:
            raise ClosedError(CLOSED)
        self._check_process()
        if self.thread is None:
            with self._starting:
                if self.thread is None and not self._has_ended:
                    thread = threading.Thread(target=self._run, name="qwen3fast", daemon=True)
                    self._process_id, self.thread = os.getpid(), thread
                    try:
                        thread.start()
                    except RuntimeError:  # the system refuses the process another thread
                        self.thread = None
                        raise
        self._inbox.put(job)
        if self._has_ended:  # in the meantime: jobs that came too late are refused
            self._refuse_jobs()

    def _run(self) -> None:
        scheduler = self.scheduler
        if scheduler.engine.device.type == "cuda":
            torch.cuda.set_device(scheduler.engine.device)
            torch.cuda.synchronize()  # weights and buffers may be on their way on a stream of the thread that made them
        while not self._has_ended:
            try:
                job = self._next_job(wait=scheduler.is_idle)
                if job is not None:
                    job.run()
                else:
                    scheduler.step()
            except BaseException as err:  # any error: callers must not wait forever for a thread that has ended
                self._recover(scheduler, err)
            if self._to_wake:
                waiters, self._to_wake = self._to_wake, []
                wake_all(waiters)

    def _next_job(self, wait: bool) -> Job | None:
        try:
            return self._inbox.get(block=wait)
        except queue.Empty:
            return None

    def _recover(self, scheduler: Scheduler, error: BaseException) -> None:
        logger.error("a step failed; the requests in it end with this error", exc_info=error)
        try:
            scheduler.fail_all(error)
        except BaseException:  # the device cannot even clean up: nothing can run after that
            logger.exception("cleaning up failed as well; this Generator is closed")
            self._is_closed, self._end_error = True, error
            self._end()

    def _end(self) -> None:
        """End all requests and refuse all later jobs: the last job of the thread."""
        scheduler, self._scheduler, self._has_ended = self._scheduler, None, True
        if scheduler is not None:
            scheduler.end_all(self._end_error)
            with suppress(Exception):  # of a broken device
                scheduler.engine.close()
        self._refuse_jobs()

    def _refuse_jobs(self) -> None:
        while (job := self._next_job(wait=False)) is not None:
            job.refuse(self._end_error)
