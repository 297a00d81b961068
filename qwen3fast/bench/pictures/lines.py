"""Pictures of suites that draw one line per weight format: context, batch, roofline, serve."""

from __future__ import annotations

from matplotlib.figure import Figure

from qwen3fast.bench.metrics import short
from qwen3fast.bench.plot import FAINT, draw_formats, log_y, name_ends, new_figure, style_axes
from qwen3fast.bench.record import Record
from qwen3fast.bench.suites.batch import by_batch
from qwen3fast.bench.suites.context import PARTS
from qwen3fast.bench.suites.serve import SLOTS, by_clients
from qwen3fast.bench.table import medians


def draw_context(record: Record) -> Figure:
    """Draw two panels on one scale: used length, allocated length."""
    used, allocated = (medians(record, "step_ms", axis, varies=varies) for varies, axis in PARTS)
    context = next((c.labels["context"] for c in record.cases if c.labels["varies"] == "allocated"), "")
    size = next((c.labels["allocated"] for c in record.cases if c.labels["varies"] == "used"), "")
    subtitle = f"{record.model['name']}, one request: milliseconds per decode step"
    figure = new_figure(record, "A decode step by used and by allocated cache length", subtitle, (14.0, 6.0))
    left, right = figure.add_axes((0.05, 0.14, 0.37, 0.66)), figure.add_axes((0.55, 0.14, 0.35, 0.66))
    top = 1.15 * max(y for values in (used, allocated) for line in values.values() for y in line.values())
    for axes, values in ((left, used), (right, allocated)):
        axes.set_ylim(0, top)
        name_ends(axes, draw_formats(axes, values, lambda name, x, y: f"{name}  {short(y)} ms"))
    style_axes(left, "tokens in the prompt", "milliseconds per step", f"used length, in a cache of {size} positions")
    style_axes(right, "positions in the cache", "milliseconds per step", f"allocated length, {context} tokens in use")
    return figure


def draw_batch(record: Record) -> Figure:
    """Draw tokens per second of all requests with the memory's limit (left), and milliseconds per step (right)."""
    speeds, limits, steps = (by_batch(record, m) for m in ("decode_tok_s", "limit_tok_s", "step_ms"))
    context = min(int(c.labels["context"]) for c in record.cases)
    subtitle = (
        f"{record.model['name']}, prompts of {context} tokens; dots: the memory's limit, weights read once per step"
    )
    figure = new_figure(record, "More requests in a decode step", subtitle, (14.0, 6.0))
    left, right = figure.add_axes((0.05, 0.14, 0.37, 0.66)), figure.add_axes((0.55, 0.14, 0.35, 0.66))
    log_y(left)
    for axes, lines, marks in ((left, speeds, limits), (right, steps, None)):
        ends = draw_formats(axes, lines, lambda name, _, y: f"{name}  {short(y)}", marks)
        if axes is right:
            axes.set_ylim(bottom=0)
        name_ends(axes, ends)
    style_axes(left, "batch size", "tokens per second, all requests")
    style_axes(right, "batch size", "milliseconds per step")
    return figure


def draw_roofline(record: Record) -> Figure:
    """Draw decoding and its limits by context (left), and prefill beside the matrix product's rate (right)."""
    first = min(int(c.labels["batch_size"]) for c in record.cases)
    speeds, limits = (medians(record, m, "context", batch_size=first) for m in ("decode_tok_s", "limit_tok_s"))
    shares, prefill = (
        medians(record, m, "context", batch_size=first) for m in ("share_of_bandwidth", "prefill_flop_s")
    )
    dots = "dots: read bandwidth / bytes that a token must read; in brackets: the share of it reached"
    subtitle = f"{record.model['name']}; lines: measured; {dots}"
    figure = new_figure(record, "Decoding and prefill against the machine's limits", subtitle, (14.0, 6.0))
    left, right = figure.add_axes((0.05, 0.14, 0.36, 0.66)), figure.add_axes((0.58, 0.14, 0.31, 0.66))
    log_y(left)

    def with_share(name: str, x: int, y: float) -> str:
        return f"{name}  {short(y)}" + (f" ({shares[name][x]:.0%})" if x in shares.get(name, {}) else "")

    ends = draw_formats(left, speeds, with_share, limits)
    style_axes(left, "tokens in the prompt", "tokens per second", f"decoding, batch {first}")
    name_ends(left, ends)
    gflop_s = {name: {n: flop / 1e9 for n, flop in line.items()} for name, line in prefill.items()}
    ends = draw_formats(right, gflop_s, lambda name, x, y: name)
    if rates := sorted(record.conditions.get("gemm_flop_s", [])):
        rate = rates[len(rates) // 2] / 1e9
        right.axhline(rate, color=FAINT, linestyle=":", linewidth=1.3)
        ends.append((max(n for line in prefill.values() for n in line), rate, "matrix product", FAINT))
    right.set_ylim(bottom=0)
    style_axes(right, "tokens in the prompt", "GFLOP/s", "prefill")
    name_ends(right, ends)
    return figure


def draw_serve(record: Record) -> Figure:
    """Draw tokens per second of all clients (left), and the time to a client's first token, median and p99 (right)."""
    subtitle = f"{record.model['name']}, {SLOTS} slots; n clients, each sends its next request when its reply has ended"
    figure = new_figure(record, "The HTTP server under load", subtitle, (14.0, 6.0))
    left, right = figure.add_axes((0.05, 0.14, 0.37, 0.66)), figure.add_axes((0.55, 0.14, 0.35, 0.66))
    ends = draw_formats(left, by_clients(record, "tok_s"), lambda name, _, y: f"{name}  {short(y)}")
    left.set_ylim(bottom=0)
    name_ends(left, ends)
    firsts, slowest = (
        {name: {n: s * 1e3 for n, s in line.items()} for name, line in by_clients(record, metric).items()}
        for metric in ("ttft_s", "ttft_p99_s")
    )
    ends = draw_formats(right, firsts, lambda name, _, y: f"{name}  {short(y)} ms", slowest)
    right.set_ylim(bottom=0)
    name_ends(right, ends)
    style_axes(left, "clients", "tokens per second, all clients")
    style_axes(right, "clients", "milliseconds to the first token; dots: 99th percentile")
    return figure
