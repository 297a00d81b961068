"""Where a decode step's and a prefill's time goes on a CPU, operator by operator, for each weight format.

    python benchmarks/cpu_operators.py --output benchmarks/results/cpu-operators.json

A decode step's operators run one after the other, as in a step; a prefill's each by itself for all blocks. The whole is
timed beside them, formats take turns, medians are given. "Other" is the whole less its operators: for decode the step's
state and the token's way to the host, for prefill norms, rotation, activation functions, writing to the cache.
Writes JSON and prints a table in milliseconds.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch

from qwen3fast import load_model
from qwen3fast.bench.environment import describe_environment, describe_run
from qwen3fast.bench.measure import Workbench, make_prompts
from qwen3fast.bench.probes import BandwidthProbe
from qwen3fast.bench.record import write_json
from qwen3fast.engine import Engine, StepKind
from qwen3fast.engine.prefill import prefill_chunk
from qwen3fast.kernels.linear import linears
from qwen3fast.sampling import SamplerKind

FORMATS = ("bf16", "int8", "int4")
MODE = "cached-compiled"


class Stopwatch:
    """Seconds since the last look."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        self._last, seconds = now, now - self._last
        return seconds


def time_decode(engine: Engine, context: int) -> dict[str, float]:
    """Seconds of the operators of one decode step over `context` positions, run one after the other, and of a step.

    Attention is what the blocks take longer than over one position.
    """
    model, parts, state, rows = engine.model, engine.parts, engine.state, slice(1)
    assert parts.decode_layers is not None and parts.decode_layers.serves(1), "the C++ operations are not there"
    engine.set_row(0, context - 1, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0)
    first_11, last_11 = torch.zeros(1, 1, dtype=torch.int64), state.position_R[rows, None].clone()
    watch = Stopwatch()
    x_11E = model.embed(state.input_R[rows, None])
    embedding = watch.lap()
    y_11E = parts.decode_layers(x_11E, engine.cos_SD, engine.sin_SD, last_11)
    blocks = watch.lap()
    logits_1V = parts.logits(parts.head, y_11E).squeeze(1)
    projection = watch.lap()
    parts.samplers[SamplerKind.GREEDY](None, logits_1V, *state.sampler_rows(rows))
    sampler = watch.lap()
    engine.decode(1, context, StepKind())
    whole = watch.lap()
    parts.decode_layers(x_11E, engine.cos_SD, engine.sin_SD, first_11)
    blocks_alone = watch.lap()
    return {
        "embedding": embedding,
        "blocks but for attention": blocks_alone,
        "attention": blocks - blocks_alone,
        "norm, output projection": projection,
        "sampler": sampler,
        "whole": whole,
    }


def time_prefill(engine: Engine, tokens: int) -> dict[str, float]:
    """Seconds of the operators of one chunk of a prompt, each run by itself for all blocks, and of the whole chunk."""
    model, cache, config = engine.model, engine.cache, engine.model.config
    token_1T, position_1T = torch.tensor(make_prompts(config.vocab_size, tokens, 1)), torch.arange(tokens)[None]
    q_1THD = torch.randn(1, tokens, config.num_attention_heads, config.head_dim).to(cache.layers()[0].k_RKSD.dtype)
    wide, inner = torch.randn(1, tokens, config.num_attention_heads * config.head_dim).to(q_1THD.dtype), None
    row_1 = torch.tensor([0])
    watch = Stopwatch()
    x_1TE = model.embed(token_1T)
    embedding = watch.lap()
    for block in model.model.layers:
        attention, feed_forward = block.self_attn, block.mlp
        linears(x_1TE, attention.q_proj, attention.k_proj, attention.v_proj)
        linears(wide, attention.o_proj)
        inner = linears(x_1TE, feed_forward.gate_proj, feed_forward.up_proj)[0]
        linears(inner, feed_forward.down_proj)
    products = watch.lap()
    for layer in cache.layers():
        torch.ops.qwen3fast.prefill_attention(q_1THD, layer.k_RKSD, layer.v_RKSD, position_1T, row_1)
    attention_s = watch.lap()
    prefill_chunk(model, engine.parts, cache, engine.cos_SD, engine.sin_SD, row_1, token_1T, 0)
    whole = watch.lap()
    return {"embedding": embedding, "linear layers": products, "attention": attention_s, "whole": whole}


def measure(engines: dict[str, Engine], contexts: list[int], prompts: list[int], rounds: int) -> list[dict[str, Any]]:
    """Seconds of each operator of each case, all samples kept."""
    probe = BandwidthProbe(torch.device("cpu"))
    shapes = [("decode", n) for n in contexts] + [("prefill", n) for n in prompts]
    seconds: dict[tuple[str, int, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    bandwidth: dict[tuple[str, int, str], list[float]] = defaultdict(list)
    for number, (phase, length), (name, engine) in product(range(rounds + 1), shapes, engines.items()):
        probe.samples.clear()
        probe.measure(1)
        for operator, sample in (time_decode if phase == "decode" else time_prefill)(engine, length).items():
            if number > 0:  # the first round warms up
                seconds[phase, length, name][operator].append(sample)
        if number > 0:
            bandwidth[phase, length, name].append(probe.gb_s)
    cases = []
    for key, operators in seconds.items():
        medians = {name: median(samples) for name, samples in operators.items()}
        whole = medians.pop("whole")
        cases.append(
            {
                **dict(zip(("phase", "length", "format"), key, strict=True)),
                "bandwidth_gb_s": median(bandwidth[key]),
                "whole_ms": whole * 1e3,
                "operators_ms": {name: s * 1e3 for name, s in medians.items()},
                "other_ms": (whole - sum(medians.values())) * 1e3,
                "samples_s": operators,
            }
        )
    return cases


def as_text(cases: list[dict[str, Any]]) -> str:
    """Milliseconds and shares of the whole."""
    lines = []
    for case in cases:
        whole = case["whole_ms"]
        lines.append(f"{case['phase']} {case['length']:,}, {case['format']}: {whole:.2f} ms")
        for name, ms in (*case["operators_ms"].items(), ("other", case["other_ms"])):
            lines.append(f"    {name:26}{ms:9.2f}{ms / whole:8.1%}")
    return "\n".join(lines)


@torch.no_grad()
def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random:0.6b", help="[%(default)s]")
    parser.add_argument("--contexts", default="32,1024,4000", help="of decode steps [%(default)s]")
    parser.add_argument("--prompts", default="32,512", help="tokens of a prefill, of chunk sizes [%(default)s]")
    parser.add_argument("--rounds", type=int, default=15, help="[%(default)s]")
    parser.add_argument("--output", type=Path, default=Path("bench_results/cpu-operators.json"), help="[%(default)s]")
    args = parser.parse_args()
    contexts, prompts = ([int(n) for n in text.split(",")] for text in (args.contexts, args.prompts))
    engines = {}
    for name in FORMATS:
        model = load_model(args.model, "cpu", quantization=None if name == "bf16" else name, progress=True)
        bench = Workbench(model, (MODE,), max(*contexts, *prompts) + 1, 1)
        engines[name] = bench.engine(MODE)
        engines[name].warmup()
        bench.run(MODE, make_prompts(model.config.vocab_size, max(contexts), 1), 1)  # fills the cache
    cases = measure(engines, contexts, prompts, args.rounds)
    record = {
        "suite": "cpu_operators",
        "run": describe_run("python benchmarks/cpu_operators.py"),
        "environment": describe_environment(torch.device("cpu")),
        "model": args.model,
        "cases": cases,
    }
    print(as_text(cases))
    write_json(record, args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
