"""Tables of records that are best read across two labels: engines by context, operators by phase, and so on.

Each returns rows of cells after a header, for `qwen3fast.bench.table.as_text` and `as_markdown`.
"""

from __future__ import annotations

from statistics import median
from typing import Any

from qwen3fast.bench.metrics import METRICS
from qwen3fast.bench.record import Case, Record

OURS = "qwen3fast"
PARAMETERS = ("parameters", "read_parameters")
Rows = list[list[str]]


def unique(record: Record, *labels: str, **wanted: Any) -> list[tuple[Any, ...]]:
    """Return the distinct values of labels over the cases with all of `wanted`, in order."""
    cases = (c for c in record.cases if wanted.items() <= c.labels.items())
    return list(dict.fromkeys(tuple(case.labels[name] for name in labels) for case in cases))


def find(record: Record, **wanted: Any) -> Case | None:
    """Return the first case with these labels."""
    return next((case for case in record.cases if wanted.items() <= case.labels.items()), None)


def cell(case: Case | None, *metrics: str) -> str:
    """Return medians joined by a comma; empty if the case lacks one."""
    derived = case.metrics if case else {}
    if not all(name in derived for name in metrics):
        return ""
    return ", ".join(METRICS[name].text(derived[name].median) for name in metrics)


def peers_columns(record: Record) -> dict[str, dict[tuple[str, str], float]]:
    """Return title of a column ("decode at 32", "prefill of 512") -> (format, engine) -> tokens/s."""
    columns: dict[str, dict[tuple[str, str], float]] = {}
    for what, context in sorted(unique(record, "what", "context")):
        metric, title = ("decode_tok_s", "decode at") if what == "decode" else ("prefill_tok_s", "prefill of")
        columns[f"{title} {context:,}"] = {
            (str(c.labels["format"]), str(c.labels["engine"])): c.metrics[metric].median
            for c in record.cases
            if (c.labels["what"], c.labels["context"]) == (what, context) and metric in c.metrics
        }
    return columns


def peers_rows(record: Record, ratios: bool = False) -> Rows:
    """Return the table of benchmarks/compare_peers.py: tokens/s; with ratios, our speed over each engine's."""
    columns = peers_columns(record)
    rows = [["format", "engine", *columns]]
    for format, engine in unique(record, "format", "engine"):
        cells = []
        for speeds in columns.values():
            speed, own = speeds.get((format, engine)), speeds.get((format, OURS))
            ratio = f" ({own / speed:.2f}x)" if ratios and speed and own else ""
            cells.append("" if speed is None else f"{speed:.1f}{ratio}")
        rows.append([format, engine, *cells])
    return rows


def operators_rows(record: Record) -> Rows:
    """Return the table of benchmarks/cpu_operators.py: milliseconds of the whole, of each operator, and of the rest."""
    operators = sorted((name for (name,) in unique(record, "operator")), key=lambda name: name == "other")
    rows = [["", *operators]]
    for phase, format, context in unique(record, "phase", "format", "context"):
        shape = {"phase": phase, "format": format, "context": context}
        rows.append([f"{phase} {context:,}, {format}", *(cell(find(record, **shape, operator=o), "operator_ms")
                                                         for o in operators)])  # fmt: skip
    return rows


def offline_rows(record: Record) -> Rows:
    """Return the table of benchmarks/batching.py: throughput of each engine by batch size."""
    sizes = sorted({size for (size,) in unique(record, "batch_size", what="offline")})
    rows = [["tokens/s", *(f"batch {size}" for size in sizes)]]
    for engine, format in unique(record, "engine", "format", what="offline"):
        shape = {"engine": engine, "format": format, "what": "offline"}
        cells = (cell(find(record, **shape, batch_size=size), "tok_s") for size in sizes)
        rows.append([f"{engine}, {format}", *cells])
    return rows


def online_rows(record: Record) -> Rows:
    """Return the table of benchmarks/batching.py: latency by format, batch size and offered load."""
    titles = ["first token p50, p99", "between tokens p50, p99 (ms)"]
    rows = [["format", "batch", "load", "offered requests/s", "tok/s", *titles]]
    for format, size, load in sorted(unique(record, "format", "batch_size", "load", what="online")):
        case = find(record, what="online", format=format, batch_size=size, load=load)
        assert case is not None, "it was found a moment ago"
        times = [cell(case, f"{name}_{unit}", f"{name}_p99_{unit}") for name, unit in (("ttft", "s"), ("itl", "ms"))]
        offered = f"{case.facts['offered_requests_s']:.2f}"
        rows.append([format, str(size), f"{load:.0%}", offered, cell(case, "tok_s"), *times])
    return rows


def servers_rows(record: Record) -> Rows:
    """Return the table of benchmarks/compare_servers.py: what clients see, by server and number of clients."""
    metrics = {"tok_s": "tokens/s", "ttft_s": "first token", "tpot_ms": "per token, ms"}
    numbers = [n for (n,) in sorted(unique(record, "clients"))]
    rows = [["format", "server", *(f"{title}, {n} client{'s' if n > 1 else ''}" for n in numbers
                                   for title in metrics.values())]]  # fmt: skip
    for format, server in unique(record, "format", "server"):
        cases = [find(record, format=format, server=server, clients=n) for n in numbers]
        rows.append([format, server, *(cell(case, metric) for case in cases for metric in metrics)])
    return rows


