"""Drawing shared by all pictures: colors, titles, axes, bars, and lines with their names at the ends.

This module and those that import it load matplotlib; only `view.picture` and programs that draw import them.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from qwen3fast.bench.record import Record
from qwen3fast.bench.table import where_measured
from qwen3fast.files import file_to_write

INK, FAINT, GRID = "#1f2933", "#7b8794", "#e4e7eb"
# In an order that stays distinct in gray and for color-blind readers.
PALETTE = ("#0b6e99", "#c2410c", "#4d7c0f", "#8d3f8d", "#b8860b", "#5a6b7b")
FORMAT_COLORS = {
    "bf16": "#0b6e99", "lossless": "#6d4c9f", "int8": "#c2410c", "int4": "#4d7c0f",
    "bf16-kv8": "#6ba9c4", "int8-kv8": "#e8956d", "int4-kv8": "#97b86a",
}  # fmt: skip

CHARACTERS_PER_INCH = 15  # of text of size 8.5

Points = Sequence[tuple[float, float]]
End = tuple[float, float, str, str]  # of a line: x, y, text, color


def color_of(name: str, names: Sequence[str]) -> str:
    """Return a format's own color, or the palette's by position."""
    return FORMAT_COLORS.get(name) or PALETTE[list(names).index(name) % len(PALETTE)]


def new_figure(record: Record, title: str, subtitle: str, size: tuple[float, float] = (9.6, 6.0)) -> Figure:
    """Return an empty figure with title, subtitle and, below, where and when it was measured."""
    figure = Figure(figsize=size)
    left = 0.075 if size[0] < 12 else 0.05
    figure.text(left, 1 - 0.40 / size[1], title, size=15, weight="bold", color=INK)
    figure.text(left, 1 - 0.68 / size[1], subtitle, size=10.5, color=FAINT)
    where = where_measured(record)
    fitting = CHARACTERS_PER_INCH * (size[0] * (1 - left) - 0.1)  # a processor's name can be long
    figure.text(left, 0.14 / size[1], where, size=8.5 * min(1, fitting / len(where)), color=FAINT)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG or SVG, by the file's suffix."""
    figure.savefig(file_to_write(path), dpi=160, facecolor="white")


def svg_text(figure: Figure, *, facecolor: str = "white", is_trimmed: bool = False) -> str:
    """Return a figure as SVG: text stays text, and the same figure gives the same bytes.

    facecolor: behind the axes, or "none". is_trimmed: cut off empty margins.
    """
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "qwen3fast"}):
        figure.savefig(
            text, format="svg", facecolor=facecolor, metadata={"Date": None}, transparent=facecolor == "none",
            bbox_inches="tight" if is_trimmed else None, pad_inches=0.08,
        )  # fmt: skip
    return text.getvalue()


def style_axes(axes: Axes, x_label: str, y_label: str, title: str = "") -> None:
    """Set labels, a light grid and no frame."""
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(colors=INK, length=0)
    if title:
        axes.set_title(title, loc="left", size=11, color=INK)


def log_x(axes: Axes, ticks: Iterable[float]) -> None:
    """Scale x by powers of two, with ticks at the measured values."""
    ticks = sorted(set(ticks))
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{n:,.0f}" for n in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())


def log_y(axes: Axes) -> None:
    """Scale y by decades, with ticks at 1, 2 and 5."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()


def draw_line(axes: Axes, points: Points, color: str, label: str = "", **style: Any) -> None:
    """Draw points joined by a line. The report's legend uses the label; `name_ends` writes it beside the last point."""
    x, y = zip(*sorted(points), strict=True)
    look: dict[str, Any] = {"marker": "o", "markersize": 5.5, "linewidth": 2} | style
    axes.plot(x, y, color=color, label=label, **look)


def draw_formats(
    axes: Axes,
    lines: dict[str, dict[int, float]],
    text: Callable[[str, int, float], str],
    limits: Mapping[str, dict[int, float]] | None = None,
) -> list[End]:
    """Draw a line per format over powers of two, and its limit, if it has one, dotted.

    text: maps name, x and y of a line's last point to the text there. Returns: the ends, for `name_ends`.
    """
    ends: list[End] = []
    for name, line in lines.items():
        color = color_of(name, list(lines))
        draw_line(axes, list(line.items()), color, name)
        if limits and name in limits:
            draw_line(axes, list(limits[name].items()), color, "", linestyle=":", marker="", linewidth=1.3)
        x, y = max(line.items())
        ends.append((x, y, text(name, x, y), color))
    log_x(axes, [n for line in lines.values() for n in line])
    return ends


def name_ends(axes: Axes, ends: Sequence[End]) -> None:
    """Write names beside the last points of lines, moved apart where they would overlap."""
    gap = 0.055  # height of a line of text, as a share of the axis
    low, high = axes.get_ylim()
    is_log = axes.get_yscale() == "log"
    previous: float | None = None
    for x, y, text, color in sorted(ends, key=lambda end: end[1]):
        if previous is not None:
            y = max(y, previous * (high / low) ** gap if is_log else previous + (high - low) * gap)
        previous = y
        axes.annotate(
            text, xy=(x, y), xytext=(10, 0), textcoords="offset points", va="center", size=9.5, color=color,
            annotation_clip=False,
        )  # fmt: skip


def draw_bars(
    axes: Axes, values: Sequence[float], texts: Sequence[str], colors: Sequence[str], names: Sequence[str], title: str,
    places: Sequence[float] | None = None,
) -> None:  # fmt: skip
    """Draw horizontal bars from top to bottom, each with its text behind it; no scale. places: their heights."""
    places = places or range(len(values))
    axes.bar_label(axes.barh(places, values, height=0.66, color=colors), texts, padding=4, size=9, color=INK)
    axes.set_yticks(places, names)
    style_axes(axes, "", "", title)
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    axes.set_xticks([])
    axes.set_ylim(max(places) + 0.5, min(places) - 0.5)
    axes.set_xlim(0, max(*values, 1e-12) * 1.25)
