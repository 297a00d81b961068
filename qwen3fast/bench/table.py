"""Records as tables: text for terminals, Markdown for READMEs, CSV for other programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

from qwen3fast.bench.metrics import METRICS
from qwen3fast.bench.record import Case, Label, Record
from qwen3fast.bench.statistics import Estimate
from qwen3fast.bench.text import csv_cell, markdown, visible

SPEEDUP = "speed-up"
TITLES = {"context": "context", "batch_size": "batch", "mode": "mode", "format": "format"}


@dataclass(frozen=True)
class Columns:
    """The labels and metrics of a table, in this order.

    baseline: labels of the case that the others with the same other labels are compared with, by the metric `speed`, in
    a column of its own; empty for none.
    """

    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    baseline: dict[str, Label] = field(default_factory=dict)
    speed: str = "decode_tok_s"


@dataclass(frozen=True)
class Cell:
    """A table cell. secondary: smaller text below. order: the key by which its column is sorted."""

    text: str
    secondary: str = ""
    order: float | str = ""
    is_number: bool = False


def table_rows(record: Record, columns: Columns) -> list[list[str]]:
    """Return the texts of `table_cells`."""
    return [[cell.text for cell in row] for row in table_cells(record, columns)]


def table_cells(record: Record, columns: Columns) -> list[list[Cell]]:
    """Return a header, and a row per case that has one of the metrics. Missing values are empty."""
    metrics = [name for name in columns.metrics if any(name in case.metrics for case in record.cases)]
    titles = [METRICS[name].title for name in metrics] + ([SPEEDUP] if columns.baseline else [])
    rows = [[Cell(TITLES.get(name, name.replace("_", " "))) for name in columns.labels]]
    rows[0] += [Cell(title, is_number=True) for title in titles]
    for case in record.cases:
        derived = case.metrics
        if not derived.keys() & set(metrics):
            continue
        row = [_label_cell(case.labels.get(name)) for name in columns.labels]
        for name in metrics:
            e, text = derived.get(name), METRICS[name].text
            row.append(Cell("") if e is None else Cell(text(e.median), interval(name, e), e.median, is_number=True))
        if columns.baseline:
            gain = speedup(record, case, columns)
            row.append(Cell("") if gain is None else Cell(f"{gain:.1f}x", "", gain, is_number=True))
        rows.append(row)
    return rows


def interval(name: str, estimate: Estimate) -> str:
    """Return the median's 95% interval, "4.1 to 4.3"; empty for a single value."""
    if estimate.low is None or estimate.high is None:
        return ""
    low, high = (METRICS[name].text(value) for value in (estimate.low, estimate.high))
    unit = high[high.find(" ") :] if " " in high else ""
    return f"{low.removesuffix(unit)} to {high}" if unit else f"{low} to {high}"


def speedup(record: Record, case: Case, columns: Columns) -> float | None:
    """Return a case's speed over its baseline's; None without one."""
    wanted = case.labels | columns.baseline
    for other in record.cases:
        if other.labels == wanted and columns.speed in other.metrics and columns.speed in case.metrics:
            return case.metrics[columns.speed].median / other.metrics[columns.speed].median
    return None


def as_text(rows: list[list[str]], left: int) -> str:
    """Return aligned columns: the first `left` ones, labels, to the left, numbers to the right."""
    rows = [[visible(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def as_markdown(rows: list[list[str]], left: int) -> str:
    """Return a Markdown table; the first `left` columns are aligned to the left, the others to the right."""
    lines = ["| " + " | ".join(map(markdown, row)) + " |" for row in rows]
    divider = "|" + "|".join(" :--- " if i < left else " ---: " for i in range(len(rows[0]))) + "|"
    return "\n".join([lines[0], divider, *lines[1:]])


def as_csv(records: Sequence[Record]) -> str:
    """Return a line per metric of each case: suite, commit, every label, metric, unit, and its estimate."""
    labels = list(dict.fromkeys(name for record in records for case in record.cases for name in case.labels))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    header = ["suite", "utc", "git_commit", *labels, "metric", "unit", "median", "p10", "p90", "low", "high", "n"]
    writer.writerow(map(csv_cell, header))
    for record in records:
        head = [record.suite, record.run.get("utc"), record.run.get("git_commit")]
        for case in record.cases:
            for name, e in case.metrics.items():
                shape = [case.labels.get(label, "") for label in labels]
                unit = METRICS[name].unit if name in METRICS else ""
                cells = [*head, *shape, name, unit, e.median, e.p10, e.p90, e.low, e.high, e.n]
                writer.writerow(map(csv_cell, cells))
    return text.getvalue()


def line_of(record: Record, metric: str, axis: str, **wanted: Label) -> dict[int, float]:
    """Return value of the label `axis` -> median of a metric, over the cases with all of `wanted`."""
    cases = [case for case in record.cases if wanted.items() <= case.labels.items() and metric in case.metrics]
    return {int(case.labels[axis]): case.metrics[metric].median for case in cases}


def medians(record: Record, metric: str, axis: str, **wanted: Label) -> dict[str, dict[int, float]]:
    """Return format -> `line_of` its cases, for the formats that have any."""
    formats = dict.fromkeys(str(case.labels["format"]) for case in record.cases)
    lines = {format: line_of(record, metric, axis, format=format, **wanted) for format in formats}
    return {format: line for format, line in lines.items() if line}


def where_measured(record: Record) -> str:
    """Return machine, versions, date, and a word on noise, in one line."""
    e = record.environment
    threads = e.get("threads", "unknown")
    machine = e.get("gpu") or f"{e.get('cpu', 'unknown processor')}, {threads} thread{'s' if threads != 1 else ''}"
    gb_s = sorted(record.conditions.get("bandwidth_gb_s", []))
    reads = f"; memory reads at {gb_s[len(gb_s) // 2]:.0f} GB/s" if gb_s else ""
    versions = "; ".join(f"{name} {e[name]}" for name in ("torch", "qwen3fast") if name in e)
    noise = "" if not record.noise else "; noisy run, see the record"
    return f"{machine}{reads}; {versions}, {record.run['utc'][:10]}{noise}"


def _label_cell(value: Label | None) -> Cell:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Cell(f"{value:,}", "", value, is_number=True)
    text = "" if value is None else str(value)
    return Cell(text, order=text)