def moe_rows(record: Record) -> Rows:
    """Return the table of benchmarks/moe.py: milliseconds per step of a mixture of experts between two dense models.

    Ratios are medians of the rounds' ratios."""
    rows = [["format, experts", "parameters", "of them active", "mixture ms", "dense as active ms", "dense as all ms"]]
    rows[0] += ["mixture / active", "all / mixture"]
    for format, experts in unique(record, "format", "num_experts"):
        names = ("experts", "dense_active", "dense_all")
        cases = [find(record, format=format, num_experts=experts, model=name) for name in names]
        facts = cases[0].facts if cases[0] else {}
        sizes = [f"{facts[name] / 1e6:,.0f} million" if name in facts else "" for name in PARAMETERS]
        mixture, active, whole = ([median(steps) for steps in c.samples["step_s"]] if c else [] for c in cases)
        ratios = [
            f"{median(x / y for x, y in zip(a, b, strict=False)):.2f}x" if a and b else ""
            for a, b in ((mixture, active), (whole, mixture))
        ]
        rows.append([f"{format}, {experts}", *sizes, *(cell(case, "step_ms") for case in cases), *ratios])
    return rows


def quantization_rows(record: Record) -> Rows:
    """Return the table of tools/quantization_report.py: medians over layers, the worst layer, perplexity, accuracy."""
    tasks = [what for (what,) in unique(record, "what") if what not in ("layer", "cache", "model")]
    rows = [["format", "MB", "weight error", "output error", "worst output", "perplexity", *tasks]]
    for (format,) in unique(record, "format"):
        model = find(record, format=format, what="model")
        layers = [c for c in record.cases if c.labels["format"] == format and c.labels["what"] in ("layer", "cache")]
        size = f"{model.facts['weight_bytes'] / 1e6:.2f}" if model else ""
        errors = [[c.metrics[m].median for c in layers if m in c.metrics] for m in ("weight_error", "output_error")]
        cells = [_percent(median(values) if values else None) for values in errors]
        cells.append(_percent(max(errors[1], default=None)))
        scores = (cell(find(record, format=format, what=task), "accuracy") for task in tasks)
        rows.append([format, size, *cells, cell(model, "perplexity"), *scores])
    return rows


def adapters_rows(record: Record) -> Rows:
    """Milliseconds per step, and their share of those without adapters."""
    rows, none = [["format", "batch", "adapters", "step ms", "beside none"]], dict[tuple[Any, Any], float]()
    for case in record.cases:
        step = case.metrics["step_ms"].median
        format, batch_size, adapters = case.labels.values()
        least = none.setdefault((format, batch_size), step)  # the smallest number of adapters comes first
        rows.append([str(format), str(batch_size), str(adapters), f"{step:.2f}", f"{step / least:.2f}x"])
    return rows


def shared_cores_rows(record: Record) -> Rows:
    """Tokens per second beside other programs, and the speed lost by the share of the processor that they took."""
    rows = [["format", "", "other programs", "tok/s", "they took", "speed lost", "lost / taken"]]
    alone = dict[Any, Any]()
    for case in record.cases:
        format, what, others = (str(label) for label in case.labels.values())
        speeds = [case.facts["tokens"] / s for s in case.samples["seconds"]]
        first = alone.setdefault((format, what), speeds)  # without other programs
        lost = [1 - speed / full for speed, full in zip(speeds, first, strict=False)]  # interrupted runs
        taken = case.samples["taken"]
        cells = ["", "", ""]
        if others != "none":
            ratios = [share / part for share, part in zip(lost, taken, strict=False) if part]
            cells = [f"{median(taken):.0%}", f"{median(lost):.0%}", f"{median(ratios):.2f}" if ratios else ""]
        rows.append([format, what, others, f"{median(speeds):.1f}", *cells])
    return rows


def huge_pages_rows(record: Record) -> Rows:
    """A row per context and kind of pages: speed, and the time of a step by the other kind's, round by round."""
    rows = [["pages", "context", "in huge pages", "ms per step", "tokens/s", "time / as mapped"]]
    for (context,) in unique(record, "context"):
        first = None
        for case in (case for case in record.cases if case.labels["context"] == context):
            steps = [sum(step) / len(step) for step in case.samples["step_s"]]
            first = first or steps
            ratio = median(one / other for one, other in zip(steps, first, strict=False))  # interrupted runs
            size = f"{case.facts['huge_bytes'] / 1e9:.2f} GB"
            speed = [f"{1e3 * median(steps):.1f}", f"{1 / median(steps):.1f}", f"{ratio:.2f}"]
            rows.append([str(case.labels["pages"]), f"{context:,}", size, *speed])
    return rows


def prequantized_rows(record: Record) -> Rows:
    """Return the table of tools/prequantized_report.py."""
    rows = [["type", "loaded as", "error", "bits in the file", "bits in memory", "time over int4's", "over int8's"]]
    for case in record.cases:
        error = case.metrics["weight_error"].median
        bits = [f"{case.facts[name]:.2f}" for name in ("bits_in_file", "bits_in_memory")]
        times = [cell(case, name) for name in ("over_int4", "over_int8")]
        rows.append(
            [str(case.labels["type"]), str(case.labels["loaded_as"]), f"{error:.2%}" if error else "0", *bits, *times]
        )
    return rows


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"
