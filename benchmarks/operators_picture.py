"""The picture of a record of operators: a bar per shape and format, its operators side by side."""

from __future__ import annotations

from matplotlib.figure import Figure
from tables import find, unique

from qwen3fast.bench.metrics import short
from qwen3fast.bench.plot import INK, PALETTE, new_figure, style_axes
from qwen3fast.bench.record import Record

REST = "#cbd2d9"  # the color of time outside the operators


def draw(record: Record) -> Figure:
    """Draw a panel for decoding and one for prefill."""
    operators = [name for (name,) in unique(record, "operator") if name not in ("whole", "other")] + ["other"]
    bars = {phase: unique(record, "context", "format", phase=phase) for (phase,) in unique(record, "phase")}
    height = 2.3 + 0.32 * max(len(shapes) for shapes in bars.values())
    subtitle = f"{record.model['name']}, one request: milliseconds of each operator run by itself, and of the whole"
    figure = new_figure(record, "Time of a decode step and of a prefill by operator", subtitle, (14.0, height))
    for i, (phase, shapes) in enumerate(bars.items()):
        axes = figure.add_axes((0.1 + 0.47 * i, 0.75 / height, 0.36, (height - 2.15) / height))
        for row, (context, format) in enumerate(shapes):
            start = 0.0
            for name, color in zip(operators, (*PALETTE, REST), strict=False):
                case = find(record, phase=phase, context=context, format=format, operator=name)
                ms = max(0.0, case.metrics["operator_ms"].median) if case else 0.0  # the rest may be negative
                axes.barh(row, ms, left=start, height=0.66, color=color, label=name if row == 0 and i == 0 else None)
                start += ms
            whole = find(record, phase=phase, context=context, format=format, operator="whole")
            ms = start if whole is None else whole.metrics["operator_ms"].median  # less, where they run in one
            axes.text(start, row, f"  {short(ms)}", va="center", size=9, color=INK)
        axes.set_yticks(range(len(shapes)), [f"{context:,} tokens, {format}" for context, format in shapes])
        axes.invert_yaxis()
        style_axes(axes, "milliseconds", "", {"decode": "decode step, by context"}.get(phase, "prefill, by length"))
        axes.grid(visible=False)
        axes.set_xlim(right=1.12 * axes.get_xlim()[1])
        if i == 0:
            figure.legend(*axes.get_legend_handles_labels(), frameon=False, ncols=len(operators), loc="upper left",
                          bbox_to_anchor=(0.04, 1 - 0.8 / height), fontsize=9, handlelength=1)  # fmt: skip
    return figure
