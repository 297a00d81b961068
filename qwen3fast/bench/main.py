"""The benchmark as a program: options, the order of measurements, and where results go."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from huggingface_hub.utils import tqdm

from qwen3fast.bench.environment import BandwidthProbe, PeakMemory, describe_environment, describe_run
from qwen3fast.bench.measure import MODES, Workbench, is_cached, is_compiled, make_prompts
from qwen3fast.bench.plot import plot_record
from qwen3fast.bench.record import Case, Record, write_json
from qwen3fast.bench.table import as_text, table_rows
from qwen3fast.checkpoint import load_model
from qwen3fast.config import DTYPES, ModelConfig
from qwen3fast.kv_cache import CACHE_DTYPES
from qwen3fast.quantization.formats import FORMATS
from qwen3fast.threads import use_threads

CHECK_LENGTH, CHECK_TOKENS = 40, 12
UNCACHED_TOKENS = 3


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the benchmark to a parser."""
    add = parser.add_argument
    add("--model", default="random:0.6b", help="hub id, folder, 'tiny' or 'random:SIZE' [%(default)s]")
    add("--modes", type=_modes, default=MODES, help=f"comma-separated, of {', '.join(MODES)} [all]")
    add("--lengths", type=_counts, help="prompt lengths, comma-separated [32,128,512,1024]")
    add("--batch-sizes", type=_counts, default=(1,), help="rows decoded together, comma-separated [1]")
    add("--new-tokens", type=_count, help=f"tokens to time after the first, a repetition [24; uncached at most "
        f"{UNCACHED_TOKENS}]")  # fmt: skip
    add("--repetitions", type=_count, help="rounds over all modes, alternating [3]")
    add("--dtype", choices=["auto", *DTYPES], default="auto", help="[%(default)s: the checkpoint's]")
    add("--quantization", choices=list(FORMATS), help="round the weights while loading")
    add("--kv-cache-dtype", choices=CACHE_DTYPES, default="auto", help="int8 rounds keys and values [%(default)s]")
    add("--threads", type=_count, help="CPU threads [one a core]")
    add("--device", default="auto", help="auto, cpu, cuda, ... [%(default)s]")
    add("--quick", action="store_true", help="a look in under a minute: lengths 32,256, one repetition")
    add("--output", type=Path, default=Path("bench_results"), help="folder for the JSON and the PNG [%(default)s]")
    add("--json", action="store_true", help="print the record as JSON instead of the table")


def run_bench(args: argparse.Namespace) -> int:
    """Measure, print, and write. Returns the exit status: 0, 1 if modes disagree on tokens, 130 after Ctrl-C."""
    lengths = args.lengths or ((32, 256) if args.quick else (32, 128, 512, 1024))
    new_tokens = args.new_tokens or (8 if args.quick else 24)
    repetitions = args.repetitions or (1 if args.quick else 3)
    use_threads(args.threads)
    show = not args.json
    if show:
        print(f"loading {args.model} ...", file=sys.stderr)
    model = load_model(args.model, args.device, args.dtype, quantization=args.quantization)
    longest = max(*lengths, CHECK_LENGTH) + max(new_tokens, CHECK_TOKENS) + 1
    if longest > model.config.longest_context:
        raise ValueError(
            f"length {max(lengths)} + {new_tokens} new tokens exceeds this model's "
            f"{model.config.longest_context} positions; choose smaller --lengths"
        )
    bench = Workbench(model, args.modes, longest, max(args.batch_sizes), args.kv_cache_dtype)
    record = Record(
        describe_run(), describe_environment(bench.device), _describe_model(args.model, model.config, bench)
    )
    probe = BandwidthProbe(bench.device)
    try:
        _measure(bench, record, probe, args.modes, lengths, args.batch_sizes, new_tokens, repetitions)
    except KeyboardInterrupt:
        record.interrupted = True
        print("\ninterrupted; keeping what was measured", file=sys.stderr)
    if not probe.samples:
        probe.measure()
    record.bandwidth_gb_s, record.bandwidth_samples_gb_s = probe.gb_s, probe.samples
    return _finish(record, args)


