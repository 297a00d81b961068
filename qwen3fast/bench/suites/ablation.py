"""Speed after each part of the design: from computing the whole sequence eagerly to the quantized, fused step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar
from unittest import mock

from qwen3fast.bench.harness import Group, Task
from qwen3fast.bench.measure import is_cached, with_graphs
from qwen3fast.bench.metrics import short
from qwen3fast.bench.record import Case, Record
from qwen3fast.bench.session import Preparation, Session
from qwen3fast.bench.suites.suite import Suite
from qwen3fast.bench.table import Columns
from qwen3fast.kernels import cpu

Result = TypeVar("Result")


@dataclass(frozen=True)
class Stage:
    """One way to run: everything of the stage before it and one thing more (or int4 instead of int8).

    fused: with the fused C++ operations on CPUs, with CUDA graphs on CUDA devices.
    """

    name: str
    mode: str
    format: str
    fused: bool = True


STAGES = (
    Stage("no cache, eager", "uncached-eager", "plain"),
    Stage("+ static KV cache", "cached-eager", "plain"),
    Stage("+ compiled", "cached-compiled", "plain", fused=False),
    Stage("+ fused operations", "cached-compiled", "plain"),
    Stage("+ int8 weights", "cached-compiled", "int8"),
    Stage("int4 instead of int8", "cached-compiled", "int4"),
    Stage("+ int8 cache", "cached-compiled", "int4-kv8"),
)


def run(session: Session) -> None:
    """Measure all stages at one context after the other, taking turns."""
    o = session.options
    benches, preparations = {}, []
    for stage in (s for s in STAGES if s.format in o.formats and s.mode in o.modes):
        mode = with_graphs(stage.mode, session.device) if stage.fused else stage.mode
        build = _as_in(session, stage, session.workbench)
        benches[stage] = bench = build(stage.format, (mode,), o.contexts, 1, o.new_tokens)
        if stage.fused:
            preparations.append(Preparation(bench, mode, stage.format))
        else:
            _as_in(session, stage, session.prepare)(bench, mode, f"{stage.format} unfused")
    groups = []
    for context in o.contexts:
        tasks = []
        for stage, bench in benches.items():
            mode = with_graphs(stage.mode, session.device) if stage.fused else stage.mode
            task = session.task(bench, mode, stage.format, context, 1, o.new_tokens if is_cached(mode) else 0)
            case = Case({"stage": stage.name, "context": context, "batch_size": 1}, task.case.facts)
            tasks.append(Task(case, _as_in(session, stage, task.run), expected_s=task.expected_s))
        groups.append(Group(f"{context:,} tokens", tasks))
    session.execute(preparations, groups)


def _as_in(session: Session, stage: Stage, call: Callable[..., Result]) -> Callable[..., Result]:
    """Return the call made under a stage's circumstances: without the fused operations if it has none."""
    switched_off = not stage.fused and session.device.type == "cpu"

    def wrapped(*arguments: object) -> Result:
        with mock.patch.object(cpu, "is_loaded", _never) if switched_off else nullcontext():
            return call(*arguments)

    return wrapped


def _never() -> bool:  # one function: compiled code asks for the same one again
    return False


def speeds_at(record: Record, context: int) -> list[tuple[str, float]]:
    """Return (stage, tokens/s) at a context, in the order of the stages."""
    return [
        (str(c.labels["stage"]), c.metrics["decode_tok_s"].median)
        for c in record.cases
        if c.labels["context"] == context and "decode_tok_s" in c.metrics
    ]


def summary(record: Record) -> list[str]:
    """Return a sentence per context: the first and the last stage, and each gain between."""
    sentences = []
    for context in sorted({int(c.labels["context"]) for c in record.cases if c.metrics}):
        speeds = speeds_at(record, context)
        gains = [f"{name.removeprefix('+ ')} {b / a:.2g}x" for (_, a), (name, b) in pairwise(speeds)]
        sentences.append(
            f"After {context:,} tokens: from {short(speeds[0][1])} to {short(speeds[-1][1])} tokens/s: "
            f"{', '.join(gains)}."
        )
    return sentences


SUITE = Suite(
    name="ablation",
    title="What each part of the design is worth",
    run=run,
    columns=Columns(
        ("stage", "context"),
        ("decode_tok_s", "step_ms", "prefill_tok_s", "peak_memory_bytes"),
        baseline={"stage": STAGES[0].name},
    ),
    defaults={
        "formats": ("plain", "int8", "int4", "int4-kv8"),
        "modes": ("uncached-eager", "cached-eager", "cached-compiled"), "contexts": (32, 1024),
        "new_tokens": 16, "repetitions": 3,
    },
    quick={"contexts": (32,), "new_tokens": 8, "repetitions": 1},
    summary=summary,
)  # fmt: skip
