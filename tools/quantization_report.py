"""The cost of quantization: error of each layer, perplexity, and accuracy on tasks, for each format.

    python tools/quantization_report.py --output benchmarks/results/quantization-tiny.json

Errors are relative: |quantized - exact| / |exact| over all elements. "weight_error" compares a layer's weights,
"output_error" its output on real inputs, with activations quantized as the layer does it. Formats that end in "-kv8"
have int8 keys and values: keys, values and attention's output are compared, block by block. "logit_error" compares the
whole model's logits over all positions of a random prompt.
"int4-head8" has output projection and embedding in int8, which the package does not offer.
Perplexity and accuracy need a trained model: the tasks are the ones that tiny was trained on (tools/tiny_tasks.py),
answered greedily by the Generator. Other models get the table of layers only.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from pathlib import Path

import tiny_tasks
import torch
import torch.nn.functional as F
from quantization_errors import cache_errors, error_cases, layer_errors, model_case
from tokenizers import Tokenizer
from tqdm import tqdm
from train_tiny import encode, pad

from qwen3fast import Generator, SamplingParams, load_model
from qwen3fast.bench.environment import describe_environment, describe_run
from qwen3fast.bench.harness import interruptible
from qwen3fast.bench.noise import noise_of
from qwen3fast.bench.record import Case, Record, write_json
from qwen3fast.bench.suites.quantization import logits_through_cache
from qwen3fast.bench.table import as_text
from qwen3fast.checkpoint.source import TINY_FOLDER, resolve_source
from qwen3fast.model import Qwen3
from qwen3fast.quantization.formats import FORMATS, quantize
from qwen3fast.quantization.layers import QuantizedEmbedding, QuantizedLinear, fit_scales
from qwen3fast.text.tokenizer import Tokenizer as OurTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import tables

TASKS = {
    "addition": lambda rng: tiny_tasks.addition(rng, held_out=True),
    "copying": tiny_tasks.copying,
    "reversing": tiny_tasks.reversing,
    "lookup at 300 tokens": lambda rng: tiny_tasks.lookup(rng, 275),
    "lookup at 2000 tokens": lambda rng: tiny_tasks.lookup(rng, 1900),
}


@torch.no_grad()
def perplexity(model: Qwen3, count: int, kv_cache_dtype: str) -> float:
    """Return exp of the mean cross-entropy of the answers' tokens, over `count` examples of each task."""
    rng, tokenizer = random.Random(2), Tokenizer.from_file(str(TINY_FOLDER / "tokenizer.json"))
    total, tokens = 0.0, 0
    for make in TASKS.values():
        for _ in range(count):
            ids, labels = pad([encode(tokenizer, make(rng), thinking=False)])
            logits = logits_through_cache(model, ids[0], kv_cache_dtype)[:-1]
            chosen = labels[0, 1:] >= 0
            total += float(F.cross_entropy(logits[chosen], labels[0, 1:][chosen], reduction="sum"))
            tokens += int(chosen.sum())
    return math.exp(total / tokens)


def accuracy(generator: Generator, count: int) -> dict[str, float]:
    """Return the share of examples that greedy decoding answers exactly."""
    results = {}
    for name, make in TASKS.items():
        rng = random.Random(1)
        examples = [make(rng) for _ in range(count)]
        prompts = [
            generator.tokenizer.apply_chat_template(
                [{"role": "user", "content": e.messages[0][1]}], enable_thinking=False, tokenize=True
            )
            for e in examples
        ]
        replies = generator.generate(prompts, SamplingParams(temperature=0, max_tokens=60))
        right = sum(r.text == e.messages[1][1] for r, e in zip(replies, examples, strict=True))
        results[name] = right / count
    return results


def with_head_in_8_bits(model: Qwen3, exact: Qwen3) -> Qwen3:
    """Return the same quantized model with output projection and embedding in int8."""
    format = FORMATS["int8"]
    model.lm_head = QuantizedLinear(quantize(exact.lm_head.weight, format), format)
    model.model.embed_tokens = QuantizedEmbedding(model.lm_head, exact.config.dtype)
    return model


def task_cases(format: str, model: Qwen3, tokenizer: OurTokenizer, cache_dtype: str, examples: int) -> list[Case]:
    """Return a case per task, with the accuracy."""
    with Generator(model, tokenizer, max_batch_size=8, kv_cache_dtype=cache_dtype) as generator:
        shares = accuracy(generator, examples)
    facts = {"examples": float(examples)}
    return [Case({"format": format, "what": task}, facts, {"accuracy": [share]}) for task, share in shares.items()]


def measure(args: argparse.Namespace, record: Record) -> None:
    """Measure all formats, each with both caches."""
    exact = load_model(args.model, "cpu")
    tokens = torch.randint(exact.config.vocab_size, (1, 256), generator=torch.Generator().manual_seed(0))
    exact_logits = logits_through_cache(exact, tokens[0], "auto")
    tokenizer = None if args.model.startswith("random:") else OurTokenizer.from_folder(resolve_source(args.model))
    on_cpu = [format.name for format in FORMATS.values() if "cpu" in format.devices]
    for weights in tqdm(["bf16", *on_cpu, "int4-head8"], desc="formats"):
        quantization = None if weights == "bf16" else weights.removesuffix("-head8")
        model = (
            exact if quantization is None else load_model(args.model, "cpu", quantization=quantization, calibrate=False)
        )
        if weights.endswith("-head8"):
            model = with_head_in_8_bits(model, exact)
        if quantization is not None:
            record.cases += error_cases(weights, "layer", layer_errors(exact, model, tokens))
            fit_scales(model)  # as engines do, before bytes are counted
        for name, cache_dtype in ((weights, "auto"), (f"{weights}-kv8", "int8")):
            if cache_dtype == "int8":
                record.cases += error_cases(name, "cache", cache_errors(model, tokens))
            case = model_case(name, model, tokens, cache_dtype, exact_logits)
            record.cases.append(case)
            if args.model == "tiny" and tokenizer is not None:
                case.add({"perplexity": perplexity(model, args.examples // 10, cache_dtype)})
                record.cases += task_cases(name, model, tokenizer, cache_dtype, args.examples)


def main() -> int:
    """Measure, print and write. Returns: the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="[%(default)s]")
    parser.add_argument("--examples", type=int, default=200, help="of each task [%(default)s]")
    parser.add_argument("--output", type=Path, default=Path("bench_results/quantization.json"), help="[%(default)s]")
    args = parser.parse_args()
    if args.examples < 10:
        parser.error("--examples must be at least 10: perplexity takes a tenth of them")
    run = describe_run("python tools/quantization_report.py")
    environment = describe_environment(torch.device("cpu"))
    record = Record("quantization-tiny", run, environment, {"name": args.model})
    with interruptible(record):
        measure(args, record)
    record.noise = noise_of(record)
    write_json(record.to_dict(), args.output)
    print(as_text(tables.quantization_rows(record), left=1))
    print(f"wrote {args.output}")
    return 130 if record.interrupted else 0


if __name__ == "__main__":
    raise SystemExit(main())
