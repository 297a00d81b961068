"""Waiter: a coroutine that waits for news of a reply, and is woken from the worker's thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from enum import Enum, auto


class For(Enum):
    """The events that a Waiter can wait for."""

    NOTHING = auto()
    NEWS = auto()
    END = auto()


class Waiter:
    """A coroutine that waits, and what it waits for (`waits_for`, which the lock of the reply guards).

    A wake-up from another thread costs a system call and a turn of the loop. So only coroutines that wait are woken,
    and `wake_all` wakes all waiters of a loop with one call.

    lost: called when the loop is closed and the coroutine can no longer be woken.
    """

    def __init__(self, lost: Callable[[], None]) -> None:
        self.waits_for = For.NOTHING
        self.loop = asyncio.get_running_loop()
        self.lost = lost
        self._woken = asyncio.Event()

    def is_woken_by(self, is_end: bool) -> bool:
        """Return whether to wake it for news, which may be the reply's end; then it waits no more.

        True as well if its loop is closed: `wake_all` finds that out.
        """
        if self.loop.is_closed():
            return True
        if self.waits_for is For.NEWS or (self.waits_for is For.END and is_end):
            self.waits_for = For.NOTHING
            return True
        return False

    def wake(self) -> None:
        """End `wait`. Call it in the loop's thread."""
        self._woken.set()

    async def wait(self, timeout_s: float | None = None) -> None:
        """Wait to be woken, or for a time; `waits_for` says for what, and must be set before."""
        timer = None if timeout_s is None else self.loop.call_later(timeout_s, self._woken.set)
        try:
            await self._woken.wait()
        finally:
            self._woken.clear()
            if timer is not None:
                timer.cancel()


def wake_all(waiters: Iterable[Waiter]) -> None:
    """Wake waiters, from any thread: one call per event loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[Waiter]] = {}
    for waiter in waiters:
        by_loop.setdefault(waiter.loop, []).append(waiter)
    for loop, those in by_loop.items():
        try:
            loop.call_soon_threadsafe(_wake_each, those)
        except RuntimeError:  # the loop is closed
            for waiter in those:
                waiter.lost()


def _wake_each(waiters: list[Waiter]) -> None:
    for waiter in waiters:
        waiter.wake()
