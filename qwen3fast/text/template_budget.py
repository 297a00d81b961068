"""The budget of a chat template's rendering: characters, steps and seconds, charged as the template runs."""

from __future__ import annotations

import time
from dataclasses import dataclass

UNITS_PER_CHARACTER = 20  # of the limit: a text passes through about ten operations on its way to the output


@dataclass(frozen=True)
class TemplateLimits:
    """Bounds on the work of one rendering.

    max_chars: characters of the rendered text, and of each text on the way. max_seconds: wall time.
    """

    max_chars: int = 10_000_000
    max_seconds: float = 10.0


class TemplateLimitError(Exception):
    """A template that exceeded its limits."""


class Budget:
    """The remaining cost of one rendering. A unit is a character or a step."""

    def __init__(self, limits: TemplateLimits) -> None:
        self._limits = limits
        self._left = limits.max_chars * UNITS_PER_CHARACTER
        self._deadline = time.monotonic() + limits.max_seconds

    def charge(self, units: int) -> None:
        """Charge an operation. Raises: TemplateLimitError when the budget is used up."""
        self._left -= units
        if self._left < 0:
            raise TemplateLimitError(f"made more than max_chars={self._limits.max_chars} allows on the way")
        if time.monotonic() > self._deadline:
            raise TemplateLimitError(f"took longer than max_seconds={self._limits.max_seconds}")

    def check_length(self, length: int) -> None:
        """Check the length of a text. Raises: TemplateLimitError beyond max_chars."""
        if length > self._limits.max_chars:
            raise TemplateLimitError(f"made a text of more than max_chars={self._limits.max_chars}")
