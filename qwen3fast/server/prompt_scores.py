"""Replies that are nothing but the prompt (`max_tokens` 0). Source: OpenAI API reference, "Completions"."""

from __future__ import annotations

from dataclasses import replace

from qwen3fast.results import GenerationResult, StreamChunk


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
