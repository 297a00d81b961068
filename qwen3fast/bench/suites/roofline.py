"""Every weight format against the machine's limits: memory bandwidth for decoding, the matrix product for prefill.

The limit of a decode step is bandwidth / bytes that it must read: the weights once (including a tied output projection,
but not an embedding, of which only a row is read), and keys and values of the positions in use. Source: Williams,
Waterman and Patterson, Roofline, CACM 52(4), 2009.
"""

from __future__ import annotations

from qwen3fast.bench.harness import Group
from qwen3fast.bench.measure import with_graphs
from qwen3fast.bench.metrics import short
from qwen3fast.bench.record import Record
from qwen3fast.bench.session import Preparation, Session
from qwen3fast.bench.suites.suite import Suite
from qwen3fast.bench.table import Columns, medians

MODE = "cached-compiled"


def run(session: Session) -> None:
    """Measure all contexts at the first batch size, then the other sizes at the first context; formats take turns."""
    o, mode = session.options, with_graphs(MODE, session.device)
    benches = {f: session.workbench(f, (mode,), o.contexts, max(o.batch_sizes), o.new_tokens) for f in o.formats}
    preparations = [Preparation(bench, mode, f, size) for f, bench in benches.items() for size in o.batch_sizes]
    shapes = [(n, o.batch_sizes[0]) for n in o.contexts] + [(o.contexts[0], b) for b in o.batch_sizes[1:]]
    groups = []
    for context, size in shapes:
        tasks = [session.task(b, mode, f, context, size, o.new_tokens) for f, b in benches.items()]
        groups.append(Group(f"{context:,} tokens, batch {size}", tasks))
    session.execute(preparations, groups)


def summary(record: Record) -> list[str]:
    """Return a sentence per format: its speed at the shortest context, as a share of the limit."""
    first = min(int(c.labels["batch_size"]) for c in record.cases)
    speeds, shares = (medians(record, m, "context", batch_size=first) for m in ("decode_tok_s", "share_of_bandwidth"))
    return [
        f"{name}: {short(line[min(line)])} tokens/s at {min(line):,} tokens of context, {shares[name][min(line)]:.0%} "
        f"of the memory's limit; {short(line[max(line)])} at {max(line):,} ({shares[name][max(line)]:.0%})."
        for name, line in speeds.items()
        if name in shares
    ]


SUITE = Suite(
    name="roofline",
    title="Against the machine's limits",
    run=run,
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
