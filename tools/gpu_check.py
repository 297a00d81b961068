"""One command for a machine with a GPU: the CUDA tests, then a benchmark of every size that fits.

    python tools/gpu_check.py                              # about 8 minutes; writes benchmarks/results/gpu.json, .png
    python tools/gpu_check.py --device cpu --quick         # the same program on a CPU: shows that it works

Needs no network: weights are random. Modes take turns on the same weights and prompts: "eager"; "compiled";
"graphs" (compiled, each step one CUDA graph); "uncached" (eager, the whole sequence anew for each token); and
transformers with its default cache. Then each weight format, and attention over the used cache (FlexAttention; our
Triton kernel) in the place of SDPA. Sizes as they are have four times a variant's share of the time. The record names
whatever was left out, and why (no time left, no memory). Speed of a step is a median; its share of the memory's speed
counts the bytes that it must read. The tests' output is kept in a .log file. Exit status 1 if tests fail, something
breaks, or a mode gives wrong tokens.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from huggingface_hub.utils import tqdm
from matplotlib.figure import Figure

from qwen3fast import load_model
from qwen3fast.bench.environment import describe_environment, describe_run
from qwen3fast.bench.measure import Sample, check_tokens, make_prompts, run_cached, run_uncached_timed
from qwen3fast.bench.probes import BandwidthProbe
from qwen3fast.bench.record import write_json
from qwen3fast.config import ModelConfig
from qwen3fast.engine import Engine, StepKind
from qwen3fast.engine.cuda_graph import GraphCache
from qwen3fast.kernels import cuda
from qwen3fast.kv_cache import StaticKVCache, free_bytes
from qwen3fast.model import Qwen3
from qwen3fast.quantization.formats import FORMATS

ROOT = Path(__file__).parent.parent
SIZES = ("0.6b", "1.7b", "4b", "8b")
# Batch sizes, and the contexts measured with each, in this order.
SHAPES = ((1, (128, 1024, 8192)), (16, (128, 1024)), (64, (128,)))
QUICK_SHAPES = ((1, (32, 128)), (2, (32,)))
# Of each weight format, and of attention by Triton, in the first and the last size.
VARIANT_SHAPES = ((1, (1024, 8192)), (16, (1024,)))
QUICK_VARIANT_SHAPES = ((1, (32,)),)
MODES = ("eager", "compiled", "graphs")
PLAIN_SHARE = 4  # of the time, for a size as it is, which has all modes; a variant has 1
TESTS_S = 240  # the longest that the tests may take
UNCACHED_LENGTH, UNCACHED_TOKENS = 1024, 3
CHECK_PROMPT, CHECK_TOKENS = 40, 12
COLORS = {"eager": "#9aa5b1", "compiled": "#0b6e99", "graphs": "#c2410c", "transformers": "#4d7c0f"}


class Clock:
    """How much of the time for all is left."""

    def __init__(self, seconds: float) -> None:
        self._end = time.perf_counter() + seconds

    def left(self) -> float:
        """Seconds, negative once it is over."""
        return self._end - time.perf_counter()


def run_tests(device: torch.device, log: Path) -> dict[str, Any]:
    """pytest on the tests of CUDA and of Triton kernels, its output kept in `log`.

    On a machine without a GPU, the former are skipped, the latter run in Triton's interpreter.
    """
    started = time.perf_counter()
    folders = [str(ROOT / "tests" / name) for name in ("gpu", "cuda_static")]
    command = [sys.executable, "-m", "pytest", "-m", "gpu or triton", "-rs", "--durations=5", *folders]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TESTS_S)
    except subprocess.TimeoutExpired:
        return {"exit_status": 124, "summary": f"not done after {TESTS_S} s", "seconds": TESTS_S, "run": True}
    log.write_text(done.stdout + done.stderr, encoding="utf-8")
    summary = done.stdout.strip().splitlines()[-1:] or [done.stderr.strip()[-200:]]
    result = {"exit_status": done.returncode, "summary": summary[0], "seconds": time.perf_counter() - started}
    return result | {"run": device.type == "cuda"}


def launches(engine: Engine, step: Callable[[], object]) -> int | None:
    """Launches from the host (kernels, copies, graphs) during one step on CUDA; None elsewhere."""
    if engine.device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    step()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    counted = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")
    return sum(event.count for event in profiler.key_averages() if event.key.startswith(counted))


@dataclass(frozen=True)
class Variant:
    """What is measured: a model size, its weights' format ("bf16" or a quantisation), whose attention decodes."""

    size: str
    weights: str = "bf16"
    attention: Literal["sdpa", "flex", "split"] = "sdpa"  # see kernels/cuda

    @property
    def is_plain(self) -> bool:
        """Whether it is the size as it is, to be measured in every mode."""
        return self.weights == "bf16" and self.attention == "sdpa"

    def __str__(self) -> str:
        weights = [] if self.weights == "bf16" else [self.weights]
        return ", ".join([self.size, *weights, *([] if self.attention == "sdpa" else [f"{self.attention} attention"])])


