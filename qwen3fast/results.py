"""What a Generator gives back: results, stream chunks, and the figures measured on the way."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RequestMetrics:
    """Figures of one request; times in seconds.

    queue_s: from the call until the prompt's computation began. time_to_first_token_s: from the call. prefill_s:
    computing the prompt and sampling the first token. decode_s: all later tokens.
    """

    prompt_tokens: int
    new_tokens: int
    queue_s: float
    time_to_first_token_s: float
    prefill_s: float
    decode_s: float

    @property
    def prefill_tok_s(self) -> float:
        """Prompt tokens a second."""
        return self.prompt_tokens / self.prefill_s if self.prefill_s > 0 else 0.0

    @property
    def decode_tok_s(self) -> float:
        """New tokens after the first, a second; 0 if there is only one."""
        return (self.new_tokens - 1) / self.decode_s if self.decode_s > 0 else 0.0


@dataclass(frozen=True)
class GenerationResult:
    """A finished reply.

    text: without special tokens and without the stop string. token_ids: all sampled ids, a stop id included.
    finish_reason: "stop" (a stop id or string) or "length" (max_tokens).
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    metrics: RequestMetrics


@dataclass(frozen=True)
class StreamChunk:
    """A piece of a reply. The last chunk, possibly without text, carries finish_reason and the whole result."""

    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    result: GenerationResult | None = None


@dataclass(frozen=True)
class GeneratorStats:
    """State of a Generator: graphs compiled and seconds spent on that, CUDA graphs, cache bytes, rows in use, requests
    waiting."""

    compilations: int
    compile_s: float
    cuda_graphs: int
    kv_cache_bytes: int
    weight_bytes: int
    slots_in_use: int
    max_batch_size: int
    waiting: int
