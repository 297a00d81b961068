"""A record as a table: text for terminals, Markdown for READMEs, CSV for other programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

from qwen3fast.bench.metrics import METRICS
from qwen3fast.bench.record import Case, Label, Record

SPEEDUP = "speed-up"
TITLES = {"context": "context", "batch_size": "batch", "mode": "mode", "format": "format"}


@dataclass(frozen=True)
class Columns:
    """labels and metrics: names to show, in this order. baseline: labels that make a case the one that others with the
    same other labels are compared with, by `speed`, in a column of its own; empty for none."""

    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    baseline: dict[str, Label] = field(default_factory=dict)
    speed: str = "decode_tok_s"


def table_rows(record: Record, columns: Columns) -> list[list[str]]:
    """A row of cells for each case that has one of the metrics, header first. A cell that a case lacks is empty."""
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
            factor = speedup(record, case, columns)
            cells.append(f"{factor:.1f}x" if factor is not None else "")
        rows.append(cells)
    return rows


def speedup(record: Record, case: Case, columns: Columns) -> float | None:
    """A case's speed over its baseline's; None without one."""
    wanted = case.labels | columns.baseline
    for other in record.cases:
        if other.labels == wanted and columns.speed in other.metrics and columns.speed in case.metrics:
            return case.metrics[columns.speed].median / other.metrics[columns.speed].median
    return None


def as_text(rows: list[list[str]], left: int) -> str:
    """Aligned columns: the first `left` ones, labels, to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def as_markdown(rows: list[list[str]], left: int) -> str:
    """A Markdown table; the first `left` columns are aligned to the left, the others to the right."""
    lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows]
    divider = "|" + "|".join(" :--- " if i < left else " ---: " for i in range(len(rows[0]))) + "|"
    return "\n".join([lines[0], divider, *lines[1:]])


def as_csv(records: Sequence[Record]) -> str:
    """One line for each metric of each case: suite, commit, every label, metric, unit, and its estimate."""
    labels = list(dict.fromkeys(name for record in records for case in record.cases for name in case.labels))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["suite", "utc", "git_commit", *labels, "metric", "unit", "median", "p10", "p90", "low", "high", "n"]
    )
    for record in records:
        head = [record.suite, record.run.get("utc"), record.run.get("git_commit")]
        for case in record.cases:
            for name, e in case.metrics.items():
                shape = [case.labels.get(label, "") for label in labels]
                unit = METRICS[name].unit if name in METRICS else ""
                writer.writerow([*head, *shape, name, unit, e.median, e.p10, e.p90, e.low, e.high, e.n])
    return text.getvalue()


def _titles(metrics: list[str]) -> list[str]:
    return [METRICS[name].title for name in metrics]


def _label_text(value: Label | None) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "" if value is None else str(value)
