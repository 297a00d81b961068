"""Records whose suite is not known here: a table of all labels and metrics, and lines or bars of the main metric."""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qwen3fast.bench.metrics import METRICS
from qwen3fast.bench.plot import INK, color_of, draw_line, log_x, name_ends, new_figure, style_axes
from qwen3fast.bench.record import Case, Label, Record
from qwen3fast.bench.table import Columns

LATENCY = "ttft_p99_s"
MOST_LINES, MOST_BARS = 10, 40
WIDTH, TOP, BOTTOM, BETWEEN = 10.4, 0.95, 0.45, 0.95  # inches


@dataclass(frozen=True)
class Panel:
    """Cases that have the same labels, and what is drawn of them. axis: the label along x; None for bars."""

    cases: list[Case]
    metric: str
    axis: str | None
    height: float

    def series_of(self, case: Case) -> str:
        """Those labels that differ between the panel's cases, without the axis, as words."""
        names = [n for n in case.labels if n != self.axis and len({str(c.labels[n]) for c in self.cases}) > 1]
        return _words({n: case.labels[n] for n in names}) or METRICS[self.metric].title

    @property
    def shared(self) -> str:
        """The labels that are the same for all."""
        labels = self.cases[0].labels
        return _words({n: v for n, v in labels.items() if all(c.labels[n] == v for c in self.cases)})


def all_columns(record: Record) -> Columns:
    """Every label, every metric in the order of METRICS."""
    labels = dict.fromkeys(name for case in record.cases for name in case.labels)
    present = {name for case in record.cases for name in case.metrics}
    return Columns(tuple(labels), tuple(name for name in METRICS if name in present))


def panels_of(record: Record) -> list[Panel]:
    """For each set of label names one that shows the first metric of METRICS that its cases have, and one of the
    latency that clients saw, if they did."""
    groups: dict[frozenset[str], list[Case]] = {}
    for case in record.cases:
        if case.metrics:
            groups.setdefault(frozenset(case.labels), []).append(case)
    panels = []
    for cases in groups.values():
        present = {name for case in cases for name in case.metrics}
        main = next(name for name in METRICS if name in present)
        panels += [_panel(cases, name) for name in dict.fromkeys((main, LATENCY)) if name in present]
    return panels


def _panel(cases: list[Case], metric: str) -> Panel:
    """Lines, or bars where there is no axis or the lines would be too many."""
    shown = [case for case in cases if metric in case.metrics]
    panel = Panel(shown, metric, _axis(shown), 4.0)
    if panel.axis is None or len({panel.series_of(case) for case in shown}) > MOST_LINES:
        return Panel(shown, metric, None, 0.5 + 0.3 * min(len(shown), MOST_BARS))
    return panel


def draw_panels(record: Record) -> Figure:
    """The panels, one below the other.

    Raises: ValueError for a record without a metric.
    """
    panels = panels_of(record)
    if not panels:
        raise ValueError("no case has a metric")
    height = TOP + BOTTOM + sum(panel.height + BETWEEN for panel in panels)
    figure = new_figure(record, record.suite, str(record.model.get("name", "")), (WIDTH, height))
    top = height - TOP
    for panel in panels:
        left, right = (0.8, 2.6) if panel.axis else (3.6, 1.2)
        bottom = top - BETWEEN / 2 - panel.height
        box = (left / WIDTH, bottom / height, (WIDTH - left - right) / WIDTH, panel.height / height)
        axes = figure.add_axes(box)
        _draw_lines(axes, panel, panel.axis) if panel.axis else _draw_bars(axes, panel)
        top -= panel.height + BETWEEN
    return figure


def summarize(record: Record) -> list[str]:
    """Best and worst of each panel."""
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
    """The numeric label with most values, the first of equals; None if all are constant."""
    counts = {
        name: len({case.labels[name] for case in cases})
        for name in cases[0].labels
        if all(isinstance(v := case.labels[name], int | float) and not isinstance(v, bool) for case in cases)
    }
    best = max(counts, key=lambda name: counts[name], default=None)
    return best if best is not None and counts[best] > 1 else None


def _title(panel: Panel) -> str:
    metric = METRICS[panel.metric]
    has_unit = (
        not metric.unit or metric.title == "seconds" or metric.unit in metric.title.split() or "/" in metric.title
    )
    return metric.title if has_unit else f"{metric.title} ({metric.unit})"


def _draw_lines(axes: Axes, panel: Panel, axis: str) -> None:
    metric = METRICS[panel.metric]
    lines: dict[str, list[tuple[float, float]]] = {}
    for case in panel.cases:
        point = (float(case.labels[axis]), case.metrics[panel.metric].median * metric.factor)
        lines.setdefault(panel.series_of(case), []).append(point)
    ends = []
    for name, points in lines.items():
        color = color_of(name, list(lines))
        draw_line(axes, points, color, name)
        ends.append((*max(points), name, color))
    axes.set_ylim(bottom=0)
    ticks = {x for points in lines.values() for x, _ in points}
    if min(ticks) > 0 and max(ticks) / min(ticks) >= 8:
        log_x(axes, ticks)
    elif len(ticks) <= 8:
        axes.set_xticks(sorted(ticks), [f"{x:g}" for x in sorted(ticks)])
    name_ends(axes, ends)
    style_axes(axes, axis.replace("_", " "), _title(panel), panel.shared)


def _draw_bars(axes: Axes, panel: Panel) -> None:
    metric = METRICS[panel.metric]
    cases = panel.cases[:MOST_BARS]
    values = [case.metrics[panel.metric].median * metric.factor for case in cases]
    first = next((n for n in cases[0].labels if len({str(c.labels[n]) for c in cases}) > 1), None)
    groups = [str(case.labels[first]) if first else "" for case in cases]
    colors = [color_of(group, list(dict.fromkeys(groups))) for group in groups]
    bars = axes.barh(range(len(cases)), values, height=0.62, color=colors)
    texts = [metric.text(case.metrics[panel.metric].median) for case in cases]
    axes.bar_label(bars, texts, padding=4, size=9, color=INK)
    axes.set_yticks(range(len(cases)), [panel.series_of(case) for case in cases])
    left_out = f"the first {len(cases)} of {len(panel.cases)} cases" if len(cases) < len(panel.cases) else ""
    style_axes(axes, "", "", "; ".join(part for part in (_title(panel), panel.shared, left_out) if part))
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    axes.set_xticks([])
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.set_xlim(0, max(*values, 1e-12) * 1.2)
