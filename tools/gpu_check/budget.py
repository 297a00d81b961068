"""Time: how much of a part's budget is left."""

from __future__ import annotations

import time


class Clock:
    """A budget of seconds that starts when it is made."""

    def __init__(self, seconds: float) -> None:
        self._start = time.monotonic()
        self.seconds = seconds

    def left(self) -> float:
        """Return the seconds left, negative once the budget is spent."""
        return self.seconds - self.spent()

    def spent(self) -> float:
        """Return the seconds since the start."""
        return time.monotonic() - self._start
