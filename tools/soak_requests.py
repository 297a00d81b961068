"""Random requests for tools/soak.py, and the comparison of their replies."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import tiny_tasks
import torch
from torch import Tensor

from qwen3fast import GenerationResult, SamplingParams, StreamChunk

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}, "ok": {"type": "boolean"}}, "required": ["n"]}
Hook = Callable[[Tensor, Tensor], Tensor]
Outcome = GenerationResult | Exception


def random_hook(rng: random.Random) -> Hook:
    """Return a logits_processor that fails at one token, or makes earlier tokens more likely."""
    at, kind = rng.randrange(9), rng.choice(["raise", "shape", "nan", "well"])

    def hook(logits: Tensor, output: Tensor) -> Tensor:
        if kind == "well" or len(output) != at:
            return logits.index_add(0, output, torch.ones(len(output)))
        if kind == "raise":
            raise KeyError(f"injected at token {at}")
        return logits[:7] if kind == "shape" else logits * float("nan")

    return hook


def random_params(rng: random.Random, vocab_size: int) -> SamplingParams:
    """Return parameters with each field now and then, always with a seed: the reply can be generated again."""
    fields: dict[str, Any] = {
        "seed": rng.getrandbits(40), "max_tokens": rng.randint(1, 40), "temperature": rng.choice([0, 0.6, 1.0, 3.0]),
        "top_k": rng.choice([0, 5, 20]), "top_p": rng.choice([0.8, 1.0]), "min_p": rng.choice([0.0, 0.05]),
    }  # fmt: skip
    ids = rng.sample(range(vocab_size), 400)
    extras: dict[str, Any] = {
        "repetition_penalty": rng.choice([0.9, 1.2]), "presence_penalty": 1.5, "frequency_penalty": rng.uniform(-1, 1),
        "logit_bias": {token: rng.uniform(-5, 5) for token in ids[:9]} | {ids[9]: -float("inf")},
        "allowed_token_ids": ids, "logprobs": rng.randint(0, 20), "stop": rng.choice(["e", ("the ", " a"), "\n\n"]),
        "stop_token_ids": ids[:60], "ignore_eos": True, "thinking_budget": rng.randrange(8),
        "logits_processor": random_hook(rng), "json_schema": SCHEMA,
    }  # fmt: skip
    fields |= {name: value for name, value in extras.items() if rng.random() < 0.12}
    if rng.random() < 0.12 and "json_schema" not in fields:
        fields["regex"] = r"(yes|no)(, [a-z]{2,6}){1,4}\."
    return SamplingParams(**fields)


def random_question(rng: random.Random) -> str:
    """Return a question that tiny was trained on, sometimes long, sometimes an earlier one."""
    makers = [tiny_tasks.addition, tiny_tasks.copying, tiny_tasks.talk, lambda rng: tiny_tasks.lookup(rng, 250)]
    rng = random.Random(rng.randrange(5)) if rng.random() < 0.3 else rng
    return str(rng.choice(makers)(rng).messages[0][1])


def attempt(call: Callable[..., GenerationResult], *arguments: Any) -> Outcome:
    """Return the result of a request, or its error."""
    try:
        return call(*arguments)
    except Exception as err:
        return err


def joined(chunks: list[StreamChunk]) -> GenerationResult:
    """Return a stream's result with the text and tokens of its chunks; cancelled if it ended early."""
    text, ids = "".join(chunk.text for chunk in chunks), [i for chunk in chunks for i in chunk.token_ids]
    whole = chunks[-1].result if chunks else None
    return replace(whole or GenerationResult("", [], "cancelled", None), text=text, token_ids=ids)  # type: ignore[arg-type]


def is_alike(got: Outcome, expected: Outcome) -> bool:
    """Return True for the expected reply, or for its beginning if it was cancelled."""
    if isinstance(got, Exception):
        return type(got) is type(expected) and str(got) == str(expected)
    if isinstance(expected, Exception):
        return got.finish_reason == "cancelled"  # before it failed
    if got.finish_reason == "cancelled":
        is_beginning = got.token_ids == expected.token_ids[: len(got.token_ids)]
        return is_beginning and expected.text.startswith(got.text.rstrip("�"))  # half a character may be the last
    bare = [replace(r, metrics=None, logprobs=None, samples=[]) for r in (got, expected)]  # type: ignore[arg-type]
    if bare[0] != bare[1] or not all(map(is_alike, got.samples, expected.samples)):
        return False
    both = zip(got.logprobs or (), expected.logprobs or (), strict=True)
    return all(mine.token_id == other.token_id and abs(mine.logprob - other.logprob) < 1e-3 for mine, other in both)


def nudged(params: SamplingParams, seed: int) -> SamplingParams:
    """Return the parameters with noise on the logits that only decides ties."""
    given = params.logits_processor or (lambda logits, output: logits)

    def hook(logits: Tensor, output: Tensor) -> Tensor:
        rng = torch.Generator().manual_seed(1000 * seed + len(output))
        return given(logits + 1e-4 * torch.randn(logits.shape, generator=rng), output)

    return replace(params, logits_processor=hook)
