"""Speed of new tokens with and without a KV cache, against sequence length.

Without a cache each new token computes the whole sequence: its cost grows with the length, O(n) per token and O(n^2)
per reply, up to the rate of the matrix product. With a cache it reads weights and cached keys and values: O(1) per
token until the cache is as large as the weights, up to the memory's bandwidth.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import exp, log
from statistics import median

from qwen3fast.bench.harness import Group
from qwen3fast.bench.measure import MODES, is_cached, is_compiled
from qwen3fast.bench.metrics import duration, short
from qwen3fast.bench.record import Record
from qwen3fast.bench.session import Preparation, Session
from qwen3fast.bench.statistics import ratio
from qwen3fast.bench.suites.suite import Suite
from qwen3fast.bench.table import Columns, line_of

LONG = 512  # tokens: longer prompts are not warmed up on CPUs: they take seconds, and all modes ran for their check
FAULT = 1.05  # a cached prefill may take this much longer than a forward pass without a cache: noise
# The modes in which a speed with (True) or without the cache is looked up, best first.
BEST_FIRST = {
    True: ("cached-graphs", "cached-compiled", "cached-eager"),
    False: ("uncached-compiled", "uncached-eager"),
}


def run(session: Session) -> None:
    """Measure every mode at every length, taking turns. Without a cache the first token is the step."""
    o = session.options
    preparations, groups = [], []
    for format in o.formats:
        bench = session.workbench(format, o.modes, o.contexts, max(o.batch_sizes), o.new_tokens)
        for batch_size in o.batch_sizes:
            preparations += [Preparation(bench, mode, format, batch_size) for mode in o.modes]
            for length in o.contexts:
                tasks = []
                for mode in o.modes:
                    steps = o.new_tokens if is_cached(mode) else 0
                    task = session.task(bench, mode, format, length, batch_size, steps)
                    captures = session.device.type == "cuda" and is_compiled(mode)  # graphs, or loads kernels
                    tasks.append(replace(task, warms_up=length <= LONG or captures))
                title = f"{length:,} tokens" + (f", {format}" if len(o.formats) > 1 else "")
                groups.append(Group(title + (f", batch {batch_size}" if len(o.batch_sizes) > 1 else ""), tasks))
    session.execute(preparations, groups)


def speeds(record: Record, mode: str, batch_size: int, format: str, metric: str = "decode_tok_s") -> dict[int, float]:
    """Return a mode's metric by context."""
    return line_of(record, metric, "context", mode=mode, batch_size=batch_size, format=format)


def best_speeds(record: Record, cached: bool, batch_size: int, format: str) -> dict[int, float]:
    """Return the speeds of the fastest kind of mode that was measured."""
    return next((s for mode in BEST_FIRST[cached] if (s := speeds(record, mode, batch_size, format))), {})


def crossover(record: Record, batch_size: int, format: str) -> float | None:
    """Return the length from which the cache is faster, interpolated linearly in logarithms.

    None if it is faster at all measured lengths or at none.
    """
    cached, uncached = (best_speeds(record, is_, batch_size, format) for is_ in (True, False))
    lengths = sorted(cached.keys() & uncached.keys())
    ratios = [(n, log(cached[n] / uncached[n])) for n in lengths]
    for (n, a), (m, b) in pairwise(ratios):
        if a < 0 <= b:
            return exp(log(n) + (log(m) - log(n)) * -a / (b - a))
    return None


def summary(record: Record) -> list[str]:
    """Return sentences on the speed-up at both ends, on where the cache begins to pay, and on faults."""
    sentences = []
    for batch_size, format in panels(record):
        cached, uncached = (best_speeds(record, is_, batch_size, format) for is_ in (True, False))
        shared = sorted(cached.keys() & uncached.keys())
        if not shared:
            continue
        first, last = shared[0], shared[-1]
        sentences.append(
            f"{format}, batch {batch_size}: with the cache {short(cached[last])} tokens/s at {last:,} tokens, "
            f"{cached[last] / uncached[last]:.3g} times as many as without"
            + (f"; at {first:,} tokens {cached[first] / uncached[first]:.3g} times." if first < last else ".")
        )
        meet = crossover(record, batch_size, format)
        if meet is not None:
            sentences.append(f"Below {meet:.0f} tokens it is faster to compute the whole sequence for each token.")
    return sentences + faults(record)


def faults(record: Record) -> list[str]:
    """Return a sentence for each length at which the first token takes longer with the cache than without it.

    Both compute the same forward pass, so a cached prefill that is slower uses a worse form than there is.
    """
    sentences = []
    for batch_size, format in panels(record):
        times = {
            is_: {mode: _first_tokens(record, mode, batch_size, format) for mode in BEST_FIRST[is_]}
            for is_ in (True, False)
        }
        for context in sorted({int(c.labels["context"]) for c in record.cases}):
            pair = [min((t[context] for t in times[is_].values() if context in t), default=None, key=median)
                    for is_ in (True, False)]  # fmt: skip
            if pair[0] is None or pair[1] is None:
                continue
            change = ratio(pair[0], pair[1])
            if change.median > FAULT and (change.low is None or change.low > 1):
                sentences.append(
                    f"FAULT at {context:,} tokens ({format}, batch {batch_size}): the first token takes "
                    f"{duration(median(pair[0]))} with the cache, {duration(median(pair[1]))} without."
                )
    return sentences


def panels(record: Record) -> list[tuple[int, str]]:
    """Return the (batch size, format) pairs of a record, each of which a picture shows by itself."""
    return list(dict.fromkeys((int(c.labels["batch_size"]), str(c.labels["format"])) for c in record.cases))


def _first_tokens(record: Record, mode: str, batch_size: int, format: str) -> dict[int, list[float]]:
    wanted = {"mode": mode, "batch_size": batch_size, "format": format}
    return {
        int(case.labels["context"]): case.samples["ttft_s"]
        for case in record.cases
        if wanted.items() <= case.labels.items() and "ttft_s" in case.metrics
    }


SUITE = Suite(
    name="cache",
    title="With and without a KV cache",
    run=run,
    columns=Columns(
        ("context", "batch_size", "mode", "format"),
        ("decode_tok_s", "prefill_tok_s", "ttft_s", "step_ms", "step_p99_ms", "share_of_bandwidth",
         "peak_memory_bytes"),
        baseline={"mode": "uncached-eager"},
    ),
    defaults={
        "formats": ("plain",), "modes": MODES, "contexts": (32, 128, 512, 1024, 2048), "batch_sizes": (1,),
        "new_tokens": 16, "repetitions": 3,
    },
    quick={"contexts": (32, 256), "new_tokens": 8, "repetitions": 1},
    full={"contexts": (4, 16, 32, 128, 512, 1024, 2048, 4096), "new_tokens": 24},
    on_cuda={"contexts": (32, 512, 2048, 4096, 8192), "new_tokens": 64},
    summary=summary,
    limit_s=145.0,
)  # fmt: skip
