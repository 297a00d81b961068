"""The picture of records of unknown suites: panels of lines or bars."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qwen3fast.bench.generic import MAX_BARS, Panel, panels_of
from qwen3fast.bench.metrics import METRICS
from qwen3fast.bench.plot import color_of, draw_bars, draw_line, log_x, name_ends, new_figure, style_axes
from qwen3fast.bench.record import Record

WIDTH, TOP, BOTTOM, BETWEEN = 10.4, 0.95, 0.45, 0.95  # inches


def draw_panels(record: Record) -> Figure:
    """Draw the panels, one below the other.

    Raises: ValueError for a record without a metric.
    """
    panels = panels_of(record)
    if not panels:
        raise ValueError("no case has a metric")
    height = TOP + BOTTOM + sum(panel.height + BETWEEN for panel in panels)
    figure = new_figure(record, record.suite, record.model_name, (WIDTH, height))
    top = height - TOP
    for panel in panels:
        left, right = (0.8, 2.6) if panel.axis else (3.6, 1.2)
        bottom = top - BETWEEN / 2 - panel.height
        box = (left / WIDTH, bottom / height, (WIDTH - left - right) / WIDTH, panel.height / height)
        axes = figure.add_axes(box)
        _draw_lines(axes, panel, panel.axis) if panel.axis else _draw_bars(axes, panel)
        top -= panel.height + BETWEEN
    return figure


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
        point = (float(case.labels[axis]), case.metrics[panel.metric].median * metric.scale)
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
    cases = panel.cases[:MAX_BARS]
    medians = [case.metrics[panel.metric].median for case in cases]
    first = next((n for n in cases[0].labels if len({str(c.labels[n]) for c in cases}) > 1), None)
    groups = [str(case.labels[first]) if first else "" for case in cases]
    colors = [color_of(group, list(dict.fromkeys(groups))) for group in groups]
    left_out = f"the first {len(cases)} of {len(panel.cases)} cases" if len(cases) < len(panel.cases) else ""
    title = "; ".join(part for part in (_title(panel), panel.shared, left_out) if part)
    values, texts = [median * metric.scale for median in medians], [metric.text(median) for median in medians]
    draw_bars(axes, values, texts, colors, [panel.series_of(case) for case in cases], title)