class VariantRun:
    """All measurements of one variant."""

    def __init__(self, variant: Variant, args: argparse.Namespace, clock: Clock, probe: BandwidthProbe) -> None:
        self.variant, self.args, self.clock, self.probe = variant, args, clock, probe
        self.device = torch.device(args.device)
        started = time.perf_counter()
        quantization = None if variant.weights == "bf16" else variant.weights
        self.model: Qwen3 = load_model(f"random:{variant.size}", args.device, quantization=quantization)
        self.load_s = time.perf_counter() - started
        self.cases: list[dict[str, Any]] = []
        self.left_out: list[str] = []
        self.errors: list[str] = []
        self._engines: dict[bool, Engine] = {}  # by whether they are compiled
        self._graphs: GraphCache | None = None

    def measure(self, batch_size: int, contexts: tuple[int, ...]) -> None:
        """All modes at one batch size: tokens checked first, then timed in turns."""
        config = self.model.config
        longest = max(*contexts, CHECK_PROMPT) + self.args.new_tokens + 1
        need = config.kv_bytes_per_token(config.dtype) * (longest + 128) * batch_size * 2  # eager's and compiled's
        free = free_bytes(self.device)
        if free is not None and need > 0.8 * free:
            self.left_out.append(f"batch {batch_size}: KV caches need {need / 1e9:.1f} GB of {free / 1e9:.1f} GB free")
            return
        for is_compiled in (False, True):
            cache = StaticKVCache(config, batch_size, longest, config.dtype, self.device)
            self._engines[is_compiled] = Engine(self.model, cache, self.device, compile=is_compiled)
        self._graphs = self._engines[True].graphs
        modes = [mode for mode in MODES if mode != "graphs" or self._graphs is not None]
        if not self.variant.is_plain:
            modes = modes[-1:]  # the fastest alone
        if self._graphs is None:
            self.left_out.append(f"batch {batch_size}, graphs: there are none on {self.device}")

        checked = make_prompts(config.vocab_size, CHECK_PROMPT, batch_size, seed=1)
        checks, first_s = {}, {}
        for mode in modes:
            started = time.perf_counter()
            self._run(mode, checked, 2)  # compiles, records
            first_s[mode] = time.perf_counter() - started
            if mode == "graphs" and self._graphs is not None and self._graphs.failure:
                self.errors.append(f"{self.variant}, batch {batch_size}, graphs: {self._graphs.failure}")
            sample = self._run(mode, checked, CHECK_TOKENS)
            checks[mode] = check_tokens(self.model, checked, sample.token_ids)
        for context in contexts:
            if self.clock.left() < 0:
                self.left_out.append(f"batch {batch_size}, context {context}: no time left")
                continue
            for case in self._measure_case(batch_size, context, modes):
                mode = case["mode"]
                self.cases.append(case | {"first_run_s": first_s[mode], "check": check_as_dict(checks[mode])})
        if self._graphs is not None and self._graphs.failure:  # what was measured as graphs had none
            broken = [c for c in self.cases if c["mode"] == "graphs" and c["batch_size"] == batch_size]
            self.cases = [c for c in self.cases if c not in broken]
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()
        self._graphs = None
        release_memory(self.device)

    def _engine(self, mode: str) -> Engine:
        """The engine of a mode; "compiled" and "graphs" share one."""
        engine = self._engines[mode != "eager"]
        engine.graphs = self._graphs if mode == "graphs" else None
        return engine

    def _run(self, mode: str, prompts: list[list[int]], new_tokens: int) -> Sample:
        return run_cached(self._engine(mode), prompts, new_tokens)

    def _measure_case(self, batch_size: int, context: int, modes: list[str]) -> list[dict[str, Any]]:
        config, new_tokens = self.model.config, self.args.new_tokens
        prompts = make_prompts(config.vocab_size, context, batch_size)
        samples: dict[str, list[Sample]] = {mode: [] for mode in modes}
        bandwidth = []
        for mode in modes:
            self._run(mode, prompts, 3)  # records what this context's bucket needs
        for _ in range(self.args.rounds):
            self.probe.samples.clear()
            self.probe.measure(3)
            bandwidth.append(self.probe.gb_s)
            for mode in modes:
                samples[mode].append(self._run(mode, prompts, new_tokens + 1))
        kv_bytes = config.kv_bytes_per_token(config.dtype) * (context + new_tokens // 2) * batch_size
        step_bytes = self.model.num_bytes(per_token=True) + kv_bytes
        cases = []
        for mode in modes:
            engine, step_s = self._engine(mode), [median(sample.step_s) for sample in samples[mode]]
            step = partial(engine.decode, batch_size, context + new_tokens, StepKind())
            cases.append(
                {
                    **asdict(self.variant), "mode": mode, "batch_size": batch_size, "context": context,
                    "step_s": step_s, "ttft_s": [sample.ttft_s for sample in samples[mode]],
                    "bandwidth_gb_s": bandwidth, "step_bytes": step_bytes,
                    "decode_tok_s": batch_size / median(step_s),
                    "share_of_bandwidth": step_bytes / median(step_s) / 1e9 / median(bandwidth),
                    "prefill_tok_s": context * batch_size / median(sample.ttft_s for sample in samples[mode]),
                    "launches": launches(engine, step),
                }
            )  # fmt: skip
        return cases

    def measure_uncached(self) -> None:
        """The reference without a cache, eager, one row."""
        length = 64 if self.args.quick else UNCACHED_LENGTH
        cache = StaticKVCache(self.model.config, 1, length + UNCACHED_TOKENS + 2, self.model.config.dtype, self.device)
        engine = Engine(self.model, cache, self.device, compile=False)
        prompts = make_prompts(self.model.config.vocab_size, length, 1)
        run_uncached_timed(engine, prompts, 2)
        sample = run_uncached_timed(engine, prompts, UNCACHED_TOKENS + 1)
        self.cases.append(
            {
                **asdict(self.variant), "mode": "uncached", "batch_size": 1, "context": length, "step_s": sample.step_s,
                "decode_tok_s": 1 / median(sample.step_s),
            }
        )  # fmt: skip

    def measure_transformers(self) -> None:
        """transformers on the same weights with its DynamicCache, one row, token by token."""
        try:
            import transformers

            sys.path.insert(0, str(ROOT / "benchmarks"))
            from compare_transformers import run_transformers, share_weights
        except ImportError as err:
            self.left_out.append(f"transformers: {err}")
            return
        reference = share_weights(self.model)
        for context in (32,) if self.args.quick else (128, 1024):
            [prompt] = make_prompts(self.model.config.vocab_size, context, 1)
            run_transformers(reference, prompt, 3)
            steps = [
                median(run_transformers(reference, prompt, self.args.new_tokens + 1).step_s)
                for _ in range(self.args.rounds)
            ]
            self.cases.append(
                {
                    **asdict(self.variant), "mode": "transformers", "batch_size": 1, "context": context,
                    "step_s": steps, "decode_tok_s": 1 / median(steps), "transformers": transformers.__version__,
                }
            )  # fmt: skip


def variants(sizes: list[str], device: torch.device) -> list[Variant]:
    """Every size as it is; then, in the first and the last of them, what else the device can run."""
    formats = [name for name, format in FORMATS.items() if device.type in format.devices]
    others = [Variant(size, weights=name) for size in dict.fromkeys((sizes[0], sizes[-1])) for name in formats]
    if device.type == "cuda":
        others += [Variant(size, attention="flex") for size in dict.fromkeys((sizes[0], sizes[-1]))]
        others += [Variant(size, attention="split") for size in dict.fromkeys((sizes[0], sizes[-1]))]
    return [Variant(size) for size in sizes] + others


def shapes_of(variant: Variant, quick: bool) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Batch sizes, and the contexts to measure with each."""
    if variant.is_plain:
        return QUICK_SHAPES if quick else SHAPES
    return QUICK_VARIANT_SHAPES if quick else VARIANT_SHAPES


def release_memory(device: torch.device) -> None:
    """Give what is no longer used back to the device, so that it counts as free."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def check_as_dict(check: Any) -> dict[str, Any]:
    """A token check for the record."""
    return {**asdict(check), "passed": check.passed}


def plot(record: dict[str, Any], path: Path) -> None:
    """Decode speed of one request in each mode, a group of bars for each size and context."""
    plain = [c for c in record["cases"] if (c["weights"], c["attention"]) == ("bf16", "sdpa")]
    singles = [c for c in plain if c["batch_size"] == 1 and c["mode"] in COLORS]
    groups = list(dict.fromkeys((c["size"], c["context"]) for c in singles))
    figure = Figure(figsize=(max(7.0, 0.9 * len(groups) + 3), 5.0))
    axes = figure.add_axes((0.09, 0.16, 0.88, 0.66))
    modes = [mode for mode in COLORS if any(c["mode"] == mode for c in singles)]
    for i, mode in enumerate(modes):
        speeds = {(c["size"], c["context"]): c["decode_tok_s"] for c in singles if c["mode"] == mode}
        places = [g + (i - (len(modes) - 1) / 2) * 0.8 / len(modes) for g in range(len(groups))]
        heights = [speeds.get(group, 0.0) for group in groups]
        bars = axes.bar(places, heights, 0.8 / len(modes), color=COLORS[mode], label=mode)
        axes.bar_label(bars, [f"{h:.0f}" if h else "" for h in heights], size=7, color="#3e4c59")
    axes.set_xticks(range(len(groups)), [f"{size}\n{context:,}" for size, context in groups])
    axes.set_ylabel("tokens per second, one request")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=len(modes), loc="upper left", bbox_to_anchor=(0, 1.12))
    environment = record["environment"]
    where = environment.get("gpu") or f"{environment['cpu']}, {environment['threads']} threads"
    figure.text(0.09, 0.94, "Decoding, by model size and context", size=14, weight="bold")
    figure.text(0.09, 0.02, f"{where}; torch {environment['torch']}; random weights", size=8, color="#52606d")
    figure.savefig(path, dpi=150, facecolor="white")


