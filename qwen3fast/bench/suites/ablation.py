"""What each step of the design bought: from computing everything anew, eagerly, to the quantised fused step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise

from matplotlib.figure import Figure

from qwen3fast.bench.harness import Sample, Task
from qwen3fast.bench.measure import is_cached
from qwen3fast.bench.metrics import short
from qwen3fast.bench.plot import FAINT, INK, PALETTE, new_figure, style_axes
from qwen3fast.bench.record import Case, Record
from qwen3fast.bench.session import Session
from qwen3fast.bench.suites.suite import Suite
from qwen3fast.bench.table import Columns
from qwen3fast.kernels import cpu

UNCACHED_STEPS = 2


@dataclass(frozen=True)
class Stage:
    """One way to run: everything before it and one thing more (int4 in place of int8). fused: with hand-written
    operations, or CUDA graphs."""

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
    """All stages at one context after the other, taking turns."""
    o = session.options
    stages = [s for s in STAGES if s.format in o.formats and s.mode in o.modes]
    benches = {}
    for stage in stages:
        with _circumstances(session, stage):
            benches[stage] = bench = session.workbench(stage.format, (stage.mode,), o.contexts, 1, o.new_tokens)
            if not stage.fused:
                bench.engine(stage.mode).graphs = None
            session.prepare(bench, stage.mode, f"{stage.format} {'' if stage.fused else 'unfused'}".strip())
    for context in o.contexts:
        tasks = []
        for stage, bench in benches.items():
            steps = o.new_tokens if is_cached(stage.mode) else min(o.new_tokens, UNCACHED_STEPS)
            task = session.task(bench, stage.mode, stage.format, context, 1, steps)
            case = Case({"stage": stage.name, "context": context, "batch_size": 1}, task.case.facts)
            tasks.append(Task(case, _inside(session, stage, task)))
        session.harness.measure(tasks, o.repetitions, f"context {context}")


def _circumstances(session: Session, stage: Stage) -> AbstractContextManager[None]:
    return cpu.switched_off() if not stage.fused and session.device.type == "cpu" else nullcontext()


def _inside(session: Session, stage: Stage, task: Task) -> Callable[[], Sample]:
    def run_once() -> Sample:
        with _circumstances(session, stage):
            return task.run()

    return run_once


def draw(record: Record) -> Figure:
    """A waterfall of tokens per second, in a panel for each context: a bar begins where the one before ends."""
    contexts = sorted({int(c.labels["context"]) for c in record.cases if c.metrics})
    names = list(dict.fromkeys(str(c.labels["stage"]) for c in record.cases))
    height = 1.95 + 0.46 * len(names)
    figure = new_figure(
        record, "What each step of the design bought", f"{record.model['name']}, one request: tokens per second",
        (5.6 * len(contexts) + 2.0, height),
    )  # fmt: skip
    width = figure.get_size_inches()[0]
    for i, context in enumerate(contexts):
        axes = figure.add_axes(((2.0 + 5.5 * i) / width, 0.8 / height, 4.6 / width, (height - 1.95) / height))
        before = first = None
        for row, name in enumerate(names):
            speed = next(
                (c.metrics["decode_tok_s"].median for c in record.cases
                 if (c.labels["stage"], c.labels["context"]) == (name, context) and "decode_tok_s" in c.metrics),
                None,
            )  # fmt: skip
            if speed is None:
                continue
            first = first or speed
            start = before or 0.0
            color = PALETTE[0] if speed >= start else PALETTE[1]
            axes.barh(row, speed - start, left=start, height=0.62, color=color if before else FAINT)
            if before:
                axes.plot([before, before], [row - 0.69, row + 0.31], color=FAINT, linewidth=0.8)
            gain = f"  {short(speed)}" + (f"   {speed / before:.2g}x, in all {speed / first:.3g}x" if before else "")
            axes.text(max(speed, start), row, gain, va="center", size=9, color=INK)
            before = speed
        axes.set_yticks(range(len(names)), names if i == 0 else [""] * len(names))
        axes.invert_yaxis()
        style_axes(axes, "tokens per second", "", f"after {context:,} tokens")
        axes.grid(visible=False)
        axes.set_xlim(0, axes.get_xlim()[1] * 1.45)
    return figure


def summary(record: Record) -> list[str]:
    """First and last stage at each context."""
    sentences = []
    for context in sorted({int(c.labels["context"]) for c in record.cases if c.metrics}):
        speeds = [
            (str(c.labels["stage"]), c.metrics["decode_tok_s"].median)
            for c in record.cases
            if c.labels["context"] == context and "decode_tok_s" in c.metrics
        ]
        gains = [f"{name.removeprefix('+ ')} {b / a:.2g}x" for (_, a), (name, b) in pairwise(speeds)]
        sentences.append(
            f"After {context:,} tokens: from {short(speeds[0][1])} to {short(speeds[-1][1])} tokens/s: "
            f"{', '.join(gains)}."
        )
    return sentences


SUITE = Suite(
    name="ablation",
    title="What each step of the design bought",
    run=run,
    draw=draw,
    columns=Columns(
        ("stage", "context"),
        ("decode_tok_s", "step_ms", "prefill_tok_s", "peak_memory_bytes", "energy_j_token"),
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
