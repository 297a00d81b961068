"""Log-probabilities of prompts: vLLM's `prompt_logprobs`, and replies that are nothing but the prompt (`max_tokens` 0).

Source: vLLM's OpenAI-compatible server, "Extra parameters"; OpenAI API reference, "Completions".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from qwen3fast.results import GenerationResult, StreamChunk, TokenLogprobs
from qwen3fast.server.fields import Fields
from qwen3fast.text.tokenizer import Tokenizer

MAX_PROMPT_LOGPROBS = 20
LOWEST = -9999.0  # JSON has no infinity


def read_prompt_logprobs(fields: Fields) -> int | None:
    """Return the number of alternatives per token of the prompt. Raises: ApiError (400), also for a stream."""
    wanted = fields.integer("prompt_logprobs", 0, MAX_PROMPT_LOGPROBS)
    if wanted is not None and fields.flag("stream"):
        raise fields.error("prompt_logprobs", "is not available in a stream", "invalid_value")
    return wanted


def to_prompt_logprobs(
    ats: Sequence[TokenLogprobs | None] | None, num_top: int, tokenizer: Tokenizer
) -> list[dict[str, Any] | None] | None:
    """Return vLLM's list: null for the first token, then by token id the prompt's own token and the most likely ones.

    The rank of a token that is not among the most likely ones is null.
    """

    def entry(token_id: int, logprob: float, rank: int | None) -> dict[str, Any]:
        text = tokenizer.token_bytes(token_id).decode("utf-8", "replace")
        return {"logprob": max(logprob, LOWEST), "rank": rank, "decoded_token": text}

    def entries(at: TokenLogprobs) -> dict[str, Any]:
        top = {str(i): entry(i, logprob, rank) for rank, (i, logprob) in enumerate(at.top[:num_top], 1)}
        return {str(at.token_id): entry(at.token_id, at.logprob, None), **top}

    return None if ats is None else [None if at is None else entries(at) for at in ats]


def with_top(at: TokenLogprobs | None, num_top: int) -> TokenLogprobs | None:
    """Return an entry with so many of its most likely tokens."""
    return at if at is None else replace(at, top=at.top[:num_top])


def only_prompt(result: GenerationResult) -> GenerationResult:
    """Return a result without its reply: the engine makes one token at least."""
    return replace(
        result,
        text="",
        reasoning="",
        answer="",
        token_ids=[],
        tool_calls=[],
        malformed_tool_calls=[],
        logprobs=None if result.logprobs is None else [],
        finish_reason="length",
        metrics=replace(result.metrics, new_tokens=0),
    )


def only_prompt_chunk(chunk: StreamChunk) -> StreamChunk:
    """Return a chunk of a stream without its part of the reply."""
    return replace(
        chunk,
        text="",
        token_ids=[],
        logprobs=None if chunk.logprobs is None else [],
        finish_reason="length" if chunk.finish_reason else None,
        result=None if chunk.result is None else only_prompt(chunk.result),
    )