def as_text(record: dict[str, Any]) -> str:
    """A table of all cases and what was left out."""
    columns = f"{'size':6}{'weights':9}{'attention':11}{'mode':14}"
    lines = [f"{columns}{'batch':>6}{'context':>9}{'decode tok/s':>14}{'of bandwidth':>14}{'launches':>10}"]
    for c in record["cases"]:
        share = f"{c['share_of_bandwidth']:.0%}" if "share_of_bandwidth" in c else "-"
        count = str(c.get("launches") or "-")
        shape = f"{c['size']:6}{c['weights']:9}{c['attention']:11}{c['mode']:14}{c['batch_size']:6}{c['context']:9,}"
        lines.append(f"{shape}{c['decode_tok_s']:14.1f}{share:>14}{count:>10}")
    lines += [f"left out: {what}" for what in record["left_out"]]
    return "\n".join(lines + [f"ERROR: {what}" for what in record["errors"]])


def main() -> int:
    """Test, measure, print and write. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="[%(default)s]")
    parser.add_argument("--sizes", default=None, help=f"comma-separated, of {', '.join(SIZES)} [all; --quick: 0.6b]")
    parser.add_argument("--quick", action="store_true", help="one size, short contexts, one round")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all; what no longer fits is left out [8]")
    parser.add_argument("--new-tokens", type=int, default=None, help="timed in each reply [64; --quick: 8]")
    parser.add_argument("--rounds", type=int, default=None, help="[3; --quick: 1]")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder [%(default)s]")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("this PyTorch sees no CUDA device; --device cpu --quick shows that the program works")
    args.new_tokens = args.new_tokens or (8 if args.quick else 64)
    args.rounds = args.rounds or (1 if args.quick else 3)
    sizes = (args.sizes or ("0.6b" if args.quick else ",".join(SIZES))).split(",")
    for size in sizes:
        ModelConfig.named(size)  # refuses unknown names before anything runs
    clock = Clock(60 * args.minutes)
    args.output.mkdir(parents=True, exist_ok=True)
    stem = args.output / ("gpu" if device.type == "cuda" else f"gpu-check-on-{device.type}")
    record: dict[str, Any] = {
        "suite": "gpu_check",
        "run": describe_run("python tools/gpu_check.py"),
        "environment": describe_environment(device),
        "tests": run_tests(device, stem.with_suffix(".log")),
        "cases": [],
        "left_out": [],
        "errors": [],
    }
    write_json(record, stem.with_suffix(".json"))
    print(f"tests: {record['tests']['summary']}", flush=True)
    probe = BandwidthProbe(device)
    todo = variants(sizes, device)
    for i, variant in enumerate(tqdm(todo, desc="variants")):
        if clock.left() < 20:
            record["left_out"].append(f"{variant}: no time left")
            continue
        weights = [PLAIN_SHARE if other.is_plain else 1 for other in todo[i:]]
        share, run = Clock(clock.left() * weights[0] / sum(weights)), None
        cuda.decode_attention = variant.attention
        try:
            run = VariantRun(variant, args, share, probe)
            for batch_size, contexts in shapes_of(variant, args.quick):
                if share.left() < 0:
                    run.left_out.append(f"batch {batch_size}: no time left")
                else:
                    run.measure(batch_size, contexts)
                if batch_size == 1 and variant.is_plain and share.left() > 0:
                    run.measure_uncached()
                    run.measure_transformers()
        except (MemoryError, torch.OutOfMemoryError) as err:
            record["left_out"].append(f"{variant}: {str(err).splitlines()[0]}")
        except Exception as err:  # a kernel that does not compile, say: the others are worth having
            traceback.print_exc()
            record["errors"].append(f"{variant}: {type(err).__name__}: {str(err)[:500]}")
        if run is not None:
            record["cases"] += run.cases
            record["left_out"] += [f"{variant}, {what}" for what in run.left_out]
            record["errors"] += run.errors
        del run
        release_memory(device)
        write_json(record, stem.with_suffix(".json"))  # nothing is lost if a later one fails
    cuda.decode_attention = "sdpa"
    record["seconds"] = 60 * args.minutes - clock.left()
    write_json(record, stem.with_suffix(".json"))
    if any(case["weights"] == "bf16" for case in record["cases"]):
        plot(record, stem.with_suffix(".png"))
    print(as_text(record))
    print(f"wrote {stem}.json, .png and .log")
    wrong = [c for c in record["cases"] if "check" in c and not c["check"]["passed"]]
    for c in wrong:
        variant = Variant(c["size"], c["weights"], c["attention"])
        print(f"WRONG TOKENS: {variant}, {c['mode']}, batch {c['batch_size']}: {c['check']}", file=sys.stderr)
    return int(
        bool(wrong) or bool(record["errors"]) or record["tests"]["exit_status"] not in (0, 5)
    )  # 5: no test was selected


if __name__ == "__main__":
    raise SystemExit(main())
