"""The output items of `/v1/responses`: reasoning, messages and calls, whole or as events of a stream.

Source: OpenAI API reference, "Responses" and "Streaming events".
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from qwen3fast.results import GenerationResult
from qwen3fast.server.replies import new_id
from qwen3fast.text.tool_calls import ToolCall


def to_output(result: GenerationResult, text: str, calls: list[ToolCall]) -> list[dict[str, Any]]:
    """Return the output items of a finished reply with this text for the user and these tool calls."""
    output = [_reasoning_item(result.reasoning)] if result.reasoning else []
    if text or not calls:
        output.append(_message_item(text))
    return output + [_call_item(call) for call in calls]


def _reasoning_item(text: str, item_id: str | None = None) -> dict[str, Any]:
    content = [{"type": "reasoning_text", "text": text}]
    return {"id": item_id or new_id("rs"), "type": "reasoning", "summary": [], "content": content}


def _message_item(text: str, item_id: str | None = None, status: str = "completed") -> dict[str, Any]:
    return {
        "id": item_id or new_id("msg"),
        "type": "message",
        "role": "assistant",
        "status": status,
        "content": [_text_part(text)] if status == "completed" else [],
    }


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _call_item(call: ToolCall) -> dict[str, Any]:
    return {
        "id": new_id("fc"),
        "type": "function_call",
        "call_id": new_id("call"),
        "name": call.name,
        "arguments": json.dumps(call.arguments, ensure_ascii=False),
        "status": "completed",
    }


class ItemEvents:
    """The events of output items in a stream: an item opens with its first text and closes before another kind.

    finished: the items that have closed.
    """

    def __init__(self) -> None:
        self.finished: list[dict[str, Any]] = []
        self._kind, self._id, self._text = "", "", ""

    def text(self, kind: str, news: str) -> Iterator[dict[str, Any]]:
        """Yield the events for a piece of text of kind "reasoning" or "message"."""
        if not news:
            return
        if self._kind != kind:
            yield from self.close()
            yield from self._open(kind)
        self._text += news
        name = "response.reasoning_text.delta" if kind == "reasoning" else "response.output_text.delta"
        yield {"type": name, **self._place(), "delta": news, **self._logprobs()}

    def call(self, call: ToolCall) -> Iterator[dict[str, Any]]:
        """Yield the events for a whole tool call."""
        yield from self.close()
        item, index = _call_item(call), len(self.finished)
        place = {"item_id": item["id"], "output_index": index}
        opened = {**item, "arguments": "", "status": "in_progress"}
        yield {"type": "response.output_item.added", "output_index": index, "item": opened}
        yield {"type": "response.function_call_arguments.delta", **place, "delta": item["arguments"]}
        done = {"arguments": item["arguments"], "name": item["name"]}
        yield {"type": "response.function_call_arguments.done", **place, **done}
        yield {"type": "response.output_item.done", "output_index": index, "item": item}
        self.finished.append(item)

    def close(self) -> Iterator[dict[str, Any]]:
        """Yield the events that end the open item, if there is one."""
        if not self._kind:
            return
        if self._kind == "reasoning":
            item = _reasoning_item(self._text, self._id)
            yield {"type": "response.reasoning_text.done", **self._place(), "text": self._text}
        else:
            item = _message_item(self._text, self._id)
            yield {"type": "response.output_text.done", **self._place(), "text": self._text, **self._logprobs()}
            yield {"type": "response.content_part.done", **self._place(), "part": _text_part(self._text)}
        yield {"type": "response.output_item.done", "output_index": len(self.finished), "item": item}
        self.finished.append(item)
        self._kind = self._text = ""

    def ensure_one(self) -> Iterator[dict[str, Any]]:
        """Yield the events of an empty message if nothing else came."""
        if not self.finished or all(item["type"] == "reasoning" for item in self.finished):
            yield from self._open("message")
            yield from self.close()

    def _open(self, kind: str) -> Iterator[dict[str, Any]]:
        self._kind, self._id = kind, new_id("rs" if kind == "reasoning" else "msg")
        if kind == "reasoning":
            item = {**_reasoning_item("", self._id), "content": []}
        else:
            item = _message_item("", self._id, "in_progress")
        yield {"type": "response.output_item.added", "output_index": len(self.finished), "item": item}
        if kind == "message":
            yield {"type": "response.content_part.added", **self._place(), "part": _text_part("")}

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._id, "output_index": len(self.finished), "content_index": 0}

    def _logprobs(self) -> dict[str, Any]:
        return {"logprobs": []} if self._kind == "message" else {}
