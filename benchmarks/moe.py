"""Decoding speed of a mixture of experts, beside dense models of its active and of all its parameters.

    python benchmarks/moe.py --output benchmarks/results/moe.json

Layers of the 30B-A3B model with 8 routed experts per token and a growing number of experts, beside two dense models:
one with as many parameters as are active per token, one with as many as the mixture has. Random weights, a small
vocabulary, one request. A round is one reply of each of the three, with the read bandwidth measured around each. First,
each model's tokens are compared with the logits of the same (quantized) model without a cache; the exit status is 1 if
they are wrong.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path

import torch
from tables import moe_rows

from qwen3fast.bench.environment import describe_environment, describe_run
from qwen3fast.bench.harness import Harness, Measurement, Task, interruptible
from qwen3fast.bench.measure import Workbench, make_prompts
from qwen3fast.bench.options import counts
from qwen3fast.bench.plot import save
from qwen3fast.bench.probes import BandwidthProbe
from qwen3fast.bench.record import Case, Label, Record, write_json
from qwen3fast.bench.table import as_text
from qwen3fast.bench.view import picture
from qwen3fast.checkpoint.random_weights import random_model
from qwen3fast.model import Qwen3
from qwen3fast.model.config import ModelConfig
from qwen3fast.quantization.convert import quantize_experts, quantize_model

FORMATS = ("bf16", "int8", "int4")
MODE = "cached-compiled"
VOCABULARY, PROMPT_TOKENS, CHECKED_TOKENS = 4096, 32, 12
MODELS = ("experts", "dense_active", "dense_all")  # the mixture; dense models of its active, of all its parameters


def config_of(model: str, num_experts: int, layers: int) -> ModelConfig:
    """Return the shape of one of MODELS."""
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
    """Build a model of random weights in a format, and its engine."""
    cpu = torch.device("cpu")
    if format == "bf16":
        return Workbench(random_model(config, cpu, torch.bfloat16), (MODE,), longest, 1)

    def quantize_layer(model: Qwen3, name: str) -> None:  # at once: not all layers are in memory unquantized
        quantize_experts(model, format, name.rpartition(".")[0])

    model = random_model(config, cpu, torch.bfloat16, 0, quantize_layer)
    quantize_model(model, format, torch.bfloat16)
    return Workbench(model, (MODE,), longest, 1)


def tasks_of(args: argparse.Namespace, format: str, num_experts: int, record: Record) -> list[Task]:
    """Return tasks of the three models in one format. Raises: SystemExit if their tokens are wrong."""
    longest = PROMPT_TOKENS + args.new_tokens + 1
    prompts = make_prompts(VOCABULARY, PROMPT_TOKENS, 1)
    tasks = []
    for name in MODELS:
        bench = build(config_of(name, num_experts, args.layers), format, longest)
        check = bench.check(bench.run(MODE, prompts, CHECKED_TOKENS), prompts)  # also compiles
        labels: dict[str, Label] = {"model": name, "format": format, "num_experts": num_experts}
        record.checks[", ".join(map(str, labels.values()))] = asdict(check) | {"passed": check.passed}
        if not check.passed:
            raise SystemExit(f"{format}, {num_experts} experts, {name}: wrong tokens, {check}")
        config = bench.model.config
        facts = {"parameters": config.num_parameters, "read_parameters": config.decode_parameters}
        facts["bytes_per_step"] = bench.model.num_bytes(per_token=True)
        tasks.append(Task(Case(labels, facts), partial(reply, bench, prompts, args.new_tokens)))
    return tasks


def reply(bench: Workbench, prompts: list[list[int]], new_tokens: int) -> Measurement:
    """Time one reply."""
    return {"step_s": bench.run(MODE, prompts, new_tokens + 1).step_s}


def parse() -> argparse.Namespace:
    """Return the checked options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default=",".join(FORMATS), help="comma-separated [%(default)s]")
    parser.add_argument("--experts", type=counts, default="32,64,128", help="per layer [%(default)s]")
    parser.add_argument("--layers", type=int, default=2, help="[%(default)s]")
    parser.add_argument("--rounds", type=int, default=7, help="[%(default)s]")
    parser.add_argument("--new-tokens", type=int, default=24, help="timed per reply [%(default)s]")
    parser.add_argument("--threads", type=int, help="CPU threads [PyTorch's choice]")
    parser.add_argument("--output", type=Path, default=Path("bench_results/moe.json"), help="[%(default)s]")
    args = parser.parse_args()
    args.formats = args.formats.split(",")
    if unknown := set(args.formats) - set(FORMATS):
        parser.error(f"unknown format {', '.join(unknown)}; known: {', '.join(FORMATS)}")
    per_token = ModelConfig.named("30b-a3b").num_experts_per_tok
    if min(args.experts) < per_token:
        parser.error(f"--experts must be at least {per_token}, the number of routed experts per token")
    return args


def main() -> int:
    """Measure, print and write. Returns: the exit status."""
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    cpu = torch.device("cpu")
    model = {"name": f"{args.layers} layers of random:30b-a3b, vocabulary {VOCABULARY}"}
    record = Record("moe", describe_run("python benchmarks/moe.py"), describe_environment(cpu), model)
    probe = BandwidthProbe(cpu)
    harness = Harness(record, [lambda: {"bandwidth_gb_s": probe.measure()}])
    shapes = list(product(args.formats, args.experts))
    harness.progress.expect(float(len(shapes) * len(MODELS) * (1 + args.rounds)))
    with interruptible(record):
        for format, num_experts in shapes:
            tasks = tasks_of(args, format, num_experts, record)
            harness.measure(tasks, args.rounds, f"{format}, {num_experts} experts")
    harness.finish()
    record.cases = [case for case in record.cases if case.samples]
    write_json(record.to_dict(), args.output)
    print(as_text(moe_rows(record), left=1))
    if record.cases:
        save(picture(record), args.output.with_suffix(".png"))
    print(f"wrote {args.output}")
    return 130 if record.interrupted else 0


if __name__ == "__main__":
    raise SystemExit(main())
