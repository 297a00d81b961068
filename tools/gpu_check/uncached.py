"""Measures generation without a KV cache, the baseline of the project: every token computes the whole sequence."""

from __future__ import annotations

import torch

from gpu_check.budget import Clock
from gpu_check.cached import NEEDED_S, load
from gpu_check.results import Results
from gpu_check.tokens import check_against_float32
from gpu_check.variants import Variant
from qwen3fast.bench.measure import make_prompts, run_uncached_timed
from qwen3fast.bench.record import Case
from qwen3fast.engine import Engine
from qwen3fast.model.kv_cache import StaticKVCache


def measure_uncached(variant: Variant, device: torch.device, results: Results, clock: Clock) -> None:
    """Measure one row at each context of the variant, eager or compiled."""
    model = load(variant, device)
    longest = max(variant.contexts) + variant.new_tokens + 2
    cache = StaticKVCache(model.config, 1, longest, model.config.dtype, device)
    engine = Engine(model, cache, device, compile=variant.mode != "eager", cuda_graphs=False)
    try:
        for context in variant.contexts:
            if clock.left() < NEEDED_S:
                results.left_out.append(f"context {context}: no time left")
                continue
            prompts = make_prompts(model.config.vocab_size, context, 1)
            run_uncached_timed(engine, prompts, 2)
            case = Case(variant.labels | {"context": context})
            results.cases.append(case)
            for _ in range(variant.rounds):
                sample = run_uncached_timed(engine, prompts, variant.new_tokens + 1)
                case.add({"ttft_s": sample.ttft_s, "step_s": sample.step_s})
            results.save()
            check = check_against_float32(model, prompts, sample.token_ids)
            results.checks[f"{variant.part}: {variant.name}, context {context}"] = check
            results.save()
        results.notes["compilations"] = engine.compiler.compilations
    finally:
        engine.close()
