"""What a KV cache is worth: tokens per second with and without one, against sequence length.

Without a cache each new token computes the whole sequence: its cost grows with the length, O(n) a token and O(n^2) a
reply, up to the rate of the matrix product. With one it reads weights and cached keys and values: O(1) a token until
the cache is as large as the weights, up to the memory's bandwidth. Both limits are drawn beside what was measured.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import exp, log

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qwen3fast.bench.measure import MODES, is_cached
from qwen3fast.bench.metrics import short
from qwen3fast.bench.plot import INK, draw_line, log_x, log_y, name_ends, new_figure, style_axes
from qwen3fast.bench.record import Record
from qwen3fast.bench.session import Session
from qwen3fast.bench.suites.suite import Suite
from qwen3fast.bench.table import Columns

# Colour says cached or not, line style eager or compiled; both pairs are told apart without colour, too.
STYLES = {
    "cached-compiled": ("#0b6e99", "-", "o"),
    "cached-eager": ("#0b6e99", "--", "s"),
    "uncached-compiled": ("#c2410c", "-", "o"),
    "uncached-eager": ("#c2410c", "--", "s"),
}
UNCACHED_STEPS, LONG, LONG_STEPS = 3, 512, 0  # beyond LONG the first token alone: each costs as much as the first
BEST_FIRST = {True: ("cached-compiled", "cached-eager"), False: ("uncached-compiled", "uncached-eager")}


def run(session: Session) -> None:
    """Every mode at every length, taking turns."""
    options = session.options
    for format in options.formats:
        most = max(options.batch_sizes)
        bench = session.workbench(format, options.modes, options.contexts, most, options.new_tokens)
        for batch_size in options.batch_sizes:
            for mode in options.modes:
                session.prepare(bench, mode, format, batch_size)
            for length in options.contexts:
                uncached = min(options.new_tokens, LONG_STEPS if length > LONG else UNCACHED_STEPS)
                tasks = []
                for mode in options.modes:
                    steps = options.new_tokens if is_cached(mode) else uncached
                    task = session.task(bench, mode, format, length, batch_size, steps)
                    # Long ones take a while each, and all were run once to check their tokens.
                    tasks.append(replace(task, warms_up=length <= LONG))
                session.harness.measure(tasks, options.repetitions, f"length {length}, batch {batch_size}")


def speeds(record: Record, mode: str, batch_size: int, format: str, metric: str = "decode_tok_s") -> dict[int, float]:
    """A mode's tokens/s by context."""
    wanted = {"mode": mode, "batch_size": batch_size, "format": format}
    return {
        int(case.labels["context"]): case.metrics[metric].median
        for case in record.cases
        if wanted.items() <= case.labels.items() and metric in case.metrics
    }


def best_speeds(record: Record, cached: bool, batch_size: int, format: str) -> dict[int, float]:
    """Of the compiled mode, or else the eager one."""
    return next((s for mode in BEST_FIRST[cached] if (s := speeds(record, mode, batch_size, format))), {})


def crossover(record: Record, batch_size: int, format: str) -> float | None:
    """The length from which on the cache wins, between measured lengths by the straight line in logarithms; None if it
    wins at all of them or at none."""
    cached, uncached = (best_speeds(record, is_, batch_size, format) for is_ in (True, False))
    lengths = sorted(cached.keys() & uncached.keys())
    ratios = [(n, log(cached[n] / uncached[n])) for n in lengths]
    for (n, a), (m, b) in pairwise(ratios):
        if a < 0 <= b:
            return exp(log(n) + (log(m) - log(n)) * -a / (b - a))
    return None


def summary(record: Record) -> list[str]:
    """The speed-up at the ends, and where the two meet."""
    sentences = []
    for batch_size, format in _panels(record):
        cached, uncached = (best_speeds(record, is_, batch_size, format) for is_ in (True, False))
        shared = sorted(cached.keys() & uncached.keys())
        if not shared:
            continue
        first, last = shared[0], shared[-1]
        sentences.append(
            f"{format}, batch {batch_size}: with the cache {short(cached[last])} tokens/s at {last:,} tokens, "
            f"{cached[last] / uncached[last]:.0f} times as many as without; at {first:,} tokens "
            f"{cached[first] / uncached[first]:.1f} times."
        )
        meet = crossover(record, batch_size, format)
        if meet is not None:
            sentences.append(f"Below {meet:.0f} tokens computing everything anew is the faster way.")
    return sentences


def draw(record: Record) -> Figure:
    """Measured lines and dotted limits, a panel for each batch size and format."""
    panels = _panels(record)
    size = (10.4, 6.2) if len(panels) == 1 else (7.4 * len(panels), 6.2)
    stored = ", ".join(dict.fromkeys(format for _, format in panels))
    subtitle = f"{record.model['name']}, {stored}: new tokens per second after a prompt of the given length"
    figure = new_figure(record, "What a KV cache is worth: Qwen3 decoding speed", subtitle, size)
    right = 0.79 if len(panels) == 1 else 0.9
    figure.subplots_adjust(left=0.075 if len(panels) == 1 else 0.05, right=right, top=0.84, bottom=0.14, wspace=0.5)
    for i, (batch_size, format) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), i + 1)
        _draw_panel(axes, record, batch_size, format)
        style_axes(axes, "prompt length (tokens)", "tokens per second")
        if len(panels) > 1:
            axes.set_title(f"batch {batch_size}, {format}", loc="left", size=11, color=INK)
    return figure


def _panels(record: Record) -> list[tuple[int, str]]:
    return list(dict.fromkeys((int(c.labels["batch_size"]), str(c.labels["format"])) for c in record.cases))


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
        what = "memory's limit, O(1) a token" if cached else "compute's limit, O(n) a token"
        draw_line(axes, list(limits.items()), color, what, linestyle=":", marker="", linewidth=1.4)
        x, y = max(limits.items())
        ends.append((x, y, what, color))
        everything += limits.values()
    log_x(axes, [int(c.labels["context"]) for c in record.cases])
    axes.set_ylim(min(everything) / 1.6, max(everything) * 1.6)
    name_ends(axes, ends)
    _mark(axes, record, batch_size, format)


def _mark(axes: Axes, record: Record, batch_size: int, format: str) -> None:
    """The speed-up at the greatest length, and where cached and uncached meet."""
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
            f"the cache wins from\n{meet:.0f} tokens on", xy=(meet, low), xytext=(6, 8), textcoords="offset points",
            size=9, color=INK,
        )  # fmt: skip


SUITE = Suite(
    name="cache",
    title="With and without a KV cache",
    run=run,
    draw=draw,
    columns=Columns(
        ("context", "batch_size", "mode", "format"),
        ("decode_tok_s", "prefill_tok_s", "ttft_s", "step_ms", "step_p99_ms", "share_of_bandwidth", "peak_memory_bytes",
         "energy_j_token"),
        baseline={"mode": "uncached-eager"},
    ),
    defaults={
        "formats": ("plain",), "modes": MODES, "contexts": (4, 16, 32, 128, 512, 1024, 2048, 4096),
        "batch_sizes": (1,), "new_tokens": 24, "repetitions": 3,
    },
    quick={"contexts": (32, 256), "new_tokens": 8, "repetitions": 1},
    summary=summary,
)  # fmt: skip
