"""`POST /v1/messages`, Anthropic's form of a conversation. Source: Anthropic API reference, "Messages"."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from qwen3fast.results import GenerationResult
from qwen3fast.sampling_params import SamplingParams
from qwen3fast.server.conversation import Conversation, complete, content_and_calls, deltas, read_function
from qwen3fast.server.errors import ApiError
from qwen3fast.server.fields import Fields, describe, read_fields, refuse_or_name
from qwen3fast.server.forced_calls import forced
from qwen3fast.server.models import ServedModel, tokenizer_of
from qwen3fast.server.replies import new_id
from qwen3fast.server.sampling import Sampling
from qwen3fast.server.state import state_of
from qwen3fast.server.stream import event, unless_disconnected
from qwen3fast.text.tool_calls import ToolCall


@dataclass(frozen=True)
class MessagesRequest:
    """A message that was asked for."""

    conversation: Conversation
    stream: bool = False
    id: str = field(default_factory=lambda: new_id("msg"))

    def envelope(self, content: list[dict[str, Any]], usage: dict[str, int]) -> dict[str, Any]:
        """Return a message that has not ended yet."""
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.conversation.served.name,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }


async def messages(request: Request) -> Response:
    """Answer a conversation, at once or as a stream."""
    state = state_of(request)
    fields = await read_fields(request)
    wanted = read_message_request(fields, state.models.choose(fields, "generate"))
    headers = refuse_or_name(fields, state.options.strict)
    state.note(request, wanted.conversation.served, wanted.conversation.messages)
    if wanted.stream:
        return await state.event_stream(request, _events(request, wanted), headers)
    finished = await unless_disconnected(request, state.in_time(complete(request, wanted.conversation)))
    return JSONResponse(to_message(wanted, finished[0]), headers=headers)


def read_message_request(fields: Fields, served: ServedModel) -> MessagesRequest:
    """Read the fields of Anthropic's request. Raises: ApiError (400) naming the field."""
    tokenizer_of(served)
    tools, choice = _read_tools(fields)
    sampling, must_call = forced(_read_sampling(fields), tokenizer_of(served), tools, choice)
    stream = fields.flag("stream")
    fields.take("metadata", "service_tier")
    conversation = Conversation(served, _read_messages(fields), sampling, tools, must_call)
    return MessagesRequest(conversation, stream)


def _read_sampling(fields: Fields) -> Sampling:
    stops = fields.items("stop_sequences") or []
    if not all(isinstance(stop, str) for stop in stops):
        raise ApiError(400, f"must be a list of strings, got {describe(stops)}", fields.name("stop_sequences"))
    thinking = fields.object("thinking")
    enable, budget = False, None
    if thinking is not None:
        kind = thinking.text("type", choices=("enabled", "disabled", "adaptive"))
        budget = thinking.integer("budget_tokens", 1)
        enable = kind != "disabled"
    try:
        params = SamplingParams(
            temperature=fields.number("temperature"),
            top_p=fields.number("top_p"),
            top_k=fields.integer("top_k", 0, 2**31),
            max_tokens=fields.required("max_tokens", fields.integer("max_tokens", 1, 2**31)),
            stop=tuple(stop for stop in stops if stop),
            thinking_budget=budget if enable else None,
        )
    except ValueError as err:
        raise ApiError(400, str(err), code="invalid_value") from err
    return Sampling(params, enable_thinking=enable)


def _read_tools(fields: Fields) -> tuple[list[dict[str, Any]] | None, str | None]:
    """Return the functions that the model may call, and which it must: None, a name, or "" for any of them."""
    tools: list[dict[str, Any]] = []
    for tool in fields.objects("tools"):
        if tool.text("type", "custom") != "custom":
            raise ApiError(400, "only custom tools are supported", tool.name("type"), "unsupported")
        tool.required("input_schema", tool.raw("input_schema"))
        tool.take("cache_control")  # prefixes are found in the cache without being marked
        tools.append({"type": "function", "function": read_function(tool, "input_schema")})
    choice = fields.object("tool_choice")
    if choice is None:
        return tools or None, None
    kind = choice.required("type", choice.text("type", choices=("auto", "any", "tool", "none")))
    choice.take("disable_parallel_tool_use")
    if kind == "none":
        return None, None
    if not tools:
        raise ApiError(400, "needs tools", fields.name("tool_choice"), "invalid_value")
    if kind != "tool":
        return tools, "" if kind == "any" else None
    name = choice.required("name", choice.text("name"))
    if name not in [tool["function"]["name"] for tool in tools]:
        raise ApiError(400, f"{name!r} is not among the tools", choice.name("name"), "invalid_value")
    return tools, name


def _read_messages(fields: Fields) -> list[dict[str, Any]]:
    """Return the conversation as the chat template reads it."""
    found: list[dict[str, Any]] = []
    system = fields.raw("system")
    if system is not None:
        found.append({"role": "system", "content": "\n".join(_texts(fields, "system"))})
    if not fields.required("messages", fields.items("messages")):
        raise ApiError(400, "needs at least one message", fields.name("messages"), "invalid_value")
    for message in fields.objects("messages"):
        role = message.required("role", message.text("role", choices=("user", "assistant")))
        content = message.required("content", message.raw("content"))
        if isinstance(content, str):
            found.append({"role": role, "content": content})
        else:
            found.extend(_assistant(message) if role == "assistant" else _user(message))
    return found


def _blocks(fields: Fields, key: str, kinds: tuple[str, ...]) -> list[Fields]:
    content = fields.raw(key)
    if not isinstance(content, list):
        message = f"must be a string or a list of content blocks, got {describe(content)}"
        raise ApiError(400, message, fields.name(key))
    blocks = fields.objects(key)
    for block in blocks:
        block.take("cache_control", "citations")
        kind = block.required("type", block.text("type"))
        if kind not in kinds:
            raise ApiError(400, f"{kind!r} blocks are not supported here", block.name("type"), "unsupported")
    return blocks


