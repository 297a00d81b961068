"""Admission: a limit on the requests that wait for a slot. Beyond it, callers wait themselves or are refused."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future


class QueueFullError(RuntimeError):
    """The error of a full queue: `max_queue` requests are waiting. Try again later."""


class Admission:
    """A bounded number of places in the queue, given out first come, first served. Thread-safe."""

    def __init__(self, places: int) -> None:
        self._free = places
        self.places = places
        self._asking: deque[Future[None]] = deque()
        self._lock = threading.RLock()  # reentrant: a Generator may be garbage collected while it is held

    def ask(self) -> Future[None]:
        """Return a future that is done when the caller has a place; `give_up` stops waiting for it."""
        future: Future[None] = Future()
        with self._lock:
            if self._free > 0:
                self._free -= 1
                future.set_result(None)
            else:
                self._asking.append(future)
        return future

    def give_back(self) -> None:
        """Give a place back to the queue."""
        with self._lock:
            while self._asking:
                future = self._asking.popleft()
                if future.set_running_or_notify_cancel():
                    future.set_result(None)
                    return
            self._free += 1

    def give_up(self, place: Future[None]) -> None:
        """Stop waiting for a place, or give it back."""
        if not place.cancel() and place.exception() is None:
            self.give_back()

    def close(self, error: Exception) -> None:
        """Refuse all callers that still wait for a place."""
        with self._lock:
            asking, self._asking = self._asking, deque()
        for future in asking:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
