"""Every weight format against the machine's limits: memory bandwidth for decoding, the matrix product for prefill.

The limit of a decode step is bandwidth / bytes that it must read: the weights once (including a tied output projection,
but not an embedding, of which only a row is read), and keys and values of the positions in use. Source: Williams,
Waterman and Patterson, Roofline, CACM 52(4), 2009.
"""

from __future__ import annotations

from qwen3fast.bench.metrics import short
from qwen3fast.bench.record import Record
from qwen3fast.bench.session import Session
from qwen3fast.bench.suites.suite import Suite
from qwen3fast.bench.table import Columns, medians

MODE = "cached-compiled"


def run(session: Session) -> None:
    """Measure all contexts at the first batch size, then the other sizes at the first context; formats take turns."""
    contexts, sizes = session.options.contexts, session.options.batch_sizes
    session.compare_formats(MODE, [(n, sizes[0]) for n in contexts] + [(contexts[0], size) for size in sizes[1:]])


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
