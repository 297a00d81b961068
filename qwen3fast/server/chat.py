"""`POST /v1/chat/completions`. Source: OpenAI API reference, "Chat", and vLLM's extras of it."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from qwen3fast._version import __version__
from qwen3fast.results import GenerationResult, TokenLogprobs
from qwen3fast.server.chat_fields import read_max_calls, read_messages, read_tools
from qwen3fast.server.conversation import Conversation, Delta, deltas
from qwen3fast.server.fields import Fields
from qwen3fast.server.forced_calls import forced
from qwen3fast.server.models import ServedModel, tokenizer_of
from qwen3fast.server.replies import answer, new_id
from qwen3fast.server.sampling import LOWEST, read_sampling, refuse_unless
from qwen3fast.server.stream import DONE, event
from qwen3fast.server.usage import read_include_usage, usage
from qwen3fast.text.tokenizer import Tokenizer
from qwen3fast.text.tool_calls import ToolCall

MAX_TOP_LOGPROBS = 20
# Fields that do not change a reply.
WITHOUT_EFFECT = ("user", "metadata", "store", "service_tier", "safety_identifier")


@dataclass(frozen=True)
class ChatRequest(Conversation):
    """A request for a chat completion. include_usage: in a last event of a stream."""

    include_usage: bool = False
    id: str = field(default_factory=lambda: new_id("chatcmpl"))

    def envelope(self, kind: str) -> dict[str, Any]:
        """Return the fields that every object of this completion has."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.served.name,
            "system_fingerprint": f"qwen3fast-{__version__}",
        }


async def chat_completions(request: Request) -> Response:
    """Answer a conversation, at once or as a stream."""
    return await answer(request, read_chat, to_completion, _events)


def read_chat(fields: Fields, served: ServedModel) -> ChatRequest:
    """Read the fields of a chat completion. Raises: ApiError (400) naming the field."""
    tokenizer_of(served)
    tools, choice = read_tools(fields)
    wants_logprobs = fields.flag("logprobs")
    top = fields.integer("top_logprobs", 0, MAX_TOP_LOGPROBS)
    if top is not None and not wants_logprobs:
        raise fields.error("top_logprobs", "needs logprobs to be true", "invalid_value")
    sampling = read_sampling(fields, ("max_completion_tokens", "max_tokens"), (top or 0) if wants_logprobs else None)
    sampling, must_call = forced(sampling, tokenizer_of(served), tools, choice)
    include_usage, messages, stream = read_include_usage(fields), read_messages(fields), fields.flag("stream")
    refuse_unless(fields, functions=[], modalities=["text"])
    if fields.raw("function_call") != "auto":  # there are no functions
        refuse_unless(fields, function_call="none")
    fields.take(*WITHOUT_EFFECT)
    continues = fields.flag("continue_final_message")
    if fields.flag("add_generation_prompt", not continues) is continues:
        raise fields.error("add_generation_prompt", "must be the opposite of continue_final_message", "invalid_value")
    if continues and (messages[-1]["role"] != "assistant" or "tool_calls" in messages[-1]):
        reason = "needs a final message of the assistant, without tool calls"
        raise fields.error("continue_final_message", reason, "invalid_value")
    shape: dict[str, Any] = {"tools": tools, "max_calls": read_max_calls(fields), "continues": continues}
    return ChatRequest(served, sampling, messages, must_call, include_usage, **shape, stream=stream)


def to_completion(chat: ChatRequest, finished: list[GenerationResult]) -> dict[str, Any]:
    """Return the `chat.completion` object of finished replies."""
    return {
        **chat.envelope("chat.completion"),
        "choices": [_choice(chat, i, result, chat.tokenizer) for i, result in enumerate(finished)],
        "usage": usage(finished, 1, chat.tokenizer),
    }


def _choice(chat: ChatRequest, index: int, result: GenerationResult, tokenizer: Tokenizer) -> dict[str, Any]:
    content, calls = chat.content_and_calls(result)
    message: dict[str, Any] = {"role": "assistant", "content": content or (None if calls else ""), "refusal": None}
    if result.reasoning:
        message |= {"reasoning_content": result.reasoning, "reasoning": result.reasoning}
    if calls:
        message["tool_calls"] = [to_tool_call(call) for call in calls]
    logprobs = None
    if result.logprobs is not None:
        logprobs = {"content": [to_logprob(at, tokenizer) for at in result.logprobs], "refusal": None}
    reason = finish_reason(result, bool(calls))
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}


def to_tool_call(call: ToolCall) -> dict[str, Any]:
    """Return OpenAI's object of a tool call, with an id of its own."""
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return {"id": new_id("call"), "type": "function", "function": {"name": call.name, "arguments": arguments}}


def to_logprob(at: TokenLogprobs, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return OpenAI's object of a token's log-probability."""

    def one(token_id: int, logprob: float) -> dict[str, Any]:
        raw = tokenizer.token_bytes(token_id)
        return {"token": raw.decode("utf-8", "replace"), "logprob": max(logprob, LOWEST), "bytes": list(raw)}

    return {**one(at.token_id, at.logprob), "top_logprobs": [one(*entry) for entry in at.top]}


def finish_reason(result: GenerationResult, has_calls: bool) -> str:
    """Return OpenAI's word for why a reply ended."""
    return "tool_calls" if has_calls and result.finish_reason == "stop" else result.finish_reason


async def _events(request: Request, chat: ChatRequest) -> AsyncGenerator[bytes, None]:
    """Yield the events of a streamed completion."""
    num_replies = chat.sampling.n
    calls, finished = [0] * num_replies, dict[int, GenerationResult]()
    async for delta in deltas(request, chat):
        if delta is None:
            for i in range(num_replies):
                yield _chunk(chat, i, {"role": "assistant", "content": ""})
            continue
        i = delta.index
        content, logprobs = _delta(delta, calls[i]), None
        calls[i] += len(delta.tool_calls)
        if delta.logprobs:
            logprobs = {"content": [to_logprob(at, chat.tokenizer) for at in delta.logprobs], "refusal": None}
        if content or logprobs:
            yield _chunk(chat, i, content, logprobs)
        if delta.result is not None:
            finished[i] = delta.result
            yield _chunk(chat, i, {}, reason=finish_reason(delta.result, calls[i] > 0))
    if chat.include_usage:
        every = [finished[i] for i in range(num_replies)]
        envelope = chat.envelope("chat.completion.chunk")
        yield event({**envelope, "choices": [], "usage": usage(every, 1, chat.tokenizer)})
    yield DONE


def _delta(delta: Delta, num_calls: int) -> dict[str, Any]:
    """Return OpenAI's delta. num_calls: tool calls that went before."""
    news: dict[str, Any] = {}
    if delta.reasoning:
        news |= {"reasoning_content": delta.reasoning, "reasoning": delta.reasoning}
    if delta.content:
        news["content"] = delta.content
    if delta.tool_calls:
        news["tool_calls"] = [{"index": num_calls + k, **to_tool_call(c)} for k, c in enumerate(delta.tool_calls)]
    return news


def _chunk(
    chat: ChatRequest, index: int, delta: dict[str, Any], logprobs: Any = None, reason: str | None = None
) -> bytes:
    choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
    extra = {"usage": None} if chat.include_usage else {}
    return event({**chat.envelope("chat.completion.chunk"), "choices": [choice], **extra})
