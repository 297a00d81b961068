"""Throughput by batch size: a decode step reads the weights once for all requests, until arithmetic is the limit."""

from __future__ import annotations

from itertools import product

from qwen3fast.bench.record import Record
from qwen3fast.bench.session import Session
from qwen3fast.bench.suites.roofline import MODE
from qwen3fast.bench.suites.suite import Suite
from qwen3fast.bench.table import Columns, medians


def run(session: Session) -> None:
    """Measure every batch size of every format; the formats of a size take turns."""
    session.compare_formats(MODE, list(product(session.options.contexts, session.options.batch_sizes)))


def by_batch(record: Record, metric: str) -> dict[str, dict[int, float]]:
    """Return format -> batch size -> a metric's median, at the shortest context."""
    return medians(record, metric, "batch_size", context=min(int(c.labels["context"]) for c in record.cases))


def summary(record: Record) -> list[str]:
    """Return a sentence per format: the largest batch beside the smallest."""
    sentences = []
    for name, line in by_batch(record, "decode_tok_s").items():
        small, large = min(line), max(line)
        gain = line[large] / line[small]
        sentences.append(f"{name}: batch {large} decodes {gain:.1f} times as many tokens per second as batch {small}.")
    return sentences


SUITE = Suite(
    name="batch",
    title="Throughput by batch size",
    run=run,
    columns=Columns(
        ("format", "context", "batch_size"),
        ("decode_tok_s", "step_ms", "step_p99_ms", "share_of_bandwidth", "peak_memory_bytes"),
        baseline={"batch_size": 1},
    ),
    defaults={
        "formats": ("plain", "int8", "int4"), "contexts": (32,),
        "batch_sizes": (1, 2, 4, 8, 16, 32), "new_tokens": 16, "repetitions": 3,
    },
    quick={"formats": ("plain",), "batch_sizes": (1, 4), "new_tokens": 8, "repetitions": 1},
    summary=summary,
)  # fmt: skip
