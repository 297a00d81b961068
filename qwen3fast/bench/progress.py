"""One progress bar for a whole run: percentage, time left, and the current measurement."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

from qwen3fast.bench.text import visible

BAR = 24  # characters
LINE_EVERY_S = 10.0  # where standard error is a file, which cannot show a moving bar


class Progress:
    """A bar on standard error; where that is not a terminal, a line now and then.

    Work is counted in expected seconds. The time left follows from how long the work done so far has really taken.
    """

    def __init__(
        self,
        is_shown: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.perf_counter,
        line_every_s: float = LINE_EVERY_S,
    ) -> None:
        """line_every_s: seconds between lines where the bar cannot move."""
        self.done = self.total = 0.0
        self.end: float | None = None  # on the clock: when the run ends at the latest
        self._is_shown, self._stream, self._clock = is_shown, stream, clock
        self._line_every_s = line_every_s
        self._started, self._printed_s, self._is_open = clock(), float("-inf"), False

    def expect(self, work: float) -> None:
        """Raise the total to include this much work beyond the work done."""
        self.total = max(self.total, self.done + work)

    def show(self, text: str, work: float = 0.0) -> None:
        """Count `work` as done, and show the next measurement."""
        self.done += work
        if not self._is_shown:
            return
        stream = self._stream or sys.stderr
        line = f"{self._bar()}  {visible(text)}"
        if stream.isatty():
            self._is_open = True
            print(f"\r{line}\x1b[K", end="", file=stream, flush=True)
        elif self._clock() - self._printed_s >= self._line_every_s:
            self._printed_s = self._clock()
            print(line, file=stream, flush=True)

    def close(self) -> None:
        """End the bar's line."""
        if self._is_open:
            print(file=self._stream or sys.stderr, flush=True)
            self._is_open = False

    def left_s(self) -> float:
        """Return the seconds until all work is done."""
        pace = (self._clock() - self._started) / self.done if self.done else 1.0
        left = max(0.0, self.total - self.done) * pace
        return left if self.end is None else max(0.0, min(left, self.end - self._clock()))

    def _bar(self) -> str:
        share = min(1.0, self.done / self.total) if self.total else 0.0
        bar = "#" * round(BAR * share)
        return f"[{bar:<{BAR}}] {share:4.0%}, {in_words(self.left_s())} left"


def in_words(seconds: float) -> str:
    """Return a duration in words: "45 s", "3 min", "2 h 5 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
