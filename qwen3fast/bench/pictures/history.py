"""The picture of `history`: a metric over commits, and beneath it the memory's bandwidth of each run.

The bandwidth shows a slower machine, which is easily mistaken for slower code.
"""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qwen3fast.bench.metrics import METRICS
from qwen3fast.bench.plot import FAINT, PALETTE, End, name_ends, new_figure, style_axes
from qwen3fast.bench.record import Case
from qwen3fast.bench.statistics import estimate
from qwen3fast.bench.timeline import Point

MARKERS = ("o", "s")  # the second for lines beyond the palette


@matplotlib.rc_context({"text.parse_math": False})
def draw(points: Sequence[Point], lines: dict[str, list[Case | None]], metric: str) -> Figure:
    """Draw the metric of each line over commits with its intervals, and the memory's bandwidth beneath."""
    first = points[-1].record
    unit = METRICS[metric].unit or METRICS[metric].title
    subtitle = f"{first.model_name}, suite {first.suite}; bars: 95% intervals; *: uncommitted changes"
    figure = new_figure(first, f"{METRICS[metric].title} over commits", subtitle, (11.8, 7.2))
    top, bottom = figure.add_axes((0.075, 0.40, 0.62, 0.46)), figure.add_axes((0.075, 0.15, 0.62, 0.16))
    ends = _draw_lines(top, lines, metric)
    top.set_ylim(bottom=0)
    style_axes(top, "", unit)
    name_ends(top, ends)
    _draw_machine(bottom, points)
    for axes in (top, bottom):
        axes.set_xlim(-0.4, len(points) - 0.6)
        axes.set_xticks(range(len(points)), [""] * len(points))
    names = [f"{point.name}\n{point.date}" for point in points]
    every = -(-len(points) // 10)  # ten names have room
    bottom.set_xticks(range(0, len(points), every), names[::every])
    return figure


def _draw_lines(axes: Axes, lines: dict[str, list[Case | None]], metric: str) -> list[End]:
    """Draw a line with intervals per case. Returns: the ends, for `name_ends`."""
    ends: list[End] = []
    for i, (name, cases) in enumerate(lines.items()):
        color, marker = PALETTE[i % len(PALETTE)], MARKERS[i // len(PALETTE) % len(MARKERS)]
        shown = [(x, case.metrics[metric]) for x, case in enumerate(cases) if case is not None]
        low = [e.median - (e.median if e.low is None else e.low) for _, e in shown]
        high = [(e.median if e.high is None else e.high) - e.median for _, e in shown]
        xs, ys = [x for x, _ in shown], [e.median for _, e in shown]
        axes.errorbar(xs, ys, yerr=[low, high], color=color, marker=marker, markersize=5, capsize=3, label=name)
        ends.append((xs[-1], ys[-1], f"{name}  {METRICS[metric].text(ys[-1])}", color))
    return ends


def _draw_machine(axes: Axes, points: Sequence[Point]) -> None:
    measured = [(x, p.record.conditions.get("bandwidth_gb_s")) for x, p in enumerate(points)]
    known = [(x, estimate(gb_s)) for x, gb_s in measured if gb_s]
    if known:
        middle = [e.median for _, e in known]
        spread = [[e.median - e.p10 for _, e in known], [e.p90 - e.median for _, e in known]]
        axes.errorbar([x for x, _ in known], middle, yerr=spread, color=FAINT, marker="o", markersize=4, capsize=2)
    axes.set_ylim(bottom=0)
    style_axes(axes, "", "GB/s", "read bandwidth of the memory in each run; bars: 10% to 90% of samples")
