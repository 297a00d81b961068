"""Admission: how many requests may wait for a row. Beyond that, whoever brings one waits, or is refused."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future


class QueueFullError(RuntimeError):
    """As many requests wait as may; try again later."""


class Admission:
    """A bounded number of places, given out in the order in which they were asked for. Thread-safe."""

    def __init__(self, places: int) -> None:
        self._free = places
        self.places = places
        self._asking: deque[Future[None]] = deque()
        self._lock = threading.RLock()  # may be asked for again by a Generator that is collected meanwhile

    def ask(self) -> Future[None]:
        """A future that is done as soon as there is a place, which belongs to the asker then. Cancel it to give up."""
        future: Future[None] = Future()
        with self._lock:
            if self._free > 0:
                self._free -= 1
                future.set_result(None)
            else:
                self._asking.append(future)
        return future

    def give_back(self) -> None:
        """A place is free again."""
        with self._lock:
            while self._asking:
                future = self._asking.popleft()
                if future.set_running_or_notify_cancel():
                    future.set_result(None)
                    return
            self._free += 1

    def give_up(self, place: Future[None]) -> None:
        """Ask no longer, or give back what was got."""
        if not place.cancel() and place.exception() is None:
            self.give_back()

    def close(self, error: Exception) -> None:
        """Refuse all that are still asking."""
        with self._lock:
            asking, self._asking = self._asking, deque()
        for future in asking:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
