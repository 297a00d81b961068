"""Records as tables: text for terminals, Markdown for READMEs, CSV for other programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

from qwen3fast.bench.metrics import METRICS
from qwen3fast.bench.record import Case, Label, Record
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


def table_rows(record: Record, columns: Columns) -> list[list[str]]:
    """Return a row of cells per case that has one of the metrics, after the header. Missing values are empty."""
    metrics = [name for name in columns.metrics if any(name in case.metrics for case in record.cases)]
    with_speedup = [SPEEDUP] if columns.baseline else []
    rows = [[*(TITLES.get(n, n.replace("_", " ")) for n in columns.labels), *_titles(metrics), *with_speedup]]
    for case in record.cases:
        derived = case.metrics
        if not derived.keys() & set(metrics):
            continue
        cells = [_label_text(case.labels.get(name)) for name in columns.labels]
        cells += [METRICS[name].text(derived[name].median) if name in derived else "" for name in metrics]
        if columns.baseline:
            gain = speedup(record, case, columns)
            cells.append(f"{gain:.1f}x" if gain is not None else "")
        rows.append(cells)
    return rows


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


def medians(record: Record, metric: str, axis: str, **wanted: Label) -> dict[str, dict[int, float]]:
    """Return format -> value of the label `axis` -> median of a metric, over the cases with all of `wanted`."""
    lines: dict[str, dict[int, float]] = {}
    for case in record.cases:
        if wanted.items() <= case.labels.items() and metric in case.metrics:
            line = lines.setdefault(str(case.labels["format"]), {})
            line[int(case.labels[axis])] = case.metrics[metric].median
    return lines


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


def _titles(metrics: list[str]) -> list[str]:
    return [METRICS[name].title for name in metrics]


def _label_text(value: Label | None) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "" if value is None else str(value)
