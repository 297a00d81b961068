"""What a Generator gives back: results, stream chunks, and the figures measured on the way."""

from __future__ import annotations

from dataclasses import dataclass, field

from qwen3fast.text.tool_calls import ToolCall


@dataclass(frozen=True)
class RequestMetrics:
    """Figures of one request; times in seconds.

    prompt_tokens: of which reused_tokens were in the KV cache already, from an earlier prompt that began alike.
    queue_s: from the call until the prompt's computation began. time_to_first_token_s: from the call. prefill_s:
    computing the prompt and sampling the first token, steps of other requests in between included. decode_s: all later
    tokens.
    """

    prompt_tokens: int
    new_tokens: int
    queue_s: float
    time_to_first_token_s: float
    prefill_s: float
    decode_s: float
    reused_tokens: int = 0

    @property
    def prefilled_tokens(self) -> int:
        """Tokens of the prompt that were computed."""
        return self.prompt_tokens - self.reused_tokens

    @property
    def prefill_tok_s(self) -> float:
        """Computed prompt tokens a second."""
        return self.prefilled_tokens / self.prefill_s if self.prefill_s > 0 else 0.0

    @property
    def decode_tok_s(self) -> float:
        """New tokens after the first, a second; 0 if there is only one."""
        return (self.new_tokens - 1) / self.decode_s if self.decode_s > 0 else 0.0


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of probabilities at one token of a reply, by the model's own logits, before any processor.

    top: the likeliest tokens' ids and log-probabilities, the likeliest first.
    """

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class GenerationResult:
    """A finished reply.

    text: without special tokens and without the stop string. token_ids: all sampled ids, a stop id included.
    finish_reason: "stop" (a stop id or string), "length" (max_tokens) or "cancelled".
    reasoning: the thought between `<think>` and `</think>`. answer: what follows it, without well-formed tool calls.
    tool_calls: those. malformed_tool_calls: blocks that begin as tool calls and are none; they stay in the answer.
    logprobs: of each token, if asked for. samples: all n replies if n > 1 was asked for; this is the first of them.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    metrics: RequestMetrics
    reasoning: str = ""
    answer: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    malformed_tool_calls: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    samples: list[GenerationResult] = field(default_factory=list)


@dataclass(frozen=True)
class StreamChunk:
    """A piece of a reply; reasoning and answer are what of the text (tags left out) is thought and what is not.

    A reader who is slow gets fewer and longer chunks. The last one, possibly without text, carries finish_reason and
    the whole result. The answer's pieces hold tool calls as they were written; the result has them parsed.
    logprobs: of the chunk's tokens, if they were asked for.
    """

    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    result: GenerationResult | None = None
    reasoning: str = ""
    answer: str = ""
    logprobs: list[TokenLogprobs] | None = None


@dataclass(frozen=True)
class GeneratorStats:
    """State of a Generator: graphs compiled and seconds spent on that, CUDA graphs, cache bytes, rows in use, requests
    waiting; prompt tokens computed so far, and those taken over from earlier prompts that began alike."""

    compilations: int
    compile_s: float
    cuda_graphs: int
    kv_cache_bytes: int
    weight_bytes: int
    slots_in_use: int
    max_batch_size: int
    waiting: int
    prefilled_tokens: int = 0
    reused_tokens: int = 0
