"""More rows at once: a decode step reads the weights once for all of them, until arithmetic is the limit."""

from __future__ import annotations

from matplotlib.figure import Figure

from qwen3fast.bench.metrics import short
from qwen3fast.bench.plot import draw_formats, log_y, medians, name_ends, new_figure, style_axes
from qwen3fast.bench.record import Record
from qwen3fast.bench.session import Session
from qwen3fast.bench.suites.roofline import MODE
from qwen3fast.bench.suites.suite import Suite
from qwen3fast.bench.table import Columns


def run(session: Session) -> None:
    """Every batch size of every format, all of a size taking turns."""
    o = session.options
    benches = {f: session.workbench(f, (MODE,), o.contexts, max(o.batch_sizes), o.new_tokens) for f in o.formats}
    for format, bench in benches.items():
        for batch_size in o.batch_sizes:
            session.prepare(bench, MODE, format, batch_size)
    for context in o.contexts:
        for batch_size in o.batch_sizes:
            tasks = [session.task(b, MODE, f, context, batch_size, o.new_tokens) for f, b in benches.items()]
            session.harness.measure(tasks, o.repetitions, f"context {context}, batch {batch_size}")


def by_batch(record: Record, metric: str) -> dict[str, dict[int, float]]:
    """Format -> batch size -> a metric's median, at the shortest context."""
    return medians(record, metric, "batch_size", context=min(int(c.labels["context"]) for c in record.cases))


def draw(record: Record) -> Figure:
    """Left: tokens per second of all rows, with the memory's limit (dots). Right: milliseconds of a step."""
    speeds, limits, steps = (by_batch(record, m) for m in ("decode_tok_s", "limit_tok_s", "step_ms"))
    context = min(int(c.labels["context"]) for c in record.cases)
    subtitle = (
        f"{record.model['name']}, prompts of {context} tokens; dots: the memory's limit, weights read once a step"
    )
    figure = new_figure(record, "More rows in a decode step", subtitle, (14.0, 6.0))
    left, right = figure.add_axes((0.05, 0.14, 0.37, 0.66)), figure.add_axes((0.55, 0.14, 0.35, 0.66))
    log_y(left)
    for axes, lines, marks in ((left, speeds, limits), (right, steps, None)):
        ends = draw_formats(axes, lines, lambda name, _, y: f"{name}  {short(y)}", marks)
        if axes is right:
            axes.set_ylim(bottom=0)
        name_ends(axes, ends)
    style_axes(left, "rows", "tokens per second, all rows together")
    style_axes(right, "rows", "milliseconds of a step")
    return figure


def summary(record: Record) -> list[str]:
    """What the largest batch gives over one row."""
    sentences = []
    for name, line in by_batch(record, "decode_tok_s").items():
        small, large = min(line), max(line)
        gain = line[large] / line[small]
        sentences.append(f"{name}: {large} rows decode {gain:.1f} times as many tokens per second as {small}.")
    return sentences


SUITE = Suite(
    name="batch",
    title="More rows at once",
    run=run,
    draw=draw,
    columns=Columns(
        ("format", "context", "batch_size"),
        ("decode_tok_s", "step_ms", "step_p99_ms", "share_of_bandwidth", "peak_memory_bytes", "energy_j_token"),
        baseline={"batch_size": 1},
    ),
    defaults={
        "formats": ("plain", "int8", "int4"), "contexts": (32,),
        "batch_sizes": (1, 2, 4, 8, 16, 32), "new_tokens": 16, "repetitions": 3,
    },
    quick={"formats": ("plain",), "batch_sizes": (1, 4), "new_tokens": 8, "repetitions": 1},
    summary=summary,
)  # fmt: skip
