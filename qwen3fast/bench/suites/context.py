"""The cost of a token as the context grows, and as the allocated cache grows: only the first should cost time."""

from __future__ import annotations

from itertools import product

from matplotlib.figure import Figure

from qwen3fast.bench.metrics import short
from qwen3fast.bench.plot import draw_formats, medians, name_ends, new_figure, style_axes
from qwen3fast.bench.record import Record
from qwen3fast.bench.session import CHECK_TOKENS, Session
from qwen3fast.bench.suites.roofline import MODE
from qwen3fast.bench.suites.suite import Suite
from qwen3fast.bench.table import Columns

ALLOCATED = (1024, 4096, 16384)  # positions, where the model has as many
PARTS = (("used", "context"), ("allocated", "allocated"))  # what varies, and the label that says how far
ROOM = 64  # positions beyond the longest context and its steps


def run(session: Session) -> None:
    """First the used length grows in one cache; then the cache grows around one context. All that is
    compared takes turns."""
    o = session.options
    longest = max(o.contexts)
    fixed = longest + o.new_tokens + ROOM
    benches = {f: session.workbench(f, (MODE,), (longest,), 1, o.new_tokens + ROOM - 1) for f in o.formats}
    for format, bench in benches.items():
        session.prepare(bench, MODE, format)
    for context in o.contexts:
        tasks = [
            session.task(b, MODE, f, context, 1, o.new_tokens, allocated=fixed, varies="used")
            for f, b in benches.items()
        ]
        session.harness.measure(tasks, o.repetitions, f"context {context}")
    benches.clear()
    tasks = []
    sizes = [n for n in ALLOCATED if n <= session.config.longest_context]
    context = min(o.contexts[len(o.contexts) // 2], sizes[0] // 2)
    for format, size in product(o.formats, sizes):
        bench = session.workbench(format, (MODE,), (size - max(o.new_tokens, CHECK_TOKENS) - 1,), 1, o.new_tokens)
        session.prepare(bench, MODE, format)
        tasks.append(session.task(bench, MODE, format, context, 1, o.new_tokens, allocated=size, varies="allocated"))
    session.harness.measure(tasks, o.repetitions, "allocated")


def draw(record: Record) -> Figure:
    """Two panels on one scale: used length, allocated length."""
    used, allocated = (medians(record, "step_ms", axis, varies=varies) for varies, axis in PARTS)
    context = next((c.labels["context"] for c in record.cases if c.labels["varies"] == "allocated"), "")
    size = next((c.labels["allocated"] for c in record.cases if c.labels["varies"] == "used"), "")
    subtitle = f"{record.model['name']}, one request: milliseconds of a decode step"
    figure = new_figure(record, "A token costs what is used of the cache, not what is allocated", subtitle, (14.0, 6.0))
    left, right = figure.add_axes((0.05, 0.14, 0.37, 0.66)), figure.add_axes((0.55, 0.14, 0.35, 0.66))
    top = 1.15 * max(y for values in (used, allocated) for line in values.values() for y in line.values())
    for axes, values in ((left, used), (right, allocated)):
        axes.set_ylim(0, top)
        name_ends(axes, draw_formats(axes, values, lambda name, x, y: f"{name}  {short(y)} ms"))
    style_axes(left, "tokens in the prompt", "milliseconds of a step", f"used length, in a cache of {size} positions")
    style_axes(right, "positions in the cache", "milliseconds of a step", f"allocated length, {context} tokens in use")
    return figure


def summary(record: Record) -> list[str]:
    """How much a step gains in time from the shortest to the longest, used and allocated."""
    sentences = []
    for varies, axis in PARTS:
        for name, line in medians(record, "step_ms", axis, varies=varies).items():
            first, last = min(line), max(line)
            grows = line[last] / line[first]
            sentences.append(
                f"{name}: from {first:,} to {last:,} {varies} positions a step takes {grows:.2f} times as long."
            )
    return sentences


SUITE = Suite(
    name="context",
    title="Used and allocated length",
    run=run,
    draw=draw,
    columns=Columns(
        ("format", "varies", "context", "allocated"), ("step_ms", "step_p99_ms", "decode_tok_s", "share_of_bandwidth")
    ),
    defaults={
        "formats": ("plain", "int4", "int4-kv8"), "contexts": (32, 128, 512, 1024, 2048, 4000),
        "new_tokens": 16, "repetitions": 3,
    },
    quick={"formats": ("plain",), "contexts": (32, 512), "new_tokens": 8, "repetitions": 1},
    summary=summary,
)  # fmt: skip
