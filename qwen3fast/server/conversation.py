"""Replies to conversations: the common part of chat completions, responses and messages."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request

from qwen3fast.results import GenerationResult, TokenLogprobs
from qwen3fast.sampling_params import SamplingParams
from qwen3fast.server.answer_stream import AnswerStream
from qwen3fast.server.models import generator_of, tokenizer_of
from qwen3fast.server.replies import Prompt, ReplyRequest, pieces, started
from qwen3fast.server.state import state_of
from qwen3fast.text.tokenizer import Tokenizer
from qwen3fast.text.tool_calls import ToolCall, call_format_of


@dataclass(frozen=True)
class Conversation(ReplyRequest):
    """A conversation to reply to; each endpoint has a class of its own for the form of its responses.

    must_call: the reply is the JSON of one tool call, without tags. max_calls: tool calls beyond are left out; None
    leaves none out. continues: the last message holds the beginning of the reply.
    """

    must_call: bool
    max_calls: int | None = field(default=None, kw_only=True)
    continues: bool = field(default=False, kw_only=True)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of its model."""
        return tokenizer_of(self.served)

    @property
    def enable_thinking(self) -> bool:
        """Whether the model may reason: as the request says, otherwise as the server does."""
        asked = self.sampling.enable_thinking
        return self.served.enable_thinking if asked is None else asked

    def jobs(self) -> list[tuple[Prompt, SamplingParams]]:
        """Return prompt and parameters of each reply. Raises: ValueError for invalid messages."""
        prompt, replies = self.render(), self.sampling.each()
        if not self.enable_thinking and not self.continues:
            builder = generator_of(self.served)._builder
            replies = [builder.without_reasoning(params, prompt) for params in replies]
        return [(prompt, params) for params in replies]

    def render(self, **limit: Any) -> list[int]:
        """Return the prompt. limit: on_overflow and max_seq_len, as in `Generator.render`. Raises: as `jobs`."""
        about = (self.sampling.params, self.enable_thinking, self.tools, self.continues)
        return generator_of(self.served).render(self.prompts, *about, **limit)

    def content_and_calls(self, result: GenerationResult) -> tuple[str, list[ToolCall]]:
        """Return a reply's text for the user and its tool calls; with must_call the whole answer is one call."""
        if not self.must_call:
            return result.answer, result.tool_calls[: self.max_calls]
        try:
            call = json.loads(result.answer)
            return "", [ToolCall(call["name"], call["arguments"])]
        except (ValueError, KeyError, TypeError, RecursionError):  # cut off by max_tokens
            return result.answer, []


@dataclass(frozen=True)
class Delta:
    """A new part of a reply. index: of the reply, below n. result: the whole reply, in its last delta."""

    index: int
    reasoning: str
    content: str
    tool_calls: list[ToolCall]
    logprobs: list[TokenLogprobs] | None = None
    result: GenerationResult | None = None


async def deltas(request: Request, conversation: Conversation) -> AsyncIterator[Delta | None]:
    """Yield None once the replies are queued, then their new parts as they come.

    Reasoning, content and tool calls of all deltas, joined, are equal to the whole reply's.
    Raises: the error that ended one of them.
    """
    state, call_format = state_of(request), call_format_of(conversation.tokenizer.chat_template, conversation.tools)
    streams = [AnswerStream(call_format, conversation.max_calls) for _ in range(conversation.sampling.n)]
    finished: list[GenerationResult] = []
    async with started(conversation, state.options.compile_timeout_s) as handles:
        yield None
        async for i, chunk in pieces(handles, state.options.stream_interval_s):
            stream, result = streams[i], chunk.result
            answer = stream.push("" if conversation.must_call else chunk.answer)
            content, calls = answer.content, answer.tool_calls
            if result is not None:
                finished.append(result)
                last = stream.finish(*conversation.content_and_calls(result))
                content, calls = content + last.content, calls + last.tool_calls
            yield Delta(i, chunk.reasoning, content, calls, chunk.logprobs, result)
    state.count(request, conversation.served, finished)
