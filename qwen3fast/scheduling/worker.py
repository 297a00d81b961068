"""EngineWorker: the one thread that steps a scheduler. Other threads hand it work and wait for the outcome.

The worker alone touches what the scheduler and the engine own, so nothing there needs a lock: other threads leave jobs
in an inbox, which the worker empties between steps.
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
    "this call would wait for itself: it comes from the Generator's own thread, out of a logits_processor or another "
    "callback of a request; make it in another thread, once the callback has returned"
)


class ClosedError(RuntimeError):
    """The Generator was closed."""


class Job(NamedTuple):
    """Work for the thread. If the thread has ended, `refuse` is called instead of `run`, with the reason."""

    run: Callable[[], None]
    refuse: Callable[[BaseException], None] = lambda error: None


class EngineWorker:
    """Runs a scheduler in a thread of its own, which starts with the first job and sleeps when there is nothing to do.

    It holds no reference to its Generator, so a Generator that is garbage can be collected and end it. No lock is held
    where Python may collect garbage, since that may close a Generator.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler: Scheduler | None = scheduler
        self._inbox: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._starting = threading.RLock()
        self._process_id = os.getpid()  # of the thread, once it runs
        self._thread: threading.Thread | None = None
        self._to_wake: list[Waiter] = []  # after this step
        self._is_closed = False  # no more jobs are accepted
        self._has_ended = False  # no more jobs are run
        self._end_error: BaseException = ClosedError("the Generator was closed while this request was running")

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler that it runs. Raises: ClosedError after `close`."""
        scheduler = self._scheduler
        if scheduler is None:
            raise ClosedError(CLOSED)
        return scheduler

    @property
    def thread(self) -> threading.Thread | None:
        """The thread; None before the first job."""
        return self._thread

    @property
    def is_own_thread(self) -> bool:
        """Whether the caller runs in the worker's thread, as callbacks of requests do."""
        return threading.current_thread() is self._thread

    @property
    def is_forked(self) -> bool:
        """Whether this is a child process, forked after the thread had started; the thread is missing here."""
        return self._thread is not None and os.getpid() != self._process_id

    def check_waiting(self) -> None:
        """Check that the caller may wait for the worker.

        Raises: RuntimeError in the worker's own thread and in a forked process, where it would wait for ever.
        """
        if self.is_own_thread:
            raise RuntimeError(OWN_THREAD)
        self._check_process()

    def check_caller(self) -> None:
        """Check that the caller may ask for replies. Raises: as `check_waiting`; ClosedError after `close`."""
        self.check_waiting()
        self.scheduler  # noqa: B018  raises if it is closed

    def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Run a function in the thread, between two steps; in the thread itself, at once.

        Returns: the function's result. Raises: what it raises; ClosedError after `close`.
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
        """Queue requests, all of them before the next step, to batch them in the same way each time."""

        def add() -> None:
            for request in requests:
                self.scheduler.add(request)

        def refuse(error: BaseException) -> None:
            for request in requests:
                request.leave_queue()
                request.fail(error)

        self._post(Job(add, refuse))

    def cancel(self, request: Request) -> None:
        """Take a request out before the next step. Without effect once it has ended."""
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
        """End all requests and the thread. May be called twice, and in a forked process, where it only forgets them."""
        self._is_closed = True
        if self.is_forked:
            self._scheduler, self._has_ended = None, True
            return
        self._inbox.put(Job(self._end))
        with self._starting:
            thread = self._thread
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
        if self._thread is None:
            with self._starting:
                if self._thread is None and not self._has_ended:
                    thread = threading.Thread(target=self._run, name="qwen3fast", daemon=True)
                    self._process_id, self._thread = os.getpid(), thread
                    try:
                        thread.start()
                    except RuntimeError:  # the system refuses the process another thread
                        self._thread = None
                        raise
        self._inbox.put(job)
        if self._has_ended:  # meanwhile: whoever finds the jobs that came too late refuses them
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
            except BaseException as err:  # any error: nobody may wait for ever for a thread that is gone
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
        except BaseException:  # the device cannot even clean up: nothing will run any more
            logger.exception("cleaning up failed as well; this Generator is closed")
            self._is_closed, self._end_error = True, error
            self._end()

    def _end(self) -> None:
        """Run the last job."""
        scheduler, self._scheduler, self._has_ended = self._scheduler, None, True
        if scheduler is not None:
            scheduler.end_all(self._end_error)
            with suppress(Exception):  # of a broken device
                scheduler.engine.close()
        self._refuse_jobs()

    def _refuse_jobs(self) -> None:
        while (job := self._next_job(wait=False)) is not None:
            job.refuse(self._end_error)
