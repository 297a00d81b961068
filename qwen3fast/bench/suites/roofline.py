"""Every weight format against the machine's limits: decoding against the memory's bandwidth, prefill against the rate
of the matrix product.

The limit of a decode step is bandwidth / bytes that it must read: the weights once (a tied output projection counts, an
embedding that is only looked up does not), and keys and values of the positions in use. Source of the model: Williams,
Waterman and Patterson, Roofline, CACM 52(4), 2009.
"""

from __future__ import annotations

from matplotlib.figure import Figure

from qwen3fast.bench.metrics import short
from qwen3fast.bench.plot import draw_formats, log_y, medians, name_ends, new_figure, style_axes
from qwen3fast.bench.record import Record
from qwen3fast.bench.session import Session
from qwen3fast.bench.suites.suite import Suite
from qwen3fast.bench.table import Columns

MODE = "cached-compiled"


def run(session: Session) -> None:
    """Contexts with one row, then more rows at the shortest context; formats take turns."""
    o = session.options
    most = max(o.batch_sizes)
    benches = {f: session.workbench(f, (MODE,), o.contexts, most, o.new_tokens) for f in o.formats}
    for format, bench in benches.items():
        for batch_size in o.batch_sizes:
            session.prepare(bench, MODE, format, batch_size)
    shapes = [(n, o.batch_sizes[0]) for n in o.contexts] + [(o.contexts[0], b) for b in o.batch_sizes[1:]]
    for context, batch_size in shapes:
        tasks = [session.task(b, MODE, f, context, batch_size, o.new_tokens) for f, b in benches.items()]
        session.harness.measure(tasks, o.repetitions, f"context {context}, batch {batch_size}")


def draw(record: Record) -> Figure:
    """Left: decoding and its limits (dots) by context. Right: prefill's share of the matrix product's rate."""
    first = min(int(c.labels["batch_size"]) for c in record.cases)
    speeds, limits = (medians(record, m, "context", batch_size=first) for m in ("decode_tok_s", "limit_tok_s"))
    shares, prefill = (
        medians(record, m, "context", batch_size=first) for m in ("share_of_bandwidth", "prefill_flop_s")
    )
    dots = "dots: read bandwidth / bytes that a token must read; in brackets: the share of it that was reached"
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
        right.axhline(rate, color="#7b8794", linestyle=":", linewidth=1.3)
        ends.append((max(n for line in prefill.values() for n in line), rate, "matrix product", "#7b8794"))
    right.set_ylim(bottom=0)
    style_axes(right, "tokens in the prompt", "GFLOP/s", "prefill")
    name_ends(right, ends)
    return figure


def summary(record: Record) -> list[str]:
    """Each format's speed at the shortest context, as a share of the limit."""
    first = min(int(c.labels["batch_size"]) for c in record.cases)
    speeds, shares = (medians(record, m, "context", batch_size=first) for m in ("decode_tok_s", "share_of_bandwidth"))
    return [
        f"{name}: {short(line[min(line)])} tokens/s at {min(line):,} tokens of context, {shares[name][min(line)]:.0%} "
        f"of what the memory allows; {short(line[max(line)])} at {max(line):,} ({shares[name][max(line)]:.0%})."
        for name, line in speeds.items()
        if name in shares
    ]


SUITE = Suite(
    name="roofline",
    title="Against the machine's limits",
    run=run,
    draw=draw,
    columns=Columns(
        ("format", "context", "batch_size"),
        ("decode_tok_s", "effective_gb_s", "share_of_bandwidth", "prefill_tok_s", "prefill_share_of_gemm"),
    ),
    defaults={
        "formats": ("plain", "int8", "int4", "int8-kv8", "int4-kv8"),
        "contexts": (32, 256, 1024, 4000), "batch_sizes": (1,), "new_tokens": 16, "repetitions": 3,
    },
    quick={"formats": ("plain", "int4"), "contexts": (32, 256), "new_tokens": 8, "repetitions": 1},
    summary=summary,
)  # fmt: skip
