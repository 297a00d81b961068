"""Records of unknown suites: a table of all labels and metrics, and panels of the main metric."""

from __future__ import annotations

from dataclasses import dataclass

from qwen3fast.bench.metrics import METRICS
from qwen3fast.bench.record import Case, Label, Record
from qwen3fast.bench.table import Columns

LATENCY = "ttft_p99_s"
MAX_LINES, MAX_BARS, MAX_PANELS = 10, 40, 12


@dataclass(frozen=True)
class Panel:
    """Cases with the same label names, and the metric drawn of them. axis: the label along x; None for bars."""

    cases: list[Case]
    metric: str
    axis: str | None
    height: float

    def series_of(self, case: Case) -> str:
        """Return the labels that differ between the panel's cases, without the axis, as text."""
        names = [n for n in case.labels if n != self.axis and len({str(c.labels[n]) for c in self.cases}) > 1]
        return _words({n: case.labels[n] for n in names}) or METRICS[self.metric].title

    @property
    def shared(self) -> str:
        """The labels that all cases share, as text."""
        labels = self.cases[0].labels
        return _words({n: v for n, v in labels.items() if all(c.labels[n] == v for c in self.cases)})


def all_columns(record: Record) -> Columns:
    """Return every label and every metric, in the order of METRICS."""
    labels = dict.fromkeys(name for case in record.cases for name in case.labels)
    present = {name for case in record.cases for name in case.metrics}
    return Columns(tuple(labels), tuple(name for name in METRICS if name in present))


def panels_of(record: Record) -> list[Panel]:
    """Return the panels of a record: for each set of label names, one of the first metric of METRICS that its cases
    have, and one of the latency that clients saw."""
    groups: dict[frozenset[str], list[Case]] = {}
    for case in record.cases:
        if case.metrics:
            groups.setdefault(frozenset(case.labels), []).append(case)
    panels = []
    for cases in groups.values():
        present = {name for case in cases for name in case.metrics}
        main = next(name for name in METRICS if name in present)
        panels += [_panel(cases, name) for name in dict.fromkeys((main, LATENCY)) if name in present]
    return panels[:MAX_PANELS]


def _panel(cases: list[Case], metric: str) -> Panel:
    """Choose lines, or bars where there is no axis or too many lines."""
    shown = [case for case in cases if metric in case.metrics]
    panel = Panel(shown, metric, _axis(shown), 4.0)
    if panel.axis is None or len({panel.series_of(case) for case in shown}) > MAX_LINES:
        return Panel(shown, metric, None, 0.5 + 0.3 * min(len(shown), MAX_BARS))
    return panel


def summarize(record: Record) -> list[str]:
    """Return a sentence on the best and the worst case of each panel."""
    lines = []
    for panel in panels_of(record):
        metric = METRICS[panel.metric]
        ordered = sorted(panel.cases, key=lambda case: case.metrics[panel.metric].median)
        best, worst = (ordered[-1], ordered[0]) if metric.is_higher_better else (ordered[0], ordered[-1])
        text = f"{metric.title}: best {metric.text(best.metrics[panel.metric].median)} ({best.name})"
        if worst is not best:
            text += f", worst {metric.text(worst.metrics[panel.metric].median)} ({worst.name})"
        lines.append(f"{text}.")
    return lines


def _words(labels: dict[str, Label]) -> str:
    return Case(labels).name.replace("_", " ")


def _axis(cases: list[Case]) -> str | None:
    """Return the numeric label with the most values, the first of equals; None if all are constant."""
    counts = {
        name: len({case.labels[name] for case in cases})
        for name in cases[0].labels
        if all(isinstance(v := case.labels[name], int | float) and not isinstance(v, bool) for case in cases)
    }
    best = max(counts, key=lambda name: counts[name], default=None)
    return best if best is not None and counts[best] > 1 else None
