"""Generation without a cache: the slow reference that every fast path is compared with."""

from __future__ import annotations

import torch

from qwen3fast.engine.engine import Engine
from qwen3fast.engine.scheduler import Request
from qwen3fast.sampling import SamplerRows, kind_for


def run_uncached(engine: Engine, request: Request) -> None:
    """Run a request to its end, computing the whole sequence for each token; same sampling, same stop rules."""
    request.prefill_started_s = request.submitted_s
    kind = kind_for([(request.temperature, request.top_k)])
    while request.finish_reason is None:
        logits_1V = engine.logits_uncached(request.prompt_ids + request.output_ids)
        parameters = (
            request.temperature,
            request.top_k,
            request.top_p,
            request.min_p,
            request.seed,
            len(request.output_ids),
        )
        rows = SamplerRows(*(torch.tensor([value], device=engine.device) for value in parameters))
        request.accept(engine.sample(logits_1V, rows, kind))
