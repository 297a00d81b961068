"""Measures transformers on the very weights of our model: eager, and with its static cache and compilation."""

from __future__ import annotations

import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from gpu_check.budget import Clock
from gpu_check.cached import NEEDED_S, load
from gpu_check.results import Results
from gpu_check.settings import UnavailableError
from gpu_check.tokens import check_against_float32
from gpu_check.variants import Variant
from qwen3fast.bench.measure import Sample, make_prompts
from qwen3fast.bench.record import Case

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def measure_transformers(variant: Variant, device: torch.device, results: Results, clock: Clock) -> None:
    """Measure one row at each context: mode "eager" steps the model itself, "static" calls its `generate`.

    Raises: UnavailableError if transformers cannot be imported.
    """
    try:
        import transformers

        sys.path.insert(0, str(BENCHMARKS))
        from peers.shared import run_transformers, share_weights
    except ImportError as err:
        raise UnavailableError(f"transformers: {err}") from err
    results.environment["transformers"] = transformers.__version__
    model = load(variant, device)
    reference = share_weights(model)
    run = run_transformers if variant.mode == "eager" else run_static
    for context in variant.contexts:
        if clock.left() < NEEDED_S:
            results.left_out.append(f"context {context}: no time left")
            continue
        prompts = make_prompts(model.config.vocab_size, context, 1)
        started = time.perf_counter()
        run(reference, prompts[0], variant.new_tokens + 1)  # compiles; captures graphs
        results.notes.setdefault("first_run_s", {})[str(context)] = time.perf_counter() - started
        case = Case(variant.labels | {"context": context})
        results.cases.append(case)
        for _ in range(variant.rounds):
            sample = run(reference, prompts[0], variant.new_tokens + 1)
            case.add({"ttft_s": sample.ttft_s, "step_s": sample.step_s})
        results.save()
        check = check_against_float32(model, prompts, sample.token_ids)
        results.checks[f"{variant.part}: {variant.name}, context {context}"] = check
        results.save()


class TokenTimes:
    """A streamer of transformers that notes when each token came; the prompt comes first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        """Note the time; `generate` has brought the token to the CPU."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing."""


@torch.no_grad()
def run_static(reference: Any, prompt: list[int], new_tokens: int) -> Sample:
    """Generate greedily by transformers' `generate` with its static cache, which compiles the step on a GPU."""
    streamer = TokenTimes()
    ids = torch.tensor([prompt], device=reference.device)
    started = time.perf_counter()
    output = reference.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        cache_implementation="static",
        do_sample=False,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        eos_token_id=None,
        pad_token_id=0,
        streamer=streamer,
    )
    times = streamer.times[1:]
    return Sample(times[0] - started, [b - a for a, b in pairwise(times)], [output[0, len(prompt) :].tolist()])
