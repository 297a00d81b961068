"""Results of a Generator: replies, stream chunks, and metrics of requests."""

from __future__ import annotations

from dataclasses import dataclass, field

from qwen3fast.kernels.forms_file import Choice
from qwen3fast.text.tool_calls import ToolCall


@dataclass(frozen=True)
class RequestMetrics:
    """Metrics of one request; times in seconds.

    Attributes:
        prompt_tokens, new_tokens: the lengths of prompt and reply.
        reused_tokens: prompt tokens found in the KV cache, computed for an earlier prompt with the same beginning.
        queue_s: from the call until prefill began. time_to_first_token_s: from the call.
        prefill_s: prefill and sampling the first token, including steps of other requests in between.
        decode_s: all later tokens.
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
        """Prompt tokens that were computed."""
        return self.prompt_tokens - self.reused_tokens

    @property
    def prefill_tok_s(self) -> float:
        """Computed prompt tokens per second."""
        return self.prefilled_tokens / self.prefill_s if self.prefill_s > 0 else 0.0

    @property
    def decode_tok_s(self) -> float:
        """New tokens after the first per second; 0 if there is only one."""
        return (self.new_tokens - 1) / self.decode_s if self.decode_s > 0 else 0.0


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities (natural logarithms) at one token of a reply, from the model's logits before any processor.

    top: ids and log-probabilities of the most likely tokens, in descending order.
    """

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class GenerationResult:
    """A finished reply.

    Attributes:
        text: the whole reply, without special tokens and without the stop string.
        token_ids: all sampled ids, a stop id included.
        finish_reason: "stop" (a stop id or string), "length" (max_tokens) or "cancelled".
        metrics: lengths and times.
        reasoning: the text between `<think>` and `</think>`.
        answer: the text after the reasoning, without well-formed tool calls.
        tool_calls: the well-formed tool calls.
        malformed_tool_calls: blocks that begin as tool calls but cannot be parsed; they stay in the answer.
        logprobs: of each token, if asked for.
        samples: all n replies if n > 1 was asked for; this result is the first of them.
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
    """A piece of a reply. Slow readers get fewer and longer chunks.

    Attributes:
        text, token_ids: the new part of the reply; text may lag behind the tokens by an unfinished character.
        finish_reason, result: None but in the last chunk, which may have no text.
        reasoning, answer: the parts of `text` inside and after the reasoning, without the tags. In `answer`, tool calls
            stand as they were written; the result has them parsed.
        logprobs: of the chunk's tokens, if asked for.
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
    """The state of a Generator.

    Attributes:
        compilations, compile_s: graphs compiled so far, and the seconds this took.
        cuda_graphs: CUDA graphs captured. kv_cache_bytes, weight_bytes: memory on the device.
        slots_in_use, max_batch_size: requests that run, and that can run. waiting: requests without a slot.
        prefilled_tokens, reused_tokens: prompt tokens computed, and found in the KV cache, so far.
        forms: on CPUs, the form chosen for each computation that has several, with the reason and the measured times.
    """

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
    forms: dict[str, Choice] = field(default_factory=dict)
