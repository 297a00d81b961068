"""Measures this engine with its KV cache: first tokens, decode steps, tokens checked, kernels of a step counted."""

from __future__ import annotations

import time
from statistics import median

import torch

from gpu_check.budget import Clock
from gpu_check.probes import CopyProbe
from gpu_check.replay import step_profile
from gpu_check.results import Results
from gpu_check.settings import UnavailableError
from gpu_check.tokens import check_against_float32
from gpu_check.variants import Variant
from qwen3fast import Generator, SamplingParams, load_model
from qwen3fast.bench.measure import Sample, make_prompts, run_cached
from qwen3fast.bench.record import Case
from qwen3fast.engine import Engine
from qwen3fast.model import Qwen3
from qwen3fast.model.kv_cache import StaticKVCache
from qwen3fast.quantization.convert import quantize_model
from qwen3fast.quantization.formats import FORMATS

CHECK_PROMPT, CHECK_TOKENS = 40, 12
CHECKED_ROWS = 4  # of a batch: first, last and some between
WARM_UP_ROWS = 8  # the largest batch whose `warmup()` is timed
NEEDED_S = 8  # a context is begun with at least so much time left


def load(variant: Variant, device: torch.device) -> Qwen3:
    """Return the variant's model.

    Raises: UnavailableError if the device has no kernels for the format of the weights.
    """
    if variant.weights == "bf16":
        return load_model(variant.source, str(device))
    name = variant.weights.removesuffix("-block")
    if device.type not in FORMATS[name].devices:
        raise UnavailableError(f"{variant.weights} weights do not run on {device.type}")
    if name == variant.weights:
        return load_model(variant.source, str(device), quantization=name, calibrate=False)
    model = load_model(variant.source, str(device))
    quantize_model(model, FORMATS[name].with_blocks(), model.model.norm.weight.dtype)
    return model


def measure_cached(variant: Variant, device: torch.device, results: Results, clock: Clock) -> None:
    """Measure all contexts of a variant, saving after each. The profile of a step comes last."""
    started = time.perf_counter()
    model = load(variant, device)
    results.notes["load_s"] = time.perf_counter() - started
    run = CachedRun(variant, model, device, results)
    try:
        run.prepare()
        for context in variant.contexts:
            if clock.left() < NEEDED_S:
                results.left_out.append(f"context {context}: no time left")
                continue
            run.measure(context)
        run.finish(profiled=variant.profiled and clock.left() > NEEDED_S)
    finally:
        run.engine.close()
    if variant.batch_size > 1 and clock.left() > NEEDED_S:
        del run.engine
        measure_generator(variant, model, results)


