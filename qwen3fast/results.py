"""Results of a Generator: replies, stream chunks, and metrics of requests."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

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
        """The number of prompt tokens that were computed."""
        return self.prompt_tokens - self.reused_tokens

    @property
    def prefill_tok_s(self) -> float:
        """Computed prompt tokens per second of prefill."""
        return self.prefilled_tokens / self.prefill_s if self.prefill_s > 0 else 0.0

    @property
    def decode_tok_s(self) -> float:
        """New tokens after the first per second; 0 if there is only one."""
        return (self.new_tokens - 1) / self.decode_s if self.decode_s > 0 else 0.0


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one token of a reply or prompt, from the model's logits before any processor.

    They are natural logarithms.

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
        prompt_logprobs: of each token of the prompt, if asked for; None for the first token, which follows nothing.
        stop_reason: the stop string, or the id of stop_token_ids, that ended the reply; None for any other end.
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
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    samples: list[GenerationResult] = field(default_factory=list)
    stop_reason: str | int | None = None

    def to_message(self) -> dict[str, Any]:
        """Return the reply as the assistant's message of a conversation: content, reasoning_content, tool_calls."""
        message: dict[str, Any] = {"role": "assistant", "content": self.answer}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [call.to_message() for call in self.tool_calls]
        return message

    @classmethod
    def of_samples(cls, group: list[GenerationResult]) -> GenerationResult:
        """Return the first of a prompt's replies, which holds them all; each has the prompt's log-probabilities."""
        if len(group) == 1:
            return group[0]
        samples = [replace(result, prompt_logprobs=group[0].prompt_logprobs) for result in group]
        return replace(samples[0], samples=samples)


@dataclass(frozen=True)
class ContinuationScore:
    """The log-probability of a continuation, given its prompt (`Generator.score`).

    Attributes:
        logprob: of the whole continuation: the sum of `logprobs`.
        logprobs: of each of its tokens, after the prompt and the tokens before it (natural logarithms).
        token_ids: its tokens.
        is_greedy: no other token is more likely at any place, so greedy decoding gives this continuation. Where two
            tokens are equally likely, both are greedy.
        metrics: lengths and times of the request; prompt_tokens counts prompt and continuation.
    """

    logprob: float
    logprobs: list[float]
    token_ids: list[int]
    is_greedy: bool
    metrics: RequestMetrics


def continuation_score(result: GenerationResult) -> ContinuationScore:
    """Return the score of the tokens that have log-probabilities in a prompt (`prompt_logprobs`, one at least)."""
    found = [at for at in result.prompt_logprobs or () if at is not None]
    logprobs = [at.logprob for at in found]
    is_greedy = all(at.logprob >= at.top[0][1] for at in found)
    return ContinuationScore(math.fsum(logprobs), logprobs, [at.token_id for at in found], is_greedy, result.metrics)


@dataclass(frozen=True)
class StreamChunk:
    """A piece of a reply. Slow readers get fewer and longer chunks.

    Attributes:
        text, token_ids: the new part of the reply; text may lag behind the tokens by an unfinished character.
        finish_reason, result: set in the last chunk, which may have no text; otherwise None.
        reasoning, answer: the parts of `text` inside and after the reasoning, without the tags. `answer` contains tool
            calls as text; the result contains them parsed.
        logprobs: of the chunk's tokens, if asked for.
        prompt_logprobs: in the first chunk, if asked for: as in the result.
    """

    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    result: GenerationResult | None = None
    reasoning: str = ""
    answer: str = ""
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None


@dataclass(frozen=True)
class GeneratorStats:
    """The state of a Generator.

    Attributes:
        compilations, compile_s: forms compiled so far, and the seconds this took. compiling: with compile="auto", how
            many the thread that compiles has still to do, of those that requests have needed so far.
        cuda_graphs: CUDA graphs captured. kv_cache_bytes, weight_bytes: memory on the device.
        slots_in_use, max_batch_size: running requests, and their limit. waiting: requests without a slot.
        prefilled_tokens, reused_tokens: prompt tokens computed, and found in the KV cache, so far.
        adapter_bytes: memory for LoRA adapters, used or free.
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
    adapter_bytes: int = 0
    forms: dict[str, Choice] = field(default_factory=dict)
    compiling: int = 0
