"""Does a token of a mixture of experts cost what it runs, or what the model holds?

    python benchmarks/moe.py --output benchmarks/results/moe.json

Layers of the 30B-A3B model with more and more experts, of which a token always runs 8, beside two dense models: one
with as many parameters as such a token runs, one with as many as the mixture has in all. Random weights, a small
vocabulary; one request. A round is one reply of each of the three, the read bandwidth measured before it; rounds
repeat, so that a machine that others slow down for a while slows down all three. First of all each model's tokens are
held against the logits of the same (rounded) model, computed plainly without a cache; exit status 1 if they are wrong.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from huggingface_hub.utils import tqdm

from qwen3fast.bench.environment import BandwidthProbe, describe_environment, describe_run
from qwen3fast.bench.measure import Workbench, make_prompts
from qwen3fast.bench.record import write_json
from qwen3fast.checkpoint import random_model
from qwen3fast.config import ModelConfig
from qwen3fast.quantization import quantize_experts, quantize_model

FORMATS = ("bf16", "int8", "int4")
MODE = "cached-compiled"
VOCABULARY, PROMPT_TOKENS, CHECKED_TOKENS = 4096, 32, 12
MODELS = ("experts", "dense_active", "dense_all")  # the mixture; dense, as many parameters active; as many in all


def config_of(model: str, num_experts: int, layers: int) -> ModelConfig:
    """The shape of one of MODELS."""
    mixture = replace(
        ModelConfig.named("30b-a3b"), vocab_size=VOCABULARY, num_hidden_layers=layers, num_experts=num_experts
    )
    if model == "experts":
        return mixture
    experts = mixture.num_experts_per_tok if model == "dense_active" else num_experts
    return replace(
        mixture, intermediate_size=experts * mixture.moe_intermediate_size, num_experts=0, num_experts_per_tok=0
    )


def build(config: ModelConfig, format: str, longest: int) -> Workbench:
    """A model of random weights in a format, and its engine."""
    cpu = torch.device("cpu")
    if format == "bf16":
        return Workbench(random_model(config, cpu, torch.bfloat16), (MODE,), longest, 1)

    def round_experts(model, name):  # at once, so that not all layers are in memory as they were
        quantize_experts(model, format, name.rpartition(".")[0])

    model = random_model(config, cpu, torch.bfloat16, 0, round_experts)
    quantize_model(model, format, torch.bfloat16)
    return Workbench(model, (MODE,), longest, 1)


def measure(args: argparse.Namespace, format: str, num_experts: int, probe: BandwidthProbe) -> dict[str, Any]:
    """The three models in one format, every sample kept."""
    longest = PROMPT_TOKENS + args.new_tokens + 1
    benches = {name: build(config_of(name, num_experts, args.layers), format, longest) for name in MODELS}
    prompts = make_prompts(VOCABULARY, PROMPT_TOKENS, 1)
    models: dict[str, dict[str, Any]] = {}
    for name, bench in benches.items():
        check = bench.check(bench.run(MODE, prompts, CHECKED_TOKENS), prompts)  # compiles, too
        if not check.passed:
            raise SystemExit(f"{format}, {num_experts} experts, {name}: wrong tokens, {check}")
        config = bench.model.config
        models[name] = {
            "parameters": config.num_parameters,
            "read_parameters": config.decode_parameters,
            "read_bytes": bench.model.num_bytes(per_token=True),
            "check": asdict(check),
            "step_s": [],
        }
    first = len(probe.samples)
    for _ in range(args.rounds):
        probe.measure(2)
        for name, bench in benches.items():
            sample = bench.run(MODE, prompts, args.new_tokens + 1)
            models[name]["step_s"].append(median(sample.step_s))
    return with_ratios(
        {
            "format": format,
            "num_experts": num_experts,
            "experts_per_token": benches["experts"].model.config.num_experts_per_tok,
            "bandwidth_gb_s": probe.samples[first:],
            "models": models,
        }
    )


def with_ratios(case: dict[str, Any]) -> dict[str, Any]:
    """Medians over the rounds; ratios are taken round by round."""
    models = case["models"]
    for model in models.values():
        model["step_ms"] = median(model["step_s"]) * 1e3
        model["gb_s"] = model["read_bytes"] / median(model["step_s"]) / 1e9

    def ratio(a: str, b: str) -> float:
        return median(x / y for x, y in zip(models[a]["step_s"], models[b]["step_s"], strict=True))

    return {
        **case,
        "experts_over_dense_active": ratio("experts", "dense_active"),
        "dense_all_over_experts": ratio("dense_all", "experts"),
    }


def as_text(record: dict[str, Any]) -> str:
    """A line for each case."""
    lines = ["milliseconds a step: mixture, dense with as many active, dense with as many in all parameters"]
    for case in record["cases"]:
        steps = "".join(f"{case['models'][name]['step_ms']:9.3f}" for name in MODELS)
        shares = f"{case['experts_over_dense_active']:.2f} of active, 1/{case['dense_all_over_experts']:.1f} of all"
        lines.append(f"{case['format']:6}{case['num_experts']:4} experts{steps}   {shares}")
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
    parser.add_argument("--formats", default=",".join(FORMATS), help="comma-separated [%(default)s]")
    parser.add_argument("--experts", type=counts, default="32,64,128", help="in each layer [%(default)s]")
    parser.add_argument("--layers", type=int, default=2, help="[%(default)s]")
    parser.add_argument("--rounds", type=int, default=7, help="[%(default)s]")
    parser.add_argument("--new-tokens", type=int, default=24, help="timed in each reply [%(default)s]")
    parser.add_argument("--threads", type=int, help="CPU threads [PyTorch's choice]")
    parser.add_argument("--output", type=Path, default=Path("bench_results/moe.json"), help="[%(default)s]")
    args = parser.parse_args()
    formats = args.formats.split(",")
    if unknown := set(formats) - set(FORMATS):
        parser.error(f"unknown format {', '.join(unknown)}; known: {', '.join(FORMATS)}")
    per_token = ModelConfig.named("30b-a3b").num_experts_per_tok
    if min(args.experts) < per_token:
        parser.error(f"a token runs {per_token} experts; there must be as many")
    if args.threads:
        torch.set_num_threads(args.threads)
    probe = BandwidthProbe(torch.device("cpu"))
    bar = tqdm(list(product(formats, args.experts)), desc="measuring", unit="case")
    cases = [measure(args, format, num_experts, probe) for format, num_experts in bar]
    record = {
        "suite": "moe",
        "run": describe_run("python benchmarks/moe.py"),
        "environment": describe_environment(torch.device("cpu")),
        "model": f"{args.layers} layers of random:30b-a3b, vocabulary {VOCABULARY}",
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": args.new_tokens,
        "bandwidth_gb_s": probe.gb_s,
        "cases": cases,
    }
    print(as_text(record))
    write_json(record, args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
