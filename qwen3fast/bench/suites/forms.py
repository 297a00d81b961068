"""Every form of a computation beside every other, on CPUs: the cases that engines choose by, and more sizes.

All are compared with the C++ of this package without tiles. Engines on this machine use the fastest
(docs/how_it_works/kernels.md), except for products of fewer rows than 32, which are shown only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from qwen3fast.bench.harness import Group, Measurement, Task
from qwen3fast.bench.options import split_format
from qwen3fast.bench.record import Case, Label, Record
from qwen3fast.bench.session import Session
from qwen3fast.bench.suites.suite import Suite
from qwen3fast.bench.table import Columns
from qwen3fast.engine.fast_layers import use_fast_layers
from qwen3fast.engine.forms import decode_cases, product_cases
from qwen3fast.kernels import cpu, forms
from qwen3fast.kernels.cases import CPP, ROWS, prefill_attention_case
from qwen3fast.kernels.cpu.prefill import CHUNKS
from qwen3fast.model.kv_cache import parse_cache_dtype

FEW_ROWS = (1, 4, 8, 16)
SAMPLE_S = 0.05  # a sample is the mean over calls of this time together


def run(session: Session) -> None:
    """Measure all forms of each case in turns.

    Raises: ValueError for another device than a CPU, another dtype than bfloat16, or without the C++ operations.
    """
    if session.device.type != "cpu" or session.dtype != "bfloat16" or not cpu.load():
        raise ValueError("the suite forms needs a CPU, a model in bfloat16 and the C++ operations")
    groups: dict[str, Group] = {}
    for format in session.options.formats:
        for case in _cases(session, format):
            name = f"{case.what}, {_short(case.key)}"
            groups[name] = groups.get(name) or Group(name, list(_tasks(case)))
    session.harness.run(list(groups.values()), session.options.repetitions)


def _cases(session: Session, format: str) -> Iterator[forms.FormCase]:
    o, config = session.options, session.config
    quantization, kv_cache_dtype = split_format(format)
    model = session.model(quantization)
    dtype = parse_cache_dtype(kv_cache_dtype, model.model.norm.weight.dtype)
    heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    for chunk in CHUNKS:
        for length in sorted({chunk, *(n for n in o.contexts if n > chunk)}):
            yield prefill_attention_case(chunk, length, heads, dtype)
    use_fast_layers(model)
    yield from product_cases(model, FEW_ROWS + ROWS)
    yield from decode_cases(model, dtype, max(o.batch_sizes))


def _tasks(case: forms.FormCase) -> Iterator[Task]:
    """Yield a task per form; what they work on is made when the first of them runs."""
    made: dict[str, Callable[[], Any]] = {}
    for name in case.names:

        def run(name: str = name) -> Measurement:
            if not made:
                made.update(case.calls())
            seconds = mean_seconds(made[name])
            return {"seconds": seconds, "operator_ms": seconds * 1e3}

        labels: dict[str, Label] = {"computation": case.what, "sizes": _short(case.key), "form": name}
        yield Task(Case(labels, {"tokens": float(case.sizes[0])}), run, expected_s=2 * SAMPLE_S)


def _short(key: str) -> str:
    """Return a case's sizes; the record has the model's."""
    of_model = ("heads of", "hidden", "intermediate", "blocks")
    return ", ".join(part for part in key.split(", ") if not any(word in part for word in of_model))


def mean_seconds(call: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the seconds of a call, the mean over SAMPLE_S of calls after a first one."""
    call()
    started, calls = clock(), 0
    while calls == 0 or clock() - started < SAMPLE_S:
        call()
        calls += 1
    return (clock() - started) / calls


def faster_than_cpp(record: Record) -> list[tuple[Case, Case]]:
    """Return pairs of cases: a form that is clearly faster than the C++, and the C++ for the same work."""
    in_cpp = {(c.labels["computation"], c.labels["sizes"]): c for c in record.cases if c.labels["form"] == CPP}
    pairs = [(c, in_cpp.get((c.labels["computation"], c.labels["sizes"]))) for c in record.cases]
    return [
        (case, other)
        for case, other in pairs
        if other is not None and case is not other and case.metrics and other.metrics
        if case.metrics["seconds"].median * forms.GAIN < other.metrics["seconds"].median
    ]


def summary(record: Record) -> list[str]:
    """Return a sentence for each work at which another form is faster than the C++ on this machine."""
    sentences = [
        f"{case.labels['computation']}, {case.labels['sizes']}: {case.labels['form']} is "
        f"{other.metrics['seconds'].median / case.metrics['seconds'].median:.2f} times as fast as the C++."
        for case, other in faster_than_cpp(record)
    ]
    return sentences or ["On this machine no other form is faster than the C++."]


SUITE = Suite(
    name="forms",
    title="Every form of a computation on this machine",
    run=run,
    columns=Columns(("computation", "sizes", "form"), ("operator_ms",), baseline={"form": CPP}, speed="tok_s"),
    defaults={
        "formats": ("plain", "int8", "int4", "plain-kv8"), "contexts": (512, 1024, 2048, 4096),
        "batch_sizes": (32,), "repetitions": 3,
    },
    quick={"formats": ("plain", "int4"), "contexts": (512,), "batch_sizes": (1,), "repetitions": 1},
    summary=summary,
)  # fmt: skip
