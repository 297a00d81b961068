"""The picture of a record of batching: throughput by batch size; latency by load, a row of panels for each format."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from tables import OURS, unique

from qwen3fast.bench.plot import FAINT, PALETTE, color_of, draw_line, log_x, log_y, new_figure, style_axes
from qwen3fast.bench.record import Record

SIZE_COLORS = (*PALETTE[3:], *PALETTE[:3])  # not first the colors of formats in the panel beside


def series(record: Record, x: str, metric: str, scale: float = 1.0, **wanted: Any) -> list[tuple[float, float]]:
    """Return (a label's value, a metric's median times a scale) of the cases with all of `wanted`."""
    return [
        (float(case.labels[x]), case.metrics[metric].median * scale)
        for case in record.cases
        if wanted.items() <= case.labels.items() and metric in case.metrics
    ]


def draw(record: Record) -> Figure:
    """Draw tokens per second (left), and a row per format of time to the first token and time between tokens."""
    formats = [name for (name,) in unique(record, "format", what="online")]
    rows = max(1, len(formats))
    height = 1.6 + 3.1 * rows
    work = record.notes.get("work", {})
    subtitle = (
        f"{record.model['name']}, prompts and replies of many lengths, {work.get('requests', '?')} requests per run"
    )
    figure = new_figure(record, "Many requests at once", subtitle, (14.0, height))
    left = figure.add_axes((0.05, 0.85 / height, 0.25, (height - 2.15) / height))
    _draw_throughput(left, record)
    for row, format in enumerate(formats):
        bottom = (0.85 + 3.1 * (rows - 1 - row)) / height
        for column, (metric, scale, title) in enumerate(
            (("ttft", 1e3, "time to first token, ms"), ("itl", 1.0, "time between tokens, ms"))
        ):
            axes = figure.add_axes((0.365 + 0.33 * column, bottom, 0.26, 2.15 / height))
            unit = "s" if metric == "ttft" else "ms"
            _draw_latency(axes, record, format, (f"{metric}_{unit}", f"{metric}_p99_{unit}"), scale)
            style_axes(axes, "offered load, share of the throughput with as many slots", "", f"{format}: {title}")
    return figure


def _draw_throughput(axes: Axes, record: Record) -> None:
    lines = unique(record, "engine", "format", what="offline")
    formats = [format for engine, format in lines if engine == OURS]
    markers = iter("s^Dv")
    for engine, format in lines:
        points = series(record, "batch_size", "tok_s", what="offline", engine=engine, format=format)
        if engine == OURS:
            draw_line(axes, points, color_of(format, formats), f"{engine}, {format}")
        else:
            draw_line(axes, points, FAINT, f"{engine}, {format}", linestyle="", marker=next(markers))
    log_x(axes, [size for (size,) in unique(record, "batch_size", what="offline")])
    axes.set_ylim(0, 1.3 * axes.get_ylim()[1])
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    style_axes(axes, "slots of the cache (batch size)", "", "tokens per second, all requests")


def _draw_latency(axes: Axes, record: Record, format: str, metrics: tuple[str, str], scale: float) -> None:
    """Draw lines per batch size: the median solid, the 99th percentile dashed."""
    log_y(axes)
    sizes = [size for (size,) in unique(record, "batch_size", what="online", format=format)]
    for color, size in zip(SIZE_COLORS, sizes, strict=False):
        for metric, style, name in zip(metrics, ("-", "--"), ("p50", "p99"), strict=True):
            points = series(record, "load", metric, scale, what="online", format=format, batch_size=size)
            if points:
                draw_line(axes, points, color, f"batch {size}, {name}", linestyle=style, markersize=4)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xticks([load for (load,) in unique(record, "load", what="online", format=format)])
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * 4)  # room for the legend
    axes.legend(frameon=False, fontsize=7.5, ncols=max(1, len(sizes)), loc="upper left")
