"""Does a token of a mixture of experts cost what it runs, or what the model holds?

    python benchmarks/moe.py --output benchmarks/results/moe.json

A dense model beside one with experts, of the same number of parameters in all, in small shapes and random weights:
milliseconds a decode step, taking turns, and their ratio beside that of the parameters that a step reads. No tokens
are checked here: that experts give the right ones is what the tests are for.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch

from qwen3fast.bench.environment import describe_environment, describe_run
from qwen3fast.bench.harness import Harness, Sample, Task
from qwen3fast.bench.probes import BandwidthProbe
from qwen3fast.bench.record import Case, Record, write_json
from qwen3fast.bench.table import Columns, as_text, table_rows
from qwen3fast.checkpoint import random_model
from qwen3fast.config import DTYPES, ModelConfig
from qwen3fast.engine import Engine, StepKind
from qwen3fast.kv_cache import StaticKVCache

PROMPT = list(range(1, 33))
STEPS, CONTEXT = 20, 1024
COLUMNS = Columns(("model", "parameters", "read by a step"), ("step_ms", "step_p99_ms", "share_of_bandwidth"))


def configs(experts: int, per_token: int, layers: int, dtype: torch.dtype) -> dict[str, ModelConfig]:
    """A dense model whose feed-forward parts are as large as all experts together, and one with experts."""
    each = 256
    dense = ModelConfig(
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=experts * each,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        dtype=dtype,
    )
    mixed = replace(dense, num_experts=experts, num_experts_per_tok=per_token, moe_intermediate_size=each)
    return {"dense": dense, "experts": replace(mixed, norm_topk_prob=True)}


def make_engine(config: ModelConfig, compile: bool) -> Engine:
    """An engine with a prompt in row 0, which has decoded a few tokens."""
    cpu = torch.device("cpu")
    engine = Engine(
        random_model(config, cpu, config.dtype), StaticKVCache(config, 1, CONTEXT, config.dtype, cpu), cpu, compile
    )
    engine.prefill_whole(0, PROMPT)
    run(engine, 3, len(PROMPT))
    return engine


def run(engine: Engine, steps: int, used: int) -> list[float]:
    """Seconds of each of some steps; `used` positions are in the cache before, and these are written anew each time."""
    engine.set_row(0, used, 0.0, 0, 1.0, 0.0, 0)
    times = []
    for i in range(steps):
        started = time.perf_counter()
        engine.decode(1, used + i + 1, StepKind())
        times.append(time.perf_counter() - started)
    return times


def make_task(name: str, config: ModelConfig, engine: Engine) -> Task:
    """Some decode steps. Bytes of keys and values, of a few positions, are not counted."""
    read = config.decode_parameters
    labels = {
        "model": name, "parameters": f"{config.num_parameters / 1e6:.1f} million",
        "read by a step": f"{read / 1e6:.1f} million", "context": len(PROMPT), "batch_size": 1,
    }  # fmt: skip
    facts = {
        "parameters": float(config.num_parameters), "parameters_per_step": float(read),
        "bytes_per_step": float(read * config.dtype.itemsize),
    }  # fmt: skip

    def run_once() -> Sample:
        return {"step_s": run(engine, STEPS, len(PROMPT))}

    return Task(Case(labels, facts), run_once)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=64, help="[%(default)s]")
    parser.add_argument("--experts-per-token", type=int, default=4, help="[%(default)s]")
    parser.add_argument("--layers", type=int, default=4, help="[%(default)s]")
    parser.add_argument("--rounds", type=int, default=5, help="[%(default)s]")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="[%(default)s]")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="[%(default)s]")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--output", type=Path, default=Path("bench_results/moe.json"), help="[%(default)s]")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cpu = torch.device("cpu")
    shapes = configs(args.experts, args.experts_per_token, args.layers, DTYPES[args.dtype])
    model = {"name": f"{args.experts} experts, {args.experts_per_token} a token, {args.layers} layers, random weights"}
    record = Record("moe", describe_run("python benchmarks/moe.py"), describe_environment(cpu), model)
    probe = BandwidthProbe(cpu)

    def measure_bandwidth() -> Sample:
        probe.samples.clear()
        probe.measure(2)
        return {"bandwidth_gb_s": probe.gb_s}

    harness = Harness(record, [measure_bandwidth])
    tasks = [make_task(name, config, make_engine(config, not args.eager)) for name, config in shapes.items()]
    harness.measure(tasks, args.rounds)
    harness.finish()
    write_json(record.to_dict(), args.output)
    print(as_text(table_rows(record, COLUMNS), left=1))
    dense, experts = (task.case for task in tasks)
    reads = dense.facts["parameters_per_step"] / experts.facts["parameters_per_step"]
    takes = dense.metrics["step_ms"].median / experts.metrics["step_ms"].median
    print(f"a step with experts reads {reads:.1f} times less and takes {takes:.1f} times less; wrote {args.output}")


if __name__ == "__main__":
    main()
