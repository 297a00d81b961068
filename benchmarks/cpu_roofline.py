"""Decode speed of every weight format against the memory's speed, and prefill speed against the matrix product's.

    python benchmarks/cpu_roofline.py --output benchmarks/results/cpu-roofline.json

A round is one reply of every case (context, batch size, format), the formats in turns, the read bandwidth measured
before each; rounds repeat. A machine that others slow down for a while then slows down all cases alike. The limit of a
case is bandwidth / bytes that one step must read: the weights (a tied output projection counts, an embedding that is
only looked up does not) and the keys and values of the positions in use. A format is that of the weights; with "-kv8"
keys and values are int8, otherwise bfloat16. First of all each format's tokens are held
against the logits of the same rounded model, computed plainly without a cache. Writes JSON and a PNG; exit status 1 if
a format's tokens are wrong.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.utils import tqdm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from qwen3fast import load_model
from qwen3fast.bench.environment import describe_environment, describe_run
from qwen3fast.bench.measure import Workbench, make_prompts
from qwen3fast.bench.plot import FAINT, INK
from qwen3fast.bench.probes import BandwidthProbe
from qwen3fast.bench.record import write_json

FORMATS = ("bf16", "int8", "int4", "int8-kv8", "int4-kv8")
COLORS = {"bf16": "#0b6e99", "int8": "#c2410c", "int4": "#4d7c0f", "int8-kv8": "#e8956d", "int4-kv8": "#97b86a"}
MODE = "cached-compiled"


def gemm_rate(repetitions: int = 5) -> float:
    """FLOP/s of a large bfloat16 product of the library, (512, 1024) by (1024, 3072): the yardstick of prefill."""
    x, weight = torch.randn(512, 1024).bfloat16(), torch.randn(3072, 1024).bfloat16()
    rates = []
    for _ in range(repetitions):
        started = time.perf_counter()
        for _ in range(8):
            F.linear(x, weight)
        rates.append(8 * 2 * x.numel() * weight.shape[0] / (time.perf_counter() - started))
    return median(rates)


def bytes_per_step(bench: Workbench, context: float, batch_size: int) -> int:
    """What one decode step must read: weights once, keys and values of each row."""
    config = bench.model.config
    kv_cache = config.kv_bytes_per_token(bench.cache_dtype) * context * batch_size
    return bench.model.num_bytes(per_token=True) + int(kv_cache)


def measure(args: argparse.Namespace, benches: dict[str, Workbench]) -> list[dict[str, Any]]:
    """All cases, every sample kept."""
    probe = BandwidthProbe(torch.device("cpu"))
    shapes = [(context, 1) for context in args.contexts] + [(args.contexts[0], n) for n in args.batch_sizes if n > 1]
    vocabulary = next(iter(benches.values())).model.config.vocab_size
    cases = {}
    for (context, batch_size), (name, bench) in product(shapes, benches.items()):
        bench.run(MODE, make_prompts(vocabulary, args.contexts[0], batch_size), 2)  # compiles
        step_bytes = bytes_per_step(bench, context + args.new_tokens / 2, batch_size)
        empty: dict[str, list[float]] = {"step_s": [], "ttft_s": [], "bandwidth_gb_s": [], "gemm_flop_s": []}
        shape = {"format": name, "context": context, "batch_size": batch_size}
        cases[context, batch_size, name] = {**shape, "step_bytes": step_bytes, **empty}
    bar = tqdm(total=len(cases) * args.rounds, desc="measuring", unit="reply")
    for _, ((context, batch_size, name), case) in product(range(args.rounds), cases.items()):
        bar.set_postfix_str(f"{name}, context {context}, batch {batch_size}")
        probe.samples.clear()
        probe.measure(3)
        sample = benches[name].run(MODE, make_prompts(vocabulary, context, batch_size), args.new_tokens + 1)
        probe.measure(3)
        case["bandwidth_gb_s"].append(probe.gb_s)
        case["gemm_flop_s"].append(gemm_rate(3))
        case["step_s"].append(median(sample.step_s))
        case["ttft_s"].append(sample.ttft_s)
        bar.update()
    bar.close()
    return [with_metrics(case, next(iter(benches.values()))) for case in cases.values()]


def with_metrics(case: dict[str, Any], bench: Workbench) -> dict[str, Any]:
    """Medians over the rounds; shares are taken round by round, with the bandwidth measured around each."""
    gb_s = [case["step_bytes"] / s / 1e9 for s in case["step_s"]]
    config, tokens = bench.model.config, case["context"] * case["batch_size"]
    # Two operations a weight and token; the output projection runs for one token only, attention is left out.
    flop = 2 * (config.decode_parameters - config.vocab_size * config.hidden_size) * tokens
    return {
        **case,
        "decode_tok_s": case["batch_size"] / median(case["step_s"]),
        "gb_s": median(gb_s),
        "share_of_bandwidth": median(a / b for a, b in zip(gb_s, case["bandwidth_gb_s"], strict=True)),
        "limit_tok_s": case["batch_size"] * median(case["bandwidth_gb_s"]) * 1e9 / case["step_bytes"],
        "prefill_tok_s": tokens / median(case["ttft_s"]),
        "prefill_share_of_gemm": median(
            flop / s / rate for s, rate in zip(case["ttft_s"], case["gemm_flop_s"], strict=True)
        ),
    }


def plot(record: dict[str, Any], path: Path) -> None:
    """Measured speed (lines) under the limit (dashes) against context, one colour a format."""
    figure = Figure(figsize=(9.0, 5.8))
    axes = figure.add_axes((0.08, 0.14, 0.72, 0.68))
    singles = [case for case in record["cases"] if case["batch_size"] == 1]
    contexts = sorted({case["context"] for case in singles})
    axes.set_yscale("log")
    labels = []
    for name in dict.fromkeys(case["format"] for case in singles):
        points = sorted((c["context"], c["decode_tok_s"], c["limit_tok_s"]) for c in singles if c["format"] == name)
        x, speed, limit = zip(*points, strict=True)
        axes.plot(x, speed, color=COLORS[name], marker="o", linewidth=2)
        axes.plot(x, limit, color=COLORS[name], linestyle=(0, (4, 3)), linewidth=1.3)
        share = " ".join(f"{c['share_of_bandwidth']:.0%}" for c in singles if c["format"] == name)
        labels.append((speed[-1], name, share))
    low, high = axes.get_ylim()
    previous = 0.0
    for y, name, share in sorted(labels):  # not closer than their height
        previous = max(y, previous * (high / low) ** 0.11)
        axes.annotate(
            f"{name}\n{share}", (contexts[-1], previous), xytext=(10, 0), textcoords="offset points", va="center",
            color=COLORS[name], size=10,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [f"{n:,}" for n in contexts])
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()
    axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("positions in the KV cache", color=INK)
    axes.set_ylabel("tokens per second, one request", color=INK)
    figure.text(0.08, 0.93, "Decoding against the memory's speed", size=15, weight="bold", color=INK)
    subtitle = "lines: measured; dashes: read bandwidth / bytes a token must read; right: shares of the limit"
    figure.text(0.08, 0.88, f"{record['model']}: {subtitle}", size=10, color=FAINT)
    environment = record["environment"]
    where = f"{environment['cpu']}, {environment['threads']} threads; reads at {record['bandwidth_gb_s']:.0f} GB/s"
    figure.text(0.08, 0.02, f"{where}; torch {environment['torch']}", size=8.5, color=FAINT)
    figure.savefig(path, dpi=160, facecolor="white")


def as_text(record: dict[str, Any]) -> str:
    """A table of all cases."""
    lines = [f"{'format':7}{'context':>8}{'batch':>6}{'decode tok/s':>14}{'GB/s':>7}{'share':>7}{'prefill tok/s':>15}"]
    for c in record["cases"]:
        lines.append(
            f"{c['format']:7}{c['context']:8,}{c['batch_size']:6}{c['decode_tok_s']:14.1f}{c['gb_s']:7.1f}"
            f"{c['share_of_bandwidth']:7.0%}{c['prefill_tok_s']:15.0f}"
        )
    return "\n".join(lines)


def counts(text: str) -> list[int]:
    """An option's comma-separated positive numbers. Raises: ValueError, which argparse reports."""
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 1:
        raise ValueError(text)
    return numbers


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random:0.6b", help="[%(default)s]")
    parser.add_argument("--formats", default=",".join(FORMATS), help="comma-separated [%(default)s]")
    parser.add_argument("--contexts", type=counts, default="32,256,1024,4000", help="prompt lengths [%(default)s]")
    parser.add_argument("--batch-sizes", type=counts, default="1,2,4,8", help="at the first context [%(default)s]")
    parser.add_argument("--rounds", type=int, default=5, help="[%(default)s]")
    parser.add_argument("--new-tokens", type=int, default=16, help="timed in each reply [%(default)s]")
    parser.add_argument("--threads", type=int, help="CPU threads [PyTorch's choice]")
    parser.add_argument("--output", type=Path, default=Path("bench_results/cpu-roofline.json"), help="[%(default)s]")
    args = parser.parse_args()
    formats = args.formats.split(",")
    if unknown := set(formats) - set(FORMATS):
        parser.error(f"unknown format {', '.join(unknown)}; known: {', '.join(FORMATS)}")
    if args.threads:
        torch.set_num_threads(args.threads)
    longest = max(args.contexts) + args.new_tokens + 1
    benches, models = {}, {}
    for name in formats:
        weights, _, cache = name.partition("-")
        if weights not in models:
            quantization = None if weights == "bf16" else weights
            models[weights] = load_model(args.model, "cpu", quantization=quantization, progress=True)
        kv_cache_dtype = "int8" if cache else "auto"
        benches[name] = Workbench(models[weights], (MODE,), longest, max(args.batch_sizes), kv_cache_dtype)
    prompts = make_prompts(next(iter(benches.values())).model.config.vocab_size, 40, 1, seed=1)
    checks = {name: bench.check(bench.run(MODE, prompts, 12), prompts) for name, bench in benches.items()}
    for name, check in checks.items():
        verdict = "ok" if check.passed else "WRONG"
        print(f"{name}: {check.exact} of {check.tokens} tokens exact, worst gap {check.worst_gap:.2%}: {verdict}")
    if not all(check.passed for check in checks.values()):
        raise SystemExit(1)
    cases = measure(args, benches)
    record = {
        "suite": "cpu_roofline",
        "run": describe_run("python benchmarks/cpu_roofline.py"),
        "environment": describe_environment(torch.device("cpu")),
        "model": args.model,
        "bandwidth_gb_s": median(sample for case in cases for sample in case["bandwidth_gb_s"]),
        "gemm_flop_s": median(sample for case in cases for sample in case["gemm_flop_s"]),
        "checks": {name: asdict(check) for name, check in checks.items()},
        "cases": cases,
    }
    print(as_text(record))
    write_json(record, args.output)
    plot(record, args.output.with_suffix(".png"))
    print(f"wrote {args.output} and {args.output.with_suffix('.png')}")


if __name__ == "__main__":
    main()
