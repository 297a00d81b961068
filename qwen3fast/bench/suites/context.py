"""The cost of a token as the used and as the allocated cache length grows: only the first should cost time.

One long prompt per format fills the cache as far as the longest used length so far; filling it is not timed.
"""

from __future__ import annotations

from functools import partial
from itertools import product

from qwen3fast.bench.deep_cache import DeepCache
from qwen3fast.bench.harness import Group, Measurement, Task
from qwen3fast.bench.measure import with_graphs
from qwen3fast.bench.record import Record
from qwen3fast.bench.session import CHECK_TOKENS, Preparation, Session
from qwen3fast.bench.suites.roofline import MODE
from qwen3fast.bench.suites.suite import Suite
from qwen3fast.bench.table import Columns, medians

ALLOCATED = (1024, 4096, 16384)  # positions, where the model has as many
PARTS = (("used", "context"), ("allocated", "allocated"))  # the length that varies, and its label
ROOM = 64  # positions beyond the longest context and its steps


def run(session: Session) -> None:
    """Measure growing contexts in one cache, then one context in growing caches; the formats take turns."""
    o, mode = session.options, with_graphs(MODE, session.device)
    longest = max(o.contexts)
    fixed = longest + o.new_tokens + ROOM
    benches = {f: session.workbench(f, (mode,), (longest,), 1, o.new_tokens + ROOM - 1) for f in o.formats}
    preparations = [Preparation(bench, mode, f) for f, bench in benches.items()]
    caches = {f: DeepCache(b, mode, session.config.vocab_size, fixed) for f, b in benches.items()}
    groups = []
    for context in o.contexts:
        tasks = []
        for format, bench in benches.items():
            case = session.case(bench, mode, format, context, 1, o.new_tokens, allocated=fixed, varies="used")
            run = partial(_steps, caches[format], context, o.new_tokens)
            facts = case.facts | {"prefill_flop": 0.0}
            tasks.append(Task(case, run, expected_s=session.expected_s(mode, facts, o.new_tokens)))
        groups.append(Group(f"{context:,} tokens", tasks))
    sizes = [n for n in ALLOCATED if n <= session.config.longest_context]
    context = min(o.contexts[len(o.contexts) // 2], sizes[0] // 2)
    tasks = []
    for format, size in product(o.formats, sizes):
        bench = session.workbench(format, (mode,), (size - max(o.new_tokens, CHECK_TOKENS) - 1,), 1, o.new_tokens)
        preparations.append(Preparation(bench, mode, format))
        tasks.append(session.task(bench, mode, format, context, 1, o.new_tokens, allocated=size, varies="allocated"))
    session.execute(preparations, [*groups, Group("allocated length", tasks)])


def _steps(cache: DeepCache, context: int, steps: int) -> Measurement:
    return {"step_s": cache.decode_s(context, steps)}


def summary(record: Record) -> list[str]:
    """Return a sentence per format: the time of a step at the longest over the shortest length."""
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
    columns=Columns(
        ("format", "varies", "context", "allocated"), ("step_ms", "step_p99_ms", "decode_tok_s", "share_of_bandwidth")
    ),
    defaults={
        "formats": ("plain", "int4", "int4-kv8"), "contexts": (32, 512, 2048, 8192, 32768),
        "new_tokens": 16, "repetitions": 3,
    },
    quick={"formats": ("plain",), "contexts": (32, 512), "new_tokens": 8, "repetitions": 1},
    summary=summary,
)  # fmt: skip
