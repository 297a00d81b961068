"""Pictures of suites that draw bars: ablation, startup, quantization, quality."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qwen3fast.bench.metrics import METRICS, short
from qwen3fast.bench.plot import FAINT, GRID, INK, PALETTE, color_of, draw_bars, new_figure, style_axes
from qwen3fast.bench.record import Case, Record
from qwen3fast.bench.suites.ablation import speeds_at
from qwen3fast.bench.suites.quantization import formats
from qwen3fast.bench.suites.startup import PHASES

Bars = tuple[str, Sequence[float], Callable[[float], str]]  # of a panel: title, values, and the text beside each


def draw_ablation(record: Record) -> Figure:
    """Draw a waterfall of tokens per second per context: a bar begins where the one before ends."""
    contexts = sorted({int(c.labels["context"]) for c in record.cases if c.metrics})
    names = list(dict.fromkeys(str(c.labels["stage"]) for c in record.cases))
    height, width = 1.95 + 0.46 * len(names), 5.6 * len(contexts) + 2.0
    subtitle = f"{record.model['name']}, one request: tokens per second"
    figure = new_figure(record, "What each part of the design is worth", subtitle, (width, height))
    for i, context in enumerate(contexts):
        axes = figure.add_axes(((2.0 + 5.5 * i) / width, 0.8 / height, 4.6 / width, (height - 1.95) / height))
        before = first = None
        for name, speed in speeds_at(record, context):
            row, start, first = names.index(name), before or 0.0, first or speed
            color = PALETTE[0] if speed >= start else PALETTE[1]
            axes.barh(row, speed - start, left=start, height=0.62, color=color if before else FAINT)
            text = f"  {short(speed)}"
            if before:
                axes.plot([before, before], [row - 0.69, row + 0.31], color=FAINT, linewidth=0.8)
                text += f"   {speed / before:.2g}x, in all {speed / first:.3g}x"
            axes.text(max(speed, start), row, text, va="center", size=9, color=INK)
            before = speed
        axes.set_yticks(range(len(names)), names if i == 0 else [""] * len(names))
        axes.invert_yaxis()
        style_axes(axes, "tokens per second", "", f"after {context:,} tokens")
        axes.grid(visible=False)
        axes.set_xlim(0, axes.get_xlim()[1] * 1.45)
    return figure


def draw_startup(record: Record) -> Figure:
    """Draw a bar for each way to start, its phases side by side."""
    cases = [case for case in record.cases if case.metrics]
    figure = new_figure(
        record, "From the start of a process to its tokens", f"{record.model['name']}, weights in a folder, batch 1",
        (11.0, 1.9 + 0.42 * len(cases)),
    )  # fmt: skip
    height = figure.get_size_inches()[1]
    axes = figure.add_axes((0.21, 0.75 / height, 0.72, (height - 1.95) / height))
    titles = {"import_s": "imports", "load_s": "weights", "first_token_s": "first token", "full_speed_s": "full speed"}
    for row, case in enumerate(cases):
        _draw_phases(axes, row, case, titles)
    names = [f"{c.labels['format']}, compile {c.labels['compile']}, {c.labels['caches']}" for c in cases]
    axes.set_yticks(range(len(cases)), names)
    axes.invert_yaxis()
    style_axes(axes, "seconds since the process began", "")
    axes.grid(axis="x", color=GRID)
    axes.set_xlim(right=axes.get_xlim()[1] * 1.22)
    axes.legend(frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(0, 1.0), handlelength=1)
    return figure


def _draw_phases(axes: Axes, row: int, case: Case, titles: dict[str, str]) -> None:
    """Draw one bar. titles: of phases that have no label yet; used ones are removed."""
    start, metrics = 0.0, case.metrics
    for phase, color in zip(PHASES, PALETTE, strict=False):
        if phase in metrics:
            end = metrics[phase].median
            label = titles.pop(phase, None)
            axes.barh(row, max(0.0, end - start), left=start, height=0.62, color=color, label=label)
            start = max(start, end)
    full = metrics.get("full_speed_s")
    text = f", full speed {full.median:.1f} s" if full else ", full speed not reached"
    axes.text(start, row, f"  {metrics['first_token_s'].median:.1f} s{text}", va="center", size=9, color=INK)


def draw_quantization(record: Record) -> Figure:
    """Draw bars of speed, memory and error, the formats in the same order in each panel."""
    names, speeds, sizes, errors = zip(*formats(record), strict=True)
    title = "Speed, memory and error of quantized weights"
    figure = new_figure(record, title, f"{record.model['name']}, one request", (13.0, 5.4))
    panels = [("tokens per second", speeds, short), ("GB of weights", sizes, short)]
    return _draw_panels(figure, names, [*panels, ("error of the logits", errors, "{:.1%}".format)])


def draw_quality(record: Record) -> Figure:
    """Draw bars of perplexity, KL divergence and changed tokens at the longest context, the formats in one order."""
    longest = max(int(case.labels["context"]) for case in record.cases)
    cases = [case for case in record.cases if case.labels["context"] == longest]
    names = [str(case.labels["format"]) for case in cases]
    subtitle = f"{record.model['name']}, {cases[0].facts['positions']:,.0f} positions in windows of {longest:,} tokens"
    figure = new_figure(record, "Quality of quantized weights and caches", subtitle, (13.0, 5.4))
    perplexities, divergences, same = (
        [case.metrics[name].median for case in cases] for name in ("perplexity", "kl_divergence", "same_token")
    )
    return _draw_panels(figure, names, [
        ("perplexity", perplexities, METRICS["perplexity"].text),
        ("KL divergence from the first, nats", divergences, METRICS["kl_divergence"].text),
        ("another most likely token", [1 - value for value in same], "{:.1%}".format),
    ])  # fmt: skip


def _draw_panels(figure: Figure, names: Sequence[str], panels: Sequence[Bars]) -> Figure:
    """Draw up to three panels of bars side by side, the formats in the same order in each. Returns: the figure."""
    colors = [color_of(name, names) for name in names]
    for i, (title, values, as_text) in enumerate(panels):
        axes = figure.add_axes((0.1 + i * 0.295, 0.16, 0.245, 0.62))
        draw_bars(axes, values, [as_text(v) for v in values], colors, names if i == 0 else [""] * len(names), title)
    return figure
