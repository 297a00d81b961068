"""`POST /v1/messages`, Anthropic's form of a conversation. Source: Anthropic API reference, "Messages"."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from qwen3fast.results import GenerationResult
from qwen3fast.server.conversation import deltas
from qwen3fast.server.fields import read_fields, refuse_or_name
from qwen3fast.server.message_request import MessagesRequest, read_conversation, read_message_request
from qwen3fast.server.replies import answer, new_id
from qwen3fast.server.state import state_of
from qwen3fast.server.stream import event
from qwen3fast.server.tokens import COUNTED_LENGTHS
from qwen3fast.text.tool_calls import ToolCall


async def messages(request: Request) -> Response:
    """Answer a conversation, at once or as a stream."""
    return await answer(request, read_message_request, to_message, _events)


async def count_tokens(request: Request) -> Response:
    """Return the number of tokens of a conversation, as the model would read it."""
    state, fields = state_of(request), await read_fields(request)
    wanted = read_conversation(fields, state.models.choose(fields, "generate"))
    headers = refuse_or_name(fields, state.options.strict)
    most = COUNTED_LENGTHS * wanted.served.max_length
    prompt = await asyncio.to_thread(wanted.render, on_overflow=None, max_seq_len=most)
    return JSONResponse({"input_tokens": len(prompt)}, headers=headers)


def to_message(wanted: MessagesRequest, finished: list[GenerationResult]) -> dict[str, Any]:
    """Return Anthropic's message object of the one finished reply."""
    [result] = finished
    text, calls = wanted.content_and_calls(result)
    content: list[dict[str, Any]] = []
    if result.reasoning:
        content.append({"type": "thinking", "thinking": result.reasoning, "signature": ""})
    if text or not calls:
        content.append({"type": "text", "text": text})
    content += [_tool_use(call, call.arguments) for call in calls]
    return {**wanted.envelope(content, _usage(result)), **_stop(result, bool(calls))}


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


def _stop(result: GenerationResult, has_calls: bool) -> dict[str, Any]:
    """Return the fields of a message that say why it ended."""
    if result.finish_reason == "length":
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if isinstance(result.stop_reason, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": result.stop_reason}
    return {"stop_reason": "tool_use" if has_calls else "end_turn", "stop_sequence": None}


class _Blocks:
    """The events of content blocks in a stream: a block opens with its first text and closes before another kind."""

    def __init__(self) -> None:
        self._index, self._kind = -1, ""

    def text(self, kind: str, news: str) -> list[bytes]:
        """Return the events for a piece of text of kind "thinking" or "text"."""
        if not news:
            return []
        signature = {"signature": ""} if kind == "thinking" else {}
        begun = [] if self._kind == kind else [*self.close(), self._start(kind, {"type": kind, kind: "", **signature})]
        return [*begun, self._delta({"type": f"{kind}_delta", kind: news})]

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
    async for delta in deltas(request, wanted):
        if delta is None:
            yield _event({"type": "message_start", "message": wanted.envelope([], no_usage)})
            continue
        has_calls = has_calls or bool(delta.tool_calls)
        news = [*blocks.text("thinking", delta.reasoning), *blocks.text("text", delta.content)]
        news += [each for call in delta.tool_calls for each in blocks.call(call)]
        if delta.result is not None:
            end = _stop(delta.result, has_calls)
            usage = _usage(delta.result)
            news += [*blocks.close(), _event({"type": "message_delta", "delta": end, "usage": usage})]
        for each in news:
            yield each
    yield _event({"type": "message_stop"})