class CachedRun:
    """One engine of a variant, and its measurements."""

    def __init__(self, variant: Variant, model: Qwen3, device: torch.device, results: Results) -> None:
        self.variant, self.model, self.device, self.results = variant, model, device, results
        self.probe = CopyProbe(device)
        longest = max(*variant.contexts, CHECK_PROMPT) + max(variant.new_tokens, CHECK_TOKENS) + 2
        cache = StaticKVCache(model.config, variant.batch_size, longest, model.config.dtype, device)
        compile, cuda_graphs = variant.mode != "eager", variant.mode == "graphs"
        self.engine = Engine(model, cache, device, compile=compile, cuda_graphs=cuda_graphs)

    def prompts(self, context: int, seed: int = 0) -> list[list[int]]:
        """Return a batch of random prompts."""
        return make_prompts(self.model.config.vocab_size, context, self.variant.batch_size, seed)

    def prepare(self) -> None:
        """Compile and capture with short prompts; check tokens before anything is timed."""
        started = time.perf_counter()
        prompts = self.prompts(CHECK_PROMPT, seed=1)
        run_cached(self.engine, prompts, 2)
        self.results.notes["first_run_s"] = time.perf_counter() - started
        self.check("short prompts", prompts, run_cached(self.engine, prompts, CHECK_TOKENS))
        self.results.save()

    def measure(self, context: int) -> None:
        """Time one context, check the tokens of its last repetition, and save."""
        variant, config = self.variant, self.model.config
        prompts = self.prompts(context)
        run_cached(self.engine, prompts, min(4, variant.new_tokens))  # compiles and captures what this length needs
        case = Case(variant.labels | {"context": context})
        kv_bytes = config.kv_bytes_per_token(config.dtype) * (context + variant.new_tokens / 2) * variant.batch_size
        case.facts["bytes_per_step"] = self.model.num_bytes(per_token=True) + kv_bytes
        sample = None
        for _ in range(variant.rounds):
            gb_s = self.probe.measure()
            self.results.conditions.setdefault("copy_gb_s", []).append(gb_s)
            sample = run_cached(self.engine, prompts, variant.new_tokens + 1)
            steps = {"step_s": sample.step_s} if variant.new_tokens > 2 else {}
            case.add({"ttft_s": sample.ttft_s, "bandwidth_gb_s": gb_s, **steps})
        self.results.cases.append(case)
        self.results.save()
        if sample is not None:
            self.check(f"context {context}", prompts, sample)
        self.results.save()

    def check(self, what: str, prompts: list[list[int]], sample: Sample) -> None:
        """Hold the tokens of some rows against float32."""
        rows = sorted({i * (len(prompts) - 1) // max(1, CHECKED_ROWS - 1) for i in range(CHECKED_ROWS)})
        chosen = [prompts[i] for i in rows], [sample.token_ids[i] for i in rows]
        try:
            check = check_against_float32(self.model, *chosen)
        except torch.OutOfMemoryError:
            self.results.left_out.append(f"tokens of {what}: no memory for layers in float32")
        else:
            self.results.checks[f"{self.variant.part}: {self.variant.name}, {what}"] = check

    def finish(self, profiled: bool) -> None:
        """Note what was compiled and captured and, at the very end, the kernels of a step.

        Adds an error if a step that should be a graph was none.
        """
        notes, engine = self.results.notes, self.engine
        notes["compilations"] = engine.compiler.compilations
        if engine.graphs is not None:
            notes["graphs"] = len(engine.graphs)
            if engine.graphs.failures:
                self.results.errors.append(f"not captured: {'; '.join(engine.graphs.failures.values())}")
        if self.device.type == "cuda":
            notes["peak_memory_bytes"] = torch.cuda.max_memory_allocated(self.device)
        self.results.save()
        if not profiled:
            return
        prompts = self.prompts(self.variant.contexts[0])
        notes["step"] = step_profile(lambda tokens: run_cached(engine, prompts, tokens), self.device)
        notes["step"]["context"] = self.variant.contexts[0]
        if self.device.type == "cuda" and not notes["step"]["kernels"]:
            self.results.left_out.append("kernels of a step: the profiler saw none")
        elif self.variant.mode == "graphs" and notes["step"]["graph_launches"] != 1:
            self.results.errors.append(f"a step launched {notes['step']['graph_launches']} graphs, expected 1")
        self.results.save()


def measure_generator(variant: Variant, model: Qwen3, results: Results) -> None:
    """Time the first tokens of a whole batch through `Generator`, as applications see them, and its `warmup()`."""
    params = SamplingParams(temperature=0, max_tokens=2)
    longest = max(variant.contexts) + 4
    compile, graphs = variant.mode != "eager", variant.mode == "graphs"
    sizes = {"max_seq_len": longest, "max_batch_size": variant.batch_size}
    with Generator(model, compile=compile, cuda_graphs=graphs, prefix_reuse=False, **sizes) as generator:
        if generator.device.type == "cuda" and variant.batch_size <= WARM_UP_ROWS:
            started = time.perf_counter()
            generator.warmup()
            results.notes["warmup_s"] = time.perf_counter() - started
        for context in variant.contexts:
            prompts = make_prompts(model.config.vocab_size, context, variant.batch_size)
            generator.generate(prompts, params)
            case = Case(variant.labels | {"mode": "generator", "context": context})
            for _ in range(variant.rounds):
                first = [r.metrics.time_to_first_token_s for r in generator.generate(prompts, params)]
                case.add({"ttft_s": max(first)})
                results.notes.setdefault("median_first_token_s", {})[str(context)] = median(first)
            results.cases.append(case)
            results.save()
