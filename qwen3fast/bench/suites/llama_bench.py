"""The tests of llama-bench, in its words: pp512 and tg128 at growing depths.

pp512: a prompt of 512 tokens behind `depth` tokens that are in the cache already. tg128: 128 new tokens from there on.
Filling the cache to the depth is not timed. Its Markdown rows can stand beside llama-bench's own.
Source: tools/llama-bench of github.com/ggml-org/llama.cpp (options -p 512 -n 128 -d 0,4096,16384,32768).
"""

from __future__ import annotations

from statistics import mean, stdev

from qwen3fast.bench.deep_cache import DeepCache
from qwen3fast.bench.harness import Group, Measurement, Task
from qwen3fast.bench.measure import Workbench, with_graphs
from qwen3fast.bench.metrics import per_repetition
from qwen3fast.bench.record import Case, Label, Record
from qwen3fast.bench.session import Preparation, Session, forward_flop
from qwen3fast.bench.suites.roofline import MODE
from qwen3fast.bench.suites.suite import Suite
from qwen3fast.bench.table import Columns, as_markdown

PROMPT, NEW = 512, 128  # llama-bench's defaults
DEPTHS = (0, 4096, 16384, 32768)


def run(session: Session) -> None:
    """Measure the depths from the shallowest to the deepest; formats and both tests take turns."""
    o, mode = session.options, with_graphs(MODE, session.device)
    room = session.config.longest_context - PROMPT - 1
    depths = [depth for depth in o.contexts if depth <= room] or [0]
    preparations, groups = [], [Group("no tokens" if d == 0 else f"{d:,} tokens deep", []) for d in depths]
    for format in o.formats:
        bench = session.workbench(format, (mode,), (depths[-1] + PROMPT,), 1, o.new_tokens)
        session.record.notes.setdefault("weight_bytes", {})[session.label(format)] = bench.model.num_bytes()
        preparations.append(Preparation(bench, mode, format))
        cache = DeepCache(bench, mode, session.config.vocab_size, depths[-1] + PROMPT)
        for i, depth in enumerate(depths):
            groups[i] = Group(groups[i].description, [*groups[i].tasks, *_tests(session, bench, cache, format, depth)])
    session.execute(preparations, groups)


def _tests(session: Session, bench: Workbench, cache: DeepCache, format: str, depth: int) -> list[Task]:
    new, config = session.options.new_tokens, session.config
    labels: dict[str, Label] = {"format": session.label(format), "depth": depth}
    weight_bytes = float(bench.model.num_bytes(per_token=True))
    read = weight_bytes + config.kv_bytes_per_token(bench.cache_dtype) * (depth + new / 2)
    prompt_facts = {"prefill_flop": forward_flop(config, depth + PROMPT) - forward_flop(config, depth)}
    prompt_facts |= {"weight_bytes": weight_bytes, "bytes_per_step": 0.0}
    new_facts = {"prefill_flop": 0.0, "weight_bytes": 0.0, "bytes_per_step": read}

    def prompt() -> Measurement:
        return {"seconds": cache.prefill_s(depth, PROMPT)}

    def generate() -> Measurement:
        return {"seconds": sum(cache.decode_s(depth, new))}

    prompt_case = Case({**labels, "test": f"pp{PROMPT}"}, {"tokens": float(PROMPT)})
    new_case = Case({**labels, "test": f"tg{new}"}, {"tokens": float(new)})
    return [
        Task(prompt_case, prompt, expected_s=session.expected_s(MODE, prompt_facts, 0)),
        Task(new_case, generate, expected_s=session.expected_s(MODE, new_facts, new)),
    ]


def markdown(record: Record) -> list[str]:
    """Return the record as llama-bench's table: mean and standard deviation of tokens per second."""
    header = ["model", "size", "params", "backend", "threads", "test", "t/s"]
    model, environment = record.model, record.environment
    rows = [header]
    for case in record.cases:
        speeds = per_repetition(case.labels, case.facts, case.samples)["tok_s"]
        spread = stdev(speeds) if len(speeds) > 1 else 0.0
        size = record.notes.get("weight_bytes", {}).get(case.labels["format"], model["weight_bytes"])
        parameters, depth = model["parameters"], case.labels["depth"]
        rows.append([
            f"{record.model_name} {case.labels['format']}",
            f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB",
            f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.2f} M",
            "CUDA" if environment.get("gpu") else "CPU",
            str(environment.get("threads", "")),
            str(case.labels["test"]) + (f" @ d{depth}" if depth else ""),
            f"{mean(speeds):.2f} ± {spread:.2f}",
        ])  # fmt: skip
    return as_markdown(rows, left=1).split("\n")


def summary(record: Record) -> list[str]:
    """Return a sentence per format and test: the speed at the deepest over the one at the shallowest depth."""
    sentences = []
    for format in dict.fromkeys(case.labels["format"] for case in record.cases):
        for test in ("pp", "tg"):
            line = {
                int(case.labels["depth"]): case.metrics["tok_s"].median
                for case in record.cases
                if case.labels["format"] == format and str(case.labels["test"]).startswith(test)
            }
            first, last = min(line), max(line)
            kept = f", {line[last] / line[first]:.0%} of the speed at {first:,}" if first < last else ""
            kind = "a prompt runs" if test == "pp" else "new tokens come"
            sentences.append(f"{format}: {kind} at {line[last]:.4g} tokens/s {last:,} tokens deep{kept}.")
    return sentences


SUITE = Suite(
    name="llama-bench",
    title="llama-bench's tests: pp512 and tg128 by depth",
    run=run,
    columns=Columns(("format", "depth", "test"), ("tok_s",)),
    defaults={"formats": ("plain", "int4"), "contexts": DEPTHS, "new_tokens": NEW, "repetitions": 3},
    quick={"formats": ("int4",), "contexts": (0, 1024), "new_tokens": 32, "repetitions": 1},
    summary=summary,
    markdown=markdown,
)  # fmt: skip
