"""Runner: the one thread that steps a scheduler. Others hand it work, and wait for what comes of it.

Everything that the scheduler and the engine own is touched by this thread alone, so nothing there needs a lock: other
threads leave calls in an inbox, which is emptied between steps.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

import torch

from qwen3fast.engine.request import Request
from qwen3fast.engine.scheduler import Scheduler

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


CLOSED = "this Generator is closed; build a new one"


class ClosedError(RuntimeError):
    """The Generator was closed."""


class Runner:
    """Runs a scheduler in a thread of its own, which starts with the first call and sleeps when there is nothing to do.

    It refers to nothing that refers to it, so that a Generator that nobody holds any longer can end it.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler: Scheduler | None = scheduler
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._is_closed = False  # no more calls are taken
        self._has_ended = False  # the last one has been run

    @property
    def scheduler(self) -> Scheduler:
        """What it runs. Raises: ClosedError after `close`."""
        if self._scheduler is None:
            raise ClosedError(CLOSED)
        return self._scheduler

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

        self._post(run)
        return future.result()

    def add(self, requests: list[Request]) -> None:
        """Queue requests, all before the next step, so that they are run alike each time."""

        def add() -> None:
            for request in requests:
                self.scheduler.add(request)

        self._post(add)

    def cancel(self, request: Request) -> None:
        """Take a request out before the next step; without effect once it has ended."""
        with suppress(ClosedError):  # then it has ended
            self._post(lambda: self.scheduler.cancel(request))

    def close(self) -> None:
        """End all requests and the thread. May be called twice."""
        with self._starting:
            was_closed, self._is_closed = self._is_closed, True
            thread = self._thread
            if not was_closed:
                self._inbox.put(self._end)
        if thread is None:
            self._drain()
        elif thread is not threading.current_thread():
            thread.join()

    def _post(self, call: Callable[[], None]) -> None:
        with self._starting:  # so that nothing is put behind the end
            if self._is_closed:
                raise ClosedError(CLOSED)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="qwen3fast", daemon=True)
                self._thread.start()
            self._inbox.put(call)

    def _run(self) -> None:
        scheduler = self.scheduler
        if scheduler.engine.device.type == "cuda":
            torch.cuda.set_device(scheduler.engine.device)
        while not self._has_ended:
            self._drain(wait=scheduler.is_idle)
            try:
                if not self._has_ended and not scheduler.is_idle:
                    scheduler.step()
            except BaseException as err:  # whatever it is, nobody must wait for ever for a thread that is gone
                logger.exception("a step failed; the requests in it end with this error")
                scheduler.fail_all(err)

    def _drain(self, wait: bool = False) -> None:
        """Run the calls in the inbox. wait: until there is one, at least."""
        calls: deque[Callable[[], None]] = deque()
        if wait:
            calls.append(self._inbox.get())
        while True:
            try:
                calls.append(self._inbox.get_nowait())
            except queue.Empty:
                break
        for call in calls:
            call()

    def _end(self) -> None:
        scheduler, error = self.scheduler, ClosedError("the Generator was closed while this request was running")
        for request in scheduler.waiting:
            request.fail(error)
            request.leave_queue()
        scheduler.waiting.clear()
        scheduler.fail_all(error)
        scheduler.engine.close()
        self._scheduler, self._has_ended = None, True
