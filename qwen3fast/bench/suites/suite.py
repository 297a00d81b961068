"""The description of a suite: how it measures, its options, and the table and sentences of its record."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from qwen3fast.bench.measure import GRAPHS
from qwen3fast.bench.options import MEASURED, Options
from qwen3fast.bench.record import Record
from qwen3fast.bench.session import Session
from qwen3fast.bench.table import Columns
from qwen3fast.checkpoint.choices import choose_device


@dataclass(frozen=True)
class Suite:
    """A named set of measurements.

    run: fills the session's record. columns: its table. summary: sentences about a record.
    markdown: lines to print below them, in the form of another program.
    defaults: of the options; quick, full and on_cuda: values that differ from them for --quick, for --full and on CUDA
    devices. limit_s: seconds that a run with the defaults may take.
    """

    name: str
    title: str
    run: Callable[[Session], None]
    columns: Columns
    defaults: dict[str, Any]
    quick: dict[str, Any] = field(default_factory=dict)
    full: dict[str, Any] = field(default_factory=dict)
    on_cuda: dict[str, Any] = field(default_factory=dict)
    summary: Callable[[Record], list[str]] = lambda record: []
    markdown: Callable[[Record], list[str]] = lambda record: []
    limit_s: float | None = None

    def options(self, args: argparse.Namespace) -> Options:
        """Return the options of a run: those given, or else the suite's for this extent and device.

        The time limit applies only to the defaults: cases that are asked for are always measured.
        Raises: ValueError for an option without a default, which the suite does not read.
        """
        given = {name: getattr(args, name) for name in MEASURED if getattr(args, name) is not None}
        if ignored := [name for name in given if name not in self.defaults]:
            unread, read = (", ".join(f"--{n.replace('_', '-')}" for n in names) for names in (ignored, self.defaults))
            raise ValueError(f"this suite does not read {unread}; it reads {read}")
        device = choose_device(args.device)
        extent = self.quick if args.quick else self.full if args.full else {}
        chosen = self.defaults | (self.on_cuda if device.type == "cuda" else {}) | extent
        if "modes" in chosen and device.type != "cuda":
            chosen["modes"] = tuple(mode for mode in chosen["modes"] if not mode.endswith(GRAPHS))
        limit_s = None if given or extent or args.full else self.limit_s
        same = {name: getattr(args, name) for name in ("model", "dtype", "threads")}
        return Options(**chosen | given, **same, device=str(device), is_shown=not args.json, limit_s=limit_s)
