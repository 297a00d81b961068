"""The picture of the suite cache: tokens per second against length, measured lines and their limits."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qwen3fast.bench.metrics import short
from qwen3fast.bench.plot import INK, draw_line, log_x, log_y, name_ends, new_figure, style_axes
from qwen3fast.bench.record import Record
from qwen3fast.bench.suites.cache import BEST_FIRST, best_speeds, crossover, panels, speeds

# Color says cached or not, line style eager or compiled; markers tell them apart without color.
STYLES = {
    "cached-graphs": ("#0b6e99", "-", "D"),
    "cached-compiled": ("#0b6e99", "-", "o"),
    "cached-eager": ("#0b6e99", "--", "s"),
    "uncached-compiled": ("#c2410c", "-", "o"),
    "uncached-eager": ("#c2410c", "--", "s"),
}


def draw(record: Record) -> Figure:
    """Draw measured lines and dotted limits, a panel per batch size and format."""
    shown = panels(record)
    size = (10.4, 6.2) if len(shown) == 1 else (7.4 * len(shown), 6.2)
    stored = ", ".join(dict.fromkeys(format for _, format in shown))
    subtitle = f"{record.model['name']}, {stored}: new tokens per second after a prompt of the given length"
    figure = new_figure(record, "Decoding speed with and without a KV cache", subtitle, size)
    right = 0.79 if len(shown) == 1 else 0.9
    figure.subplots_adjust(left=0.075 if len(shown) == 1 else 0.05, right=right, top=0.84, bottom=0.14, wspace=0.5)
    for i, (batch_size, format) in enumerate(shown):
        axes = figure.add_subplot(1, len(shown), i + 1)
        _draw_panel(axes, record, batch_size, format)
        style_axes(axes, "prompt length (tokens)", "tokens per second")
        if len(shown) > 1:
            axes.set_title(f"batch {batch_size}, {format}", loc="left", size=11, color=INK)
    return figure


def _draw_panel(axes: Axes, record: Record, batch_size: int, format: str) -> None:
    ends: list[tuple[float, float, str, str]] = []
    everything: list[float] = []
    log_y(axes)
    for mode, (color, style, marker) in STYLES.items():
        measured = speeds(record, mode, batch_size, format)
        if not measured:
            continue
        draw_line(axes, list(measured.items()), color, mode.replace("-", ", "), linestyle=style, marker=marker)
        x, y = max(measured.items())
        ends.append((x, y, f"{mode.replace('-', ', ')}  {short(y)}", color))
        everything += measured.values()
    for cached in (True, False):
        best = next((m for m in BEST_FIRST[cached] if speeds(record, m, batch_size, format)), None)
        limits = speeds(record, best, batch_size, format, "limit_tok_s") if best else {}
        if best is None or not limits:
            continue
        color = STYLES[best][0]
        what = "memory's limit, O(1) per token" if cached else "compute's limit, O(n) per token"
        draw_line(axes, list(limits.items()), color, what, linestyle=":", marker="", linewidth=1.4)
        x, y = max(limits.items())
        ends.append((x, y, what, color))
        everything += limits.values()
    log_x(axes, [int(c.labels["context"]) for c in record.cases])
    axes.set_ylim(min(everything) / 1.6, max(everything) * 1.6)
    name_ends(axes, ends)
    _mark(axes, record, batch_size, format)


def _mark(axes: Axes, record: Record, batch_size: int, format: str) -> None:
    """Mark the speed-up at the greatest length, and the length from which the cache is faster."""
    cached, uncached = (best_speeds(record, is_, batch_size, format) for is_ in (True, False))
    shared = sorted(cached.keys() & uncached.keys())
    if not shared:
        return
    x, top, bottom = shared[-1], cached[shared[-1]], uncached[shared[-1]]
    arrow = {"arrowstyle": "<->", "color": INK, "shrinkA": 6, "shrinkB": 6, "linewidth": 1.2}
    axes.annotate("", xy=(x, top), xytext=(x, bottom), arrowprops=arrow)
    axes.annotate(
        f"{top / bottom:.0f}x", xy=(x, (top * bottom) ** 0.5), xytext=(-8, 0), textcoords="offset points", ha="right",
        va="center", size=17, weight="bold", color=INK,
    )  # fmt: skip
    meet = crossover(record, batch_size, format)
    if meet is not None:
        axes.axvline(meet, color=INK, linewidth=0.8, linestyle=(0, (2, 3)))
        low, _ = axes.get_ylim()
        axes.annotate(
            f"faster with the cache\nfrom {meet:.0f} tokens", xy=(meet, low), xytext=(6, 8), textcoords="offset points",
            size=9, color=INK,
        )  # fmt: skip
