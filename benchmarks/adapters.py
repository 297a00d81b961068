"""Decoding speed with LoRA adapters at run time, beside the same engine's steps without.

    python benchmarks/adapters.py --output bench_results/adapters.json

One model with random weights, random adapters for all of its layers, and steps of some rows: with 0, 1 or several
adapters in a step, which take turns. First, the greedy tokens of each kind of step are compared with the logits of the
same model and adapter without a cache; the exit status is 1 if they are wrong.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import tables
import torch
from comparison import finish_without_picture

from qwen3fast import load_model
from qwen3fast.bench.environment import describe_environment, describe_run
from qwen3fast.bench.harness import Harness, Measurement, Task, interruptible
from qwen3fast.bench.measure import TokenCheck, check_tokens, make_prompts
from qwen3fast.bench.options import counts
from qwen3fast.bench.probes import BandwidthProbe
from qwen3fast.bench.record import Case, Label, Record
from qwen3fast.checkpoint.choices import choose_device
from qwen3fast.engine import Engine
from qwen3fast.engine.state import RowSampling, StepKind
from qwen3fast.model.kv_cache import StaticKVCache

PROMPT_TOKENS, CHECKED_TOKENS = 32, 8
SHRINK = 4  # adapters as large as their inputs let the rounding of quantized layers grow beyond the check's tolerance


def build(args: argparse.Namespace, format: str) -> Engine:
    """Return the engine of a model in a format, with random adapters in all slots."""
    device = choose_device(args.device)
    model = load_model(args.model, device, quantization=None if format == "plain" else format, calibrate=False)
    rows, positions = max(args.batch_sizes), PROMPT_TOKENS + args.new_tokens + 1
    cache = StaticKVCache(model.config, rows, positions, model.model.norm.weight.dtype, device)
    slots = max(1, *args.adapters)
    engine = Engine(model, cache, device, args.compile, max_adapters=slots, max_adapter_rank=args.rank)
    assert engine.adapters is not None, "it has at least one slot"
    rng = torch.Generator().manual_seed(0)
    for slot in range(1, slots + 1):
        matrices = {}
        for name, layer in engine.adapters.layers.items():
            a_RK = torch.randn(args.rank, layer.base.in_features, generator=rng) / layer.base.in_features**0.5
            b_NR = torch.randn(layer.base.out_features, args.rank, generator=rng) / args.rank**0.5
            matrices[name] = (a_RK, b_NR / SHRINK)
        engine.write_adapter(slot, matrices)
    return engine


def reply(engine: Engine, prompts: list[list[int]], adapters: int, new_tokens: int) -> tuple[list[float], list[int]]:
    """Return the seconds of each step and the tokens of row 0; row r has adapter 1 + r % adapters, or none."""
    engine.clear_all()
    kind, first = StepKind(has_adapters=adapters > 0), []
    for row, prompt in enumerate(prompts):
        slot = 1 + row % adapters if adapters else 0
        logits_1V = engine.prefill_whole(row, prompt, slot)
        engine.set_row(row, len(prompt), RowSampling(adapter=slot))
        first.append(engine.sample_first(row, logits_1V, StepKind()).tokens[0])
    tokens, step_s = [first[0]], []
    for i in range(new_tokens):
        started = time.perf_counter()
        tokens.append(engine.decode(len(prompts), len(prompts[0]) + 1 + i, kind)[0])
        step_s.append(time.perf_counter() - started)
    return step_s, tokens


def check(engine: Engine, prompts: list[list[int]], adapters: int) -> TokenCheck:
    """Compare row 0's tokens with the logits of the model, and the first adapter, without a cache; also compiles."""
    _, tokens = reply(engine, prompts, adapters, CHECKED_TOKENS)
    model = engine._forward_with(1 if adapters else 0).model
    with torch.no_grad():
        return check_tokens(model, prompts[:1], [tokens])


def tasks_of(args: argparse.Namespace, engine: Engine, format: str, rows: int, record: Record) -> list[Task]:
    """Return a task per number of adapters. Raises: SystemExit if tokens are wrong."""
    prompts, tasks = make_prompts(engine.model.config.vocab_size, PROMPT_TOKENS, rows), []

    def measure(adapters: int) -> Measurement:
        return {"step_s": reply(engine, prompts, adapters, args.new_tokens)[0]}

    for adapters in [number for number in args.adapters if number <= rows]:
        labels: dict[str, Label] = {"format": format, "batch_size": rows, "adapters": adapters}
        found = check(engine, prompts, adapters)
        record.checks[", ".join(map(str, labels.values()))] = asdict(found) | {"passed": found.passed}
        if not found.passed:
            raise SystemExit(f"{labels}: wrong tokens, {found}")
        assert engine.adapters is not None, "it has adapters"
        facts = {"adapter_bytes": engine.adapters.num_bytes, "rank": args.rank}
        tasks.append(Task(Case(labels, facts), partial(measure, adapters)))
    return tasks


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random:0.6b", help="[%(default)s]")
    parser.add_argument("--formats", default="plain,int8,int4", help="comma-separated [%(default)s]")
    parser.add_argument("--batch-sizes", type=counts, default="1,8", help="[%(default)s]")
    parser.add_argument("--adapters", default="0,1,4", help="in a step, beginning with 0 [%(default)s]")
    parser.add_argument("--rank", type=int, default=16, help="[%(default)s]")
    parser.add_argument("--rounds", type=int, default=5, help="[%(default)s]")
    parser.add_argument("--new-tokens", type=int, default=16, help="timed per reply [%(default)s]")
    parser.add_argument("--device", default="auto", help="[%(default)s]")
    parser.add_argument("--threads", type=int, help="CPU threads [PyTorch's choice]")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="run the plain forms")
    parser.add_argument("--output", type=Path, default=Path("bench_results/adapters.json"), help="[%(default)s]")
    args = parser.parse_args()
    args.formats = args.formats.split(",")
    args.adapters = sorted({int(number) for number in args.adapters.split(",")})
    return args


def main() -> int:
    """Measure, print and write. Returns: the exit status."""
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = choose_device(args.device)
    run = describe_run("python benchmarks/adapters.py")
    record = Record("adapters", run, describe_environment(device), {"name": args.model})
    probe = BandwidthProbe(device)
    harness = Harness(record, [lambda: {"bandwidth_gb_s": probe.measure()}])
    with interruptible(record):
        for format in args.formats:
            engine = build(args, format)
            for rows in args.batch_sizes:
                harness.measure(tasks_of(args, engine, format, rows, record), args.rounds, f"{format}, batch {rows}")
            engine.close()
    harness.finish()
    return finish_without_picture(record, args.output, tables.adapters_rows, left=1)


if __name__ == "__main__":
    raise SystemExit(main())
