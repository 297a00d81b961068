"""Counts of tokens in the form of OpenAI's `usage`, and the options of streams that ask for them."""

from __future__ import annotations

from typing import Any

from qwen3fast.results import GenerationResult
from qwen3fast.server.fields import Fields
from qwen3fast.text.reasoning import END_REASONING
from qwen3fast.text.tokenizer import Tokenizer


def usage(every: list[GenerationResult], num_prompts: int, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return OpenAI's `usage` of all finished replies; the replies to one prompt count its tokens once."""
    firsts = every[:: len(every) // num_prompts]
    prompt = sum(result.metrics.prompt_tokens for result in firsts)
    completion = sum(result.metrics.new_tokens for result in every)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(result.metrics.reused_tokens for result in firsts)},
        "completion_tokens_details": {"reasoning_tokens": sum(reasoning_tokens(r, tokenizer) for r in every)},
    }


def read_include_usage(fields: Fields) -> bool:
    """Return whether a stream ends with the usage (`stream_options`). Raises: ApiError (400) naming the field."""
    options = fields.object("stream_options")
    return options is not None and options.flag("include_usage")


def reasoning_tokens(result: GenerationResult, tokenizer: Tokenizer | None) -> int:
    """Return the number of reasoning tokens of a reply, the closing tag included."""
    if tokenizer is None or not result.reasoning:
        return 0
    end = tokenizer.base.token_to_id(END_REASONING)
    return result.token_ids.index(end) + 1 if end in result.token_ids else len(result.token_ids)
