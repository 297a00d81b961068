"""A record as a picture: tokens per second against sequence length, one line a mode, speed-up annotated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

# Colour says cached or not, line style eager or compiled; both pairs are told apart without colour too.
STYLES = {
    "cached-compiled": ("#0b6e99", "-", "o"),
    "cached-eager": ("#0b6e99", "--", "s"),
    "uncached-compiled": ("#c2410c", "-", "o"),
    "uncached-eager": ("#c2410c", "--", "s"),
}
INK, FAINT = "#1f2933", "#7b8794"


def plot_record(record: dict[str, Any], path: Path) -> None:
    """Draw the record's JSON form as PNG, one panel for each batch size.

    Raises: ValueError if it holds no case.
    """
    batch_sizes = sorted({case["batch_size"] for case in record["cases"]})
    if not batch_sizes:
        raise ValueError("nothing was measured, so there is nothing to plot")
    figure = Figure(figsize=(9.6, 6.0) if len(batch_sizes) == 1 else (7.0 * len(batch_sizes), 6.0), layout=None)
    figure.subplots_adjust(left=0.09, right=0.80 if len(batch_sizes) == 1 else 0.88, top=0.82, bottom=0.15, wspace=0.5)
    for i, batch_size in enumerate(batch_sizes):
        axes = figure.add_subplot(1, len(batch_sizes), i + 1)
        _draw_panel(axes, record, batch_size, len(batch_sizes) > 1)
    model, environment = record["model"], record["environment"]
    stored = model.get("quantization") or model["dtype"]
    figure.text(0.09, 0.93, "What a KV cache is worth: Qwen3 decoding speed", size=15, weight="bold", color=INK)
    figure.text(
        0.09,
        0.885,
        f"{model['name']}, {stored}, new tokens per second after a prompt of the given length",
        size=10.5,
        color=FAINT,
    )
    where = environment.get("gpu") or f"{environment['cpu']}, {environment['threads']} threads"
    figure.text(
        0.09,
        0.03,
        f"{where}; memory reads at {record['read_bandwidth']['median_gb_s']:.0f} GB/s; torch {environment['torch']}; "
        f"qwen3fast {environment['qwen3fast']}, {record['run']['utc'][:10]}",
        size=8.5,
        color=FAINT,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, facecolor="white")


def _draw_panel(axes: Axes, record: dict[str, Any], batch_size: int, with_title: bool) -> None:
    lines: dict[str, list[tuple[int, float]]] = {}
    for case in record["cases"]:
        if case["batch_size"] == batch_size:
            lines.setdefault(case["mode"], []).append((case["length"], case["metrics"]["decode_tok_s"]))
    for points in lines.values():
        points.sort()
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for mode, points in lines.items():
        color, style, marker = STYLES[mode]
        x, y = zip(*points, strict=True)
        axes.plot(x, y, color=color, linestyle=style, marker=marker, markersize=5.5, linewidth=2)
    lengths = sorted({x for points in lines.values() for x, _ in points})
    speeds = [y for points in lines.values() for _, y in points]
    axes.set_ylim(min(speeds) / 1.6, max(speeds) * 1.7)
    _label_line_ends(axes, lines)
    _annotate_speedup(axes, lines)
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()
    axes.set_xlabel("prompt length (tokens)", color=INK)
    axes.set_ylabel("tokens per second", color=INK)
    axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(colors=INK, length=0)
    if with_title:
        axes.set_title(f"batch {batch_size}", loc="left", size=11, color=INK)


def _label_line_ends(axes: Axes, lines: dict[str, list[tuple[int, float]]]) -> None:
    """Write each mode's name beside its last point, pushed apart where names would overlap."""
    low, high = axes.get_ylim()
    smallest_ratio = (high / low) ** 0.055
    previous = 0.0
    for mode, points in sorted(lines.items(), key=lambda item: item[1][-1][1]):
        x, y = points[-1]
        at = max(y, previous * smallest_ratio)
        previous = at
        axes.annotate(
            f"{mode.replace('-', ', ')}  {y:.3g}",
            xy=(x, at),
            xytext=(10, 0),
            textcoords="offset points",
            va="center",
            size=9.5,
            color=STYLES[mode][0],
            annotation_clip=False,
        )


def _annotate_speedup(axes: Axes, lines: dict[str, list[tuple[int, float]]]) -> None:
    """An arrow from the uncached to the cached line at the last length they share, with the ratio."""
    best = {}
    for kind in ("cached", "uncached"):
        for how in ("compiled", "eager"):
            if f"{kind}-{how}" in lines:
                best[kind] = dict(lines[f"{kind}-{how}"])
                break
    if len(best) < 2 or not (shared := sorted(best["cached"].keys() & best["uncached"].keys())):
        return
    x = shared[-1]
    top, bottom = best["cached"][x], best["uncached"][x]
    arrow = {"arrowstyle": "<->", "color": INK, "shrinkA": 6, "shrinkB": 6, "linewidth": 1.2}
    axes.annotate("", xy=(x, top), xytext=(x, bottom), arrowprops=arrow)
    axes.annotate(
        f"{top / bottom:.0f}x",
        xy=(x, (top * bottom) ** 0.5),
        xytext=(-8, 0),
        textcoords="offset points",
        ha="right",
        va="center",
        size=17,
        weight="bold",
        color=INK,
    )