def _measure(
    bench: Workbench,
    record: Record,
    probe: BandwidthProbe,
    modes: tuple[str, ...],
    lengths: tuple[int, ...],
    batch_sizes: tuple[int, ...],
    new_tokens: int,
    repetitions: int,
) -> None:
    config = bench.model.config
    memory = PeakMemory(bench.device)
    bar = tqdm(
        total=len(modes) * (len(batch_sizes) + len(lengths) * len(batch_sizes) * repetitions),
        desc="measuring",
        unit="run",
    )
    try:
        for batch_size in batch_sizes:
            # Compiles what this batch size needs, and checks the tokens before anything is timed.
            for mode in modes:
                bar.set_postfix_str(f"{mode}, batch {batch_size}: compiling, checking")
                prompts = make_prompts(config.vocab_size, CHECK_LENGTH, batch_size, seed=1)
                started = time.perf_counter()
                bench.run(mode, prompts, 2)
                if is_compiled(mode):
                    record.compile_s[f"{mode}, batch {batch_size}"] = time.perf_counter() - started
                check = bench.check(bench.run(mode, prompts, CHECK_TOKENS), prompts)
                record.checks[f"{mode}, batch {batch_size}"] = check
                bar.update()
            for length in lengths:
                cases = {mode: _new_case(bench, mode, length, batch_size, new_tokens) for mode in modes}
                record.cases += cases.values()
                prompts = make_prompts(config.vocab_size, length, batch_size)
                for _ in range(repetitions):
                    probe.measure(3)
                    for mode, case in cases.items():
                        bar.set_postfix_str(f"{mode}, context {length}, batch {batch_size}")
                        memory.reset()
                        count = new_tokens if is_cached(mode) else min(new_tokens, UNCACHED_TOKENS)
                        case.samples.append(bench.run(mode, prompts, count + 1))
                        case.peak_memory_bytes = max(memory.peak_bytes() or 0, case.peak_memory_bytes or 0) or None
                        bar.update()
    finally:
        bar.close()


def _new_case(bench: Workbench, mode: str, length: int, batch_size: int, new_tokens: int) -> Case:
    config = bench.model.config
    weights = bench.model.num_bytes(per_token=True)
    kv_cache = config.kv_bytes_per_token(bench.cache_dtype) * (length + new_tokens // 2) * batch_size
    return Case(mode, length, batch_size, weights + (kv_cache if is_cached(mode) else 0))


def _finish(record: Record, args: argparse.Namespace) -> int:
    """Write the files, print the table, and give the exit status."""
    value = record.to_dict()
    stamp = time.strftime("%Y%m%d-%H%M%S")
    stem = f"{stamp}-{Path(args.model).name.replace(':', '-')}"
    json_path, png_path = args.output / f"{stem}.json", args.output / f"{stem}.png"
    write_json(value, json_path)
    if value["cases"]:
        plot_record(value, png_path)
    if args.json:
        print(json.dumps(value))
    elif value["cases"]:
        print(as_text(table_rows(value)))
        print(f"\nread bandwidth of this machine: {record.bandwidth_gb_s:.1f} GB/s")
        for name, seconds in record.compile_s.items():
            print(f"compiling {name}: {seconds:.1f} s")
    passed = all(check.passed for check in record.checks.values())
    for name, check in record.checks.items():
        exact = f"{check.exact} of {check.tokens} greedy tokens are the reference's argmax"
        verdict = "ok" if check.passed else "WRONG: this mode's speed means nothing"
        print(f"{name}: {exact}, worst gap {check.worst_gap:.2%} of the largest logit: {verdict}", file=sys.stderr)
    print(f"wrote {json_path}" + (f" and {png_path}" if value["cases"] else ""), file=sys.stderr)
    return 130 if record.interrupted else (0 if passed else 1)


def _describe_model(name: str, config: ModelConfig, bench: Workbench) -> dict[str, object]:
    return {
        "name": name,
        "dtype": str(bench.dtype).removeprefix("torch."),
        "parameters": config.num_parameters,
        "quantization": config.quantization,
        "kv_cache_dtype": str(bench.cache_dtype).removeprefix("torch."),
        "weight_bytes": bench.model.num_bytes(),
        "config": config.to_dict() | {"dtype": str(config.dtype)},
    }


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(sorted({_count(part.strip()) for part in text.split(",")}))


def _modes(text: str) -> tuple[str, ...]:
    chosen = {part.strip() for part in text.split(",")}
    for mode in chosen:
        if mode not in MODES:
            raise argparse.ArgumentTypeError(f"unknown mode {mode!r}; known modes: {', '.join(MODES)}")
    return tuple(mode for mode in MODES if mode in chosen)
