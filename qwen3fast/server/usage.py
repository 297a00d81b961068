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


def usage_so_far(prompt_tokens: int, new_tokens: int) -> dict[str, int]:
    """Return `usage` of a reply that is not finished."""
    total = prompt_tokens + new_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": new_tokens, "total_tokens": total}


def read_stream_options(fields: Fields) -> tuple[bool, bool]:
    """Return `include_usage` and vLLM's `continuous_usage_stats`. Raises: ApiError (400) naming the field."""
    options = fields.object("stream_options")
    if options is None:
        return False, False
    return options.flag("include_usage"), options.flag("continuous_usage_stats")


def reasoning_tokens(result: GenerationResult, tokenizer: Tokenizer | None) -> int:
    """Return the number of reasoning tokens of a reply, the closing tag included."""
    if tokenizer is None or not result.reasoning:
        return 0
    end = tokenizer.base.token_to_id(END_REASONING)
    return result.token_ids.index(end) + 1 if end in result.token_ids else len(result.token_ids)
