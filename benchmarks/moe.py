"""Does a token of a mixture of experts cost what it runs, or what the model holds?

    python benchmarks/moe.py

A dense model beside one with experts, of the same number of parameters in all, in small shapes and random weights:
milliseconds a decode step, taking turns, and their ratio beside that of the parameters that a step reads.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from statistics import median

import torch

from qwen3fast.checkpoint import random_model
from qwen3fast.config import DTYPES, ModelConfig
from qwen3fast.engine import Engine, StepKind
from qwen3fast.kv_cache import StaticKVCache

PROMPT = list(range(1, 33))
STEPS, CONTEXT = 20, 1024


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
    engine.set_row(0, len(PROMPT), 0.0, 0, 1.0, 0.0, 0)
    run(engine, 3, len(PROMPT))
    return engine


def run(engine: Engine, steps: int, used: int) -> float:
    """Seconds a step, the median of `steps`; `used` positions are in the cache before."""
    times = []
    for i in range(steps):
        started = time.perf_counter()
        engine.decode(1, used + i + 1, StepKind())
        times.append(time.perf_counter() - started)
    return median(times)


def main() -> None:
    """Measure and print; nothing is recorded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=64, help="[%(default)s]")
    parser.add_argument("--experts-per-token", type=int, default=4, help="[%(default)s]")
    parser.add_argument("--layers", type=int, default=4, help="[%(default)s]")
    parser.add_argument("--rounds", type=int, default=5, help="[%(default)s]")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="[%(default)s]")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="[%(default)s]")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shapes = configs(args.experts, args.experts_per_token, args.layers, DTYPES[args.dtype])
    engines = {name: make_engine(config, not args.eager) for name, config in shapes.items()}
    step_s: dict[str, list[float]] = {name: [] for name in engines}
    for i in range(args.rounds):
        for name, engine in engines.items():
            step_s[name].append(run(engine, STEPS, len(PROMPT) + 3 + i * STEPS))
    for name, config in shapes.items():
        print(
            f"{name:8} {config.num_parameters / 1e6:6.1f} million parameters, "
            f"{config.decode_parameters / 1e6:6.1f} read by a step: {median(step_s[name]) * 1e3:7.3f} ms"
        )
    dense, experts = shapes["dense"].decode_parameters, shapes["experts"].decode_parameters
    ratio = median(step_s["dense"]) / median(step_s["experts"])
    print(f"a step with experts reads {dense / experts:.1f} times less and takes {ratio:.1f} times less")


if __name__ == "__main__":
    main()
