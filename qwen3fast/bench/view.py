"""How a record is shown: as its suite says, or, if another program wrote it, by all its labels and metrics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import matplotlib
from matplotlib.figure import Figure

from qwen3fast.bench.generic import all_columns, draw_panels, summarize
from qwen3fast.bench.plot import where_measured
from qwen3fast.bench.record import Record
from qwen3fast.bench.suites import SUITES
from qwen3fast.bench.table import Columns

# What a suite raises for a record that lacks a label, a metric or all cases: an interrupted one, or another program's.
INCOMPLETE = (ValueError, KeyError, IndexError, TypeError, ZeroDivisionError)


@dataclass(frozen=True)
class View:
    """Title, table, picture and plain sentences of a record."""

    title: str
    columns: Columns
    draw: Callable[[Record], Figure]
    summary: Callable[[Record], list[str]]


def view_of(record: Record) -> View:
    """Its suite's, or a generic one."""
    if record.suite in SUITES:
        suite = SUITES[record.suite]
        return View(suite.title, suite.columns, suite.draw, suite.summary)
    return View(record.suite or "Other", all_columns(record), draw_panels, summarize)


def picture(record: Record) -> Figure:
    """Its view's picture.

    Raises: ValueError if the record lacks what the picture shows.
    """
    if not any(case.metrics for case in record.cases):
        raise ValueError(f"no picture: this {record.suite} record has no case with a metric")
    try:
        with matplotlib.rc_context({"text.parse_math": False}):  # a "$" in a record's text is no formula
            return view_of(record).draw(record)
    except INCOMPLETE as err:
        raise ValueError(f"no picture: this {record.suite} record lacks what it would show ({err!r:.120})") from err


def sentences(record: Record) -> list[str]:
    """Its view's summary; none of a record that lacks what it would tell."""
    try:
        return view_of(record).summary(record)
    except INCOMPLETE:
        return []


def caption(record: Record) -> str:
    """Where and when it was measured, or what is known of it."""
    try:
        return where_measured(record)
    except INCOMPLETE:
        return str(record.run.get("utc", "measured at an unknown time"))
