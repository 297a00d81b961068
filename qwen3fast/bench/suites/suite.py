"""What a suite is: how it measures, and how its record is shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from matplotlib.figure import Figure

from qwen3fast.bench.record import Record
from qwen3fast.bench.session import Session
from qwen3fast.bench.table import Columns


@dataclass(frozen=True)
class Suite:
    """A named set of measurements.

    run: fills the session's record. draw: its picture. columns: its table. defaults: of the options; quick: those of a
    quick look that differ. summary: plain sentences about a record, for reports.
    """

    name: str
    title: str
    run: Callable[[Session], None]
    draw: Callable[[Record], Figure]
    columns: Columns
    defaults: dict[str, Any]
    quick: dict[str, Any] = field(default_factory=dict)
    summary: Callable[[Record], list[str]] = lambda record: []
