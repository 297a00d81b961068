"""Views of records: as defined by the suite, or for another program's record with all labels and metrics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from qwen3fast.bench.generic import all_columns, summarize
from qwen3fast.bench.record import Record
from qwen3fast.bench.suites import SUITES
from qwen3fast.bench.table import Columns

# Errors of a suite for a record without a label, a metric or any case: an interrupted or another program's record.
INCOMPLETE = (ValueError, KeyError, IndexError, TypeError, ArithmeticError)


@dataclass(frozen=True)
class View:
    """Title, table and sentences of a record."""

    title: str
    columns: Columns
    summary: Callable[[Record], list[str]]


def view_of(record: Record) -> View:
    """Return its suite's view, or a generic one."""
    if record.suite in SUITES:
        suite = SUITES[record.suite]
        return View(suite.title, suite.columns, suite.summary)
    return View(record.suite or "Other", all_columns(record), summarize)


def drawing(name: str) -> Any:
    """Import a module of this package that draws, which loads matplotlib: only when a picture is asked for."""
    return import_module(f"qwen3fast.bench.{name}")


def picture(record: Record) -> Any:
    """Draw a record's picture. Returns: a matplotlib Figure.

    Raises: ValueError if the record lacks data for the picture.
    """
    if not any(case.metrics for case in record.cases):
        raise ValueError(f"no picture: this {record.suite} record has no case with a metric")
    try:
        return drawing("pictures").draw(record)
    except INCOMPLETE as err:
        raise ValueError(f"no picture: this {record.suite} record lacks data for it ({err!r:.120})") from err


def sentences(record: Record) -> list[str]:
    """Return the summary of a record's view; nothing for a record without the labels or metrics that it needs."""
    try:
        return view_of(record).summary(record)
    except INCOMPLETE:
        return []
