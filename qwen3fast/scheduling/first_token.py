"""First tokens: prompts that are computed become rows of the decode step, and their first tokens are sampled.

Also here: the host's part of any step for some rows, the masks of constraints and the calls of logits processors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwen3fast.engine.decode import Hook
from qwen3fast.engine.engine import Engine
from qwen3fast.engine.state import StepKind
from qwen3fast.sampling.samplers import kind_for
from qwen3fast.scheduling.request import Request


def sample_first(engine: Engine, requests: list[Request]) -> None:
    """Sample the first tokens of requests whose prompts are computed.

    It takes one call for all, except for requests with processors, log-probabilities or a hook.
    """
    if not requests:
        return
    _begin_rows(engine, requests)
    requests = [request for request in requests if request.error is None]
    plain = [r for r in requests if not r.is_processed and r.logits_processor is None and r.logprobs is None]
    if len(plain) > 1:
        kind = StepKind(kind_for(request.sampling[:2] for request in plain))
        logits_BV = torch.cat([r.prompt_logits_1V for r in plain if r.prompt_logits_1V is not None])
        result = engine.sample_first([r.slot for r in plain if r.slot is not None], logits_BV, kind)
        for request, token in zip(plain, result.tokens, strict=True):
            request.launched = 1
            request.accept(token)
    for request in requests:
        if len(plain) < 2 or request not in plain:
            _sample_alone(engine, request)


def _begin_rows(engine: Engine, requests: list[Request]) -> None:
    slots = {request.slot: request for request in requests if request.slot is not None}
    lengths = [len(request.prompt_ids) for request in requests]
    engine.set_rows(list(slots), lengths, [request.sampling for request in requests])
    for slot, request in slots.items():
        if request.is_processed:
            engine.set_processors(slot, request.prompt_ids, *request.processor_arguments)
        restrict(engine, slot, request)


def _sample_alone(engine: Engine, request: Request) -> None:
    assert request.slot is not None and request.prompt_logits_1V is not None, "its prompt was computed"
    request.launched = 1
    kind = StepKind(kind_for([request.sampling[:2]]), request.is_processed, request.logprobs is not None)
    result = engine.sample_first(request.slot, request.prompt_logits_1V, kind, hook_for({0: request}))
    if request.error is None:
        request.accept(result.tokens[0], result.logprobs[0] if result.logprobs else None)


def restrict(engine: Engine, slot: int, request: Request) -> None:
    """Send the mask of a constraint to the device. If the constraint fails, its request fails."""
    try:
        words_W = request.allowed_words(engine.model.config.vocab_size)
    except Exception as err:
        return request.fail(err)
    if words_W is not None:
        engine.set_allowed(slot, words_W)


def hook_for(slots: dict[int, Request]) -> Hook | None:
    """Return a hook that runs the logits_processor of each slot that has one; None if none has.

    If a processor fails, its request ends, and the token that the step samples for it is dropped.
    """
    hooked = {slot: request for slot, request in slots.items() if request.logits_processor is not None}
    if not hooked:
        return None

    def hook(logits_BV: Tensor) -> Tensor:
        logits_BV = logits_BV.clone()
        for slot, request in hooked.items():
            try:
                logits_BV[slot] = request.process(logits_BV[slot])
            except Exception as err:
                request.fail(err)
        return logits_BV

    return hook
