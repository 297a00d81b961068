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
from typing import Any, Literal

import torch
from huggingface_hub.utils import tqdm

from qwen3fast import load_model
from qwen3fast.bench.environment import describe_environment, describe_run
from qwen3fast.bench.harness import noise_of
from qwen3fast.bench.measure import Sample, check_tokens, make_prompts, run_cached, run_uncached_timed
from qwen3fast.bench.plot import new_figure, save, style_axes
from qwen3fast.bench.probes import BandwidthProbe
from qwen3fast.bench.record import Case, Record, write_json
from qwen3fast.bench.table import Columns, as_text, table_rows
from qwen3fast.engine import Engine, StepKind
from qwen3fast.engine.cuda_graph import GraphCache
from qwen3fast.kernels import cuda
from qwen3fast.model import Qwen3
from qwen3fast.model.config import ModelConfig
from qwen3fast.model.kv_cache import StaticKVCache, free_bytes
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
COLUMNS = Columns(
    ("size", "weights", "attention", "mode", "batch_size", "context"),
    ("decode_tok_s", "share_of_bandwidth", "ttft_s", "prefill_tok_s", "launches"),
)


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
        self.cases: list[Case] = []
        self.checks: dict[str, dict[str, Any]] = {}
        self.left_out: list[str] = []
        self.errors: list[str] = []
        self._engines: dict[bool, Engine] = {}  # by whether they are compiled
        self._graphs: GraphCache | None = None
        self.transformers: str | None = None  # its version, once it was measured

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
        first_s = {}
        for mode in modes:
            started = time.perf_counter()
            self._run(mode, checked, 2)  # compiles, records
            first_s[mode] = time.perf_counter() - started
            if mode == "graphs" and self._graphs is not None and self._graphs.failure:
                self.errors.append(f"{self.variant}, batch {batch_size}, graphs: {self._graphs.failure}")
            sample = self._run(mode, checked, CHECK_TOKENS)
            check = check_tokens(self.model, checked, sample.token_ids)
            self.checks[f"{self.variant}, {mode}, batch {batch_size}"] = asdict(check) | {"passed": check.passed}
        for context in contexts:
            if self.clock.left() < 0:
                self.left_out.append(f"batch {batch_size}, context {context}: no time left")
                continue
            for case in self._measure_case(batch_size, context, modes):
                case.facts["first_run_s"] = first_s[str(case.labels["mode"])]
                self.cases.append(case)
        if self._graphs is not None and self._graphs.failure:  # what was measured as graphs had none
            broken = {"mode": "graphs", "batch_size": batch_size}
            self.cases = [case for case in self.cases if not broken.items() <= case.labels.items()]
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

    def _case(self, mode: str, batch_size: int, context: int) -> Case:
        return Case({**asdict(self.variant), "mode": mode, "batch_size": batch_size, "context": context})

    def _measure_case(self, batch_size: int, context: int, modes: list[str]) -> list[Case]:
        config, new_tokens = self.model.config, self.args.new_tokens
        prompts = make_prompts(config.vocab_size, context, batch_size)
        cases = {mode: self._case(mode, batch_size, context) for mode in modes}
        for mode in modes:
            self._run(mode, prompts, 3)  # records what this context's bucket needs
        for _ in range(self.args.rounds):
            gb_s = self.probe.measure(3)
            for mode, case in cases.items():
                sample = self._run(mode, prompts, new_tokens + 1)
                case.add({"ttft_s": sample.ttft_s, "step_s": sample.step_s, "bandwidth_gb_s": gb_s})
        kv_bytes = config.kv_bytes_per_token(config.dtype) * (context + new_tokens // 2) * batch_size
        for mode, case in cases.items():
            step = partial(self._engine(mode).decode, batch_size, context + new_tokens, StepKind())
            case.facts["bytes_per_step"] = float(self.model.num_bytes(per_token=True) + kv_bytes)
            case.add({"launches": launches(self._engine(mode), step)})
        return list(cases.values())

    def measure_uncached(self) -> None:
        """The reference without a cache, eager, one row."""
        length = 64 if self.args.quick else UNCACHED_LENGTH
        cache = StaticKVCache(self.model.config, 1, length + UNCACHED_TOKENS + 2, self.model.config.dtype, self.device)
        engine = Engine(self.model, cache, self.device, compile=False)
        prompts = make_prompts(self.model.config.vocab_size, length, 1)
        run_uncached_timed(engine, prompts, 2)
        sample = run_uncached_timed(engine, prompts, UNCACHED_TOKENS + 1)
        self.cases.append(self._case("uncached", 1, length))
        self.cases[-1].add({"ttft_s": sample.ttft_s, "step_s": sample.step_s})

    def measure_transformers(self) -> None:
        """transformers on the same weights with its DynamicCache, one row, token by token."""
        try:
            import transformers

            sys.path.insert(0, str(ROOT / "benchmarks"))
            from peers.shared import run_transformers, share_weights
        except ImportError as err:
            self.left_out.append(f"transformers: {err}")
            return
        reference = share_weights(self.model)
        for context in (32,) if self.args.quick else (128, 1024):
            [prompt] = make_prompts(self.model.config.vocab_size, context, 1)
            run_transformers(reference, prompt, 3)
            self.cases.append(self._case("transformers", 1, context))
            for _ in range(self.args.rounds):
                sample = run_transformers(reference, prompt, self.args.new_tokens + 1)
                self.cases[-1].add({"ttft_s": sample.ttft_s, "step_s": sample.step_s})
        self.transformers = transformers.__version__


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


def plot(record: Record, path: Path) -> None:
    """Decode speed of one request in each mode, a group of bars for each size and context."""
    speeds = {
        (c.labels["size"], c.labels["context"], c.labels["mode"]): c.metrics["decode_tok_s"].median
        for c in record.cases
        if (c.labels["weights"], c.labels["attention"], c.labels["batch_size"]) == ("bf16", "sdpa", 1)
        and c.labels["mode"] in COLORS
    }
    groups = list(dict.fromkeys((size, context) for size, context, _ in speeds))
    modes = [mode for mode in COLORS if any(mode == other for *_, other in speeds)]
    size = (max(10.4, 0.9 * len(groups) + 3), 5.4)
    figure = new_figure(record, "Decoding, by model size and context", "one request, random weights", size)
    axes = figure.add_axes((0.09, 0.16, 0.88, 0.62))
    for i, mode in enumerate(modes):
        places = [g + (i - (len(modes) - 1) / 2) * 0.8 / len(modes) for g in range(len(groups))]
        heights = [speeds.get((*group, mode), 0.0) for group in groups]
        bars = axes.bar(places, heights, 0.8 / len(modes), color=COLORS[mode], label=mode)
        axes.bar_label(bars, [f"{h:.3g}" if h else "" for h in heights], size=7, color="#3e4c59")
    axes.set_xticks(range(len(groups)), [f"{size}\n{context:,}" for size, context in groups])
    axes.legend(frameon=False, ncols=len(modes), loc="upper left", bbox_to_anchor=(0, 1.12))
    style_axes(axes, "", "tokens per second")
    save(figure, path)


def as_table(record: Record) -> str:
    """A table of all cases, and what was left out."""
    lines = [as_text(table_rows(record, COLUMNS), left=len(COLUMNS.labels))]
    lines += [f"left out: {what}" for what in record.notes["left_out"]]
    return "\n".join(lines + [f"ERROR: {what}" for what in record.notes["errors"]])


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
    run_of = describe_run("python tools/gpu_check.py")
    names = ", ".join(f"random:{size}" for size in sizes)
    record = Record("gpu", run_of, describe_environment(device), {"name": names})
    tests = run_tests(device, stem.with_suffix(".log"))
    left_out: list[str] = []
    errors: list[str] = []
    record.notes = {"tests": tests, "left_out": left_out, "errors": errors}
    write_json(record.to_dict(), stem.with_suffix(".json"))
    print(f"tests: {tests['summary']}", flush=True)
    probe = BandwidthProbe(device)
    todo = variants(sizes, device)
    for i, variant in enumerate(tqdm(todo, desc="variants")):
        if clock.left() < 20:
            left_out.append(f"{variant}: no time left")
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
            left_out.append(f"{variant}: {str(err).splitlines()[0]}")
        except Exception as err:  # a kernel that does not compile, say: the others are worth having
            traceback.print_exc()
            errors.append(f"{variant}: {type(err).__name__}: {str(err)[:500]}")
        if run is not None:
            record.cases += run.cases
            record.checks |= run.checks
            left_out += [f"{variant}, {what}" for what in run.left_out]
            errors += run.errors
            if run.transformers is not None:
                record.environment["transformers"] = run.transformers
        del run
        release_memory(device)
        write_json(record.to_dict(), stem.with_suffix(".json"))  # nothing is lost if a later one fails
    cuda.decode_attention = "sdpa"
    record.notes["seconds"] = 60 * args.minutes - clock.left()
    record.conditions = {"bandwidth_gb_s": [gb for c in record.cases for gb in c.samples.get("bandwidth_gb_s", [])]}
    record.noise = noise_of(record)
    write_json(record.to_dict(), stem.with_suffix(".json"))
    if any(case.labels["weights"] == "bf16" for case in record.cases):
        plot(record, stem.with_suffix(".png"))
    print(as_table(record))
    print(f"wrote {stem}.json, .png and .log")
    for name, check in record.checks.items():
        if not check["passed"]:
            print(f"WRONG TOKENS: {name}: {check}", file=sys.stderr)
    return int(not record.passed or bool(errors) or tests["exit_status"] not in (0, 5))  # 5: no test was selected


if __name__ == "__main__":
    raise SystemExit(main())