def _texts(fields: Fields, key: str) -> list[str]:
    content = fields.raw(key, "")
    if isinstance(content, str):
        return [content]
    return [block.required("text", block.text("text")) for block in _blocks(fields, key, ("text",))]


def _assistant(fields: Fields) -> list[dict[str, Any]]:
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    for block in _blocks(fields, "content", ("text", "thinking", "redacted_thinking", "tool_use")):
        kind = block.text("type")
        block.take("signature", "data", "id")
        if kind == "text":
            message["content"] += block.required("text", block.text("text"))
        elif kind == "thinking":
            message["reasoning_content"] = block.required("thinking", block.text("thinking"))
        elif kind == "tool_use":
            name = block.required("name", block.text("name"))
            arguments = block.mapping("input") or {}
            calls = message.setdefault("tool_calls", [])
            calls.append({"type": "function", "function": {"name": name, "arguments": arguments}})
    return [message]


def _user(fields: Fields) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for block in _blocks(fields, "content", ("text", "tool_result")):
        if block.text("type") == "tool_result":
            block.take("tool_use_id", "is_error")
            text = "\n".join(_texts(block, "content"))
            found.append({"role": "tool", "content": text})
        elif found and found[-1]["role"] == "user":
            found[-1]["content"] += block.required("text", block.text("text"))
        else:
            found.append({"role": "user", "content": block.required("text", block.text("text"))})
    return found


def to_message(wanted: MessagesRequest, result: GenerationResult) -> dict[str, Any]:
    """Return Anthropic's message object of a finished reply."""
    text, calls = content_and_calls(wanted.conversation.must_call, result)
    content: list[dict[str, Any]] = []
    if result.reasoning:
        content.append({"type": "thinking", "thinking": result.reasoning, "signature": ""})
    if text or not calls:
        content.append({"type": "text", "text": text})
    content += [_tool_use(call, call.arguments) for call in calls]
    return {**wanted.envelope(content, _usage(result)), **_stop(wanted, result, bool(calls))}


def _tool_use(call: ToolCall, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"type": "tool_use", "id": new_id("toolu"), "name": call.name, "input": arguments}


def _usage(result: GenerationResult) -> dict[str, int]:
    metrics = result.metrics
    return {
        "input_tokens": metrics.prompt_tokens - metrics.reused_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": metrics.reused_tokens,
        "output_tokens": metrics.new_tokens,
    }


def _stop(wanted: MessagesRequest, result: GenerationResult, has_calls: bool) -> dict[str, Any]:
    """Return why a reply ended, in Anthropic's words."""
    if result.finish_reason == "length":
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    stops = wanted.conversation.sampling.params.stop
    if stops:
        # The text ends before the stop string, which the tokens still hold.
        raw = tokenizer_of(wanted.conversation.served).decode(result.token_ids)
        found = [(raw.find(stop), stop) for stop in stops if stop in raw]
        if found:
            return {"stop_reason": "stop_sequence", "stop_sequence": min(found)[1]}
    return {"stop_reason": "tool_use" if has_calls else "end_turn", "stop_sequence": None}


class _Blocks:
    """The content blocks of a stream: opened when their first text comes, closed when another kind follows."""

    def __init__(self) -> None:
        self._index, self._kind = -1, ""

    def text(self, kind: str, news: str) -> list[bytes]:
        """Return the events for a piece of text of kind "thinking" or "text"."""
        if not news:
            return []
        events = [] if self._kind == kind else [*self.close(), self._start(kind, {"type": kind, kind: ""})]
        return [*events, self._delta({"type": f"{kind}_delta", kind: news})]

    def call(self, call: ToolCall) -> list[bytes]:
        """Return the events for a whole tool call."""
        begin = [*self.close(), self._start("tool_use", _tool_use(call, {}))]
        arguments = json.dumps(call.arguments, ensure_ascii=False)
        return [*begin, self._delta({"type": "input_json_delta", "partial_json": arguments}), *self.close()]

    def close(self) -> list[bytes]:
        """Return the events that end the open block, if there is one."""
        if not self._kind:
            return []
        signature = [self._delta({"type": "signature_delta", "signature": ""})] if self._kind == "thinking" else []
        self._kind = ""
        return [*signature, _event({"type": "content_block_stop", "index": self._index})]

    def _start(self, kind: str, block: dict[str, Any]) -> bytes:
        self._index, self._kind = self._index + 1, kind
        return _event({"type": "content_block_start", "index": self._index, "content_block": block})

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event({"type": "content_block_delta", "index": self._index, "delta": delta})


def _event(data: dict[str, Any]) -> bytes:
    return event(data, data["type"])


async def _events(request: Request, wanted: MessagesRequest) -> AsyncGenerator[bytes, None]:
    """Yield the events of a streamed message."""
    blocks, has_calls = _Blocks(), False
    no_usage = {"input_tokens": 0, "output_tokens": 0}
    async for delta in deltas(request, wanted.conversation):
        if delta is None:
            yield _event({"type": "message_start", "message": wanted.envelope([], no_usage)})
            continue
        has_calls = has_calls or bool(delta.tool_calls)
        for each in [*blocks.text("thinking", delta.reasoning), *blocks.text("text", delta.content)]:
            yield each
        for call in delta.tool_calls:
            for each in blocks.call(call):
                yield each
        if delta.result is not None:
            for each in blocks.close():
                yield each
            end = _stop(wanted, delta.result, has_calls)
            yield _event({"type": "message_delta", "delta": end, "usage": _usage(delta.result)})
    yield _event({"type": "message_stop"})
