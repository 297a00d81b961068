"""`/v1/responses`, OpenAI's newer form of a conversation. Source: OpenAI API reference, "Responses"."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from qwen3fast.results import GenerationResult
from qwen3fast.sampling_params import SamplingParams
from qwen3fast.server.conversation import (
    Conversation,
    complete,
    content_and_calls,
    deltas,
    read_call,
    read_function,
    text_of,
)
from qwen3fast.server.errors import ApiError, to_api_error
from qwen3fast.server.fields import Fields, describe, read_fields, refuse_or_name
from qwen3fast.server.forced_calls import forced
from qwen3fast.server.models import ServedModel, tokenizer_of
from qwen3fast.server.replies import new_id, reasoning_tokens
from qwen3fast.server.sampling import REASONING_BUDGETS, Sampling
from qwen3fast.server.state import state_of
from qwen3fast.server.store import ResponseStore, Stored
from qwen3fast.server.stream import event, unless_disconnected
from qwen3fast.text.tool_calls import ToolCall

WITHOUT_EFFECT = ("user", "service_tier", "include", "parallel_tool_calls", "safety_identifier", "prompt_cache_key")


@dataclass(frozen=True)
class ResponseRequest:
    """A response that was asked for. given: what the response object repeats of the request."""

    conversation: Conversation
    given: dict[str, Any]
    is_stored: bool = True
    stream: bool = False
    id: str = field(default_factory=lambda: new_id("resp"))

    def to_response(self, status: str, output: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """Return the response object."""
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.conversation.created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "model": self.conversation.served.name,
            "output": output,
            "usage": None,
            **self.given,
            **more,
        }


async def create_response(request: Request) -> Response:
    """Answer a conversation, at once or as a stream."""
    state = state_of(request)
    fields = await read_fields(request)
    wanted = read_response_request(fields, state.models.choose(fields, "generate"), state.responses)
    headers = refuse_or_name(fields, state.options.strict)
    state.note(request, wanted.conversation.served, wanted.conversation.messages)
    if wanted.stream:
        return await state.event_stream(request, _events(request, wanted), headers)
    finished = await unless_disconnected(request, state.in_time(complete(request, wanted.conversation)))
    return JSONResponse(_finish(request, wanted, finished[0], to_output(wanted, finished[0])), headers=headers)


async def get_response(request: Request) -> Response:
    """Return a stored response."""
    return JSONResponse(state_of(request).responses.get(request.path_params["id"]).response)


async def delete_response(request: Request) -> Response:
    """Forget a stored response."""
    state_of(request).responses.delete(request.path_params["id"])
    return JSONResponse({"id": request.path_params["id"], "object": "response", "deleted": True})


def read_response_request(fields: Fields, served: ServedModel, store: ResponseStore) -> ResponseRequest:
    """Read the fields of a response. Raises: ApiError (400) naming the field; 404 for an unknown earlier response."""
    tokenizer_of(served)
    tools, choice = _read_tools(fields)
    sampling, must_call = forced(_read_sampling(fields), tokenizer_of(served), tools, choice)
    instructions, previous = fields.text("instructions"), fields.text("previous_response_id")
    history = list(store.get(previous).messages) if previous is not None else []
    messages = [*history, *_read_input(fields)]
    fields.take(*WITHOUT_EFFECT)
    if fields.flag("background"):
        raise ApiError(400, "responses in the background are not supported", "background", "unsupported")
    prompt = [{"role": "system", "content": instructions}, *messages] if instructions else messages
    given = {
        "instructions": instructions,
        "max_output_tokens": sampling.params.max_tokens,
        "metadata": fields.raw("metadata", {}),
        "parallel_tool_calls": True,
        "previous_response_id": previous,
        "reasoning": fields.raw("reasoning", {"effort": None, "summary": None}),
        "store": fields.flag("store", True),
        "temperature": sampling.params.temperature,
        "text": fields.raw("text", {"format": {"type": "text"}}),
        "tool_choice": fields.raw("tool_choice", "auto"),
        "tools": fields.raw("tools", []),
        "top_p": sampling.params.top_p,
        "truncation": fields.text("truncation", "disabled", choices=("auto", "disabled")),
    }
    conversation = Conversation(served, prompt, sampling, tools, must_call)
    return ResponseRequest(conversation, given, bool(given["store"]), fields.flag("stream"))


def _read_sampling(fields: Fields) -> Sampling:
    schema, text = None, fields.object("text")
    form = text.object("format") if text is not None else None
    if form is not None:
        kind = form.text("type", choices=("text", "json_object", "json_schema"))
        form.take("name", "description", "strict")  # a schema is always followed strictly
        if kind == "json_schema":
            schema = form.required("schema", form.raw("schema"))
        elif kind == "json_object":
            schema = {"type": "object"}
    reasoning = fields.object("reasoning")
    effort = reasoning.text("effort", choices=tuple(REASONING_BUDGETS)) if reasoning is not None else None
    try:
        params = SamplingParams(
            temperature=fields.number("temperature"),
            top_p=fields.number("top_p"),
            max_tokens=fields.integer("max_output_tokens", 1, 2**31),
            seed=fields.integer("seed"),
            json_schema=schema,
            thinking_budget=REASONING_BUDGETS[effort] if effort not in (None, "none") else None,
        )
    except ValueError as err:
        raise ApiError(400, str(err), code="invalid_value") from err
    return Sampling(params, enable_thinking=None if effort is None else effort != "none")


def _read_tools(fields: Fields) -> tuple[list[dict[str, Any]] | None, str | None]:
    """Return the functions that the model may call, and which it must: None, a name, or "" for any of them."""
    tools: list[dict[str, Any]] = []
    for tool in fields.objects("tools"):
        if tool.text("type") != "function":
            raise ApiError(400, "only tools of type 'function' are supported", tool.name("type"), "unsupported")
        tool.take("strict")
        tools.append({"type": "function", "function": read_function(tool)})
    choice = fields.raw("tool_choice", "auto")
    if choice == "none":
        return None, None
    if choice == "auto":
        return tools or None, None
    if choice == "required" and tools:
        return tools, ""
    name = choice.get("name") if isinstance(choice, dict) else None
    if name not in [tool["function"]["name"] for tool in tools]:
        raise ApiError(400, f"must be none, auto, required or one of the tools, got {describe(choice)}", "tool_choice")
    return tools, str(name)


def _read_input(fields: Fields) -> list[dict[str, Any]]:
    """Return the new messages as the chat template reads them."""
    given = fields.required("input", fields.raw("input"))
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise ApiError(400, f"must be a string or a list of items, got {describe(given)}", fields.name("input"))
    found: list[dict[str, Any]] = []
    for item in fields.objects("input"):
        _add_item(item, item.text("type", "message") or "message", found)
    return found


def _add_item(item: Fields, kind: str, found: list[dict[str, Any]]) -> None:
    """Add one item of the input to the messages; reasoning and calls belong to one message of the assistant."""
    item.take("id", "status", "call_id", "summary", "encrypted_content", "phase", "caller", "namespace")
    if kind == "message":
        role = item.required("role", item.text("role", choices=("system", "developer", "user", "assistant")))
        content = _required_text(item, "content")
        if role == "assistant" and found and "content" not in found[-1]:  # its reasoning went before
            found[-1]["content"] = content
        else:
            found.append({"role": "system" if role == "developer" else role, "content": content})
    elif kind == "function_call_output":
        output = _required_text(item, "output")
        found.append({"role": "tool", "content": output})
    elif kind == "function_call":
        call = read_call(item)
        if not found or found[-1]["role"] != "assistant":
            found.append({"role": "assistant", "content": ""})
        found[-1].setdefault("content", "")
        found[-1].setdefault("tool_calls", []).append(call)
    elif kind == "reasoning":
        texts = [part.text("text") or "" for part in item.objects("content")]
        if any(texts):
            found.append({"role": "assistant", "reasoning_content": "".join(texts)})
    else:
        raise ApiError(400, f"items of type {kind!r} are not supported", item.name("type"), "unsupported")


def _required_text(item: Fields, key: str) -> str:
    item.required(key, item.raw(key))
    return text_of(item, key)


def to_output(wanted: ResponseRequest, result: GenerationResult) -> list[dict[str, Any]]:
    """Return the output items of a finished reply."""
    text, calls = content_and_calls(wanted.conversation.must_call, result)
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


def _finish(
    request: Request, wanted: ResponseRequest, result: GenerationResult, output: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return the response object of a finished reply, and store it."""
    metrics, is_cut = result.metrics, result.finish_reason == "length"
    usage = {
        "input_tokens": metrics.prompt_tokens,
        "input_tokens_details": {"cached_tokens": metrics.reused_tokens},
        "output_tokens": metrics.new_tokens,
        "output_tokens_details": {
            "reasoning_tokens": reasoning_tokens(result, tokenizer_of(wanted.conversation.served))
        },
        "total_tokens": metrics.prompt_tokens + metrics.new_tokens,
    }
    details = {"reason": "max_output_tokens"} if is_cut else None
    status = "incomplete" if is_cut else "completed"
    response = wanted.to_response(status, output, usage=usage, incomplete_details=details)
    if wanted.is_stored:
        messages = [m for m in wanted.conversation.messages if m is not _instructions_of(wanted)]
        text, calls = content_and_calls(wanted.conversation.must_call, result)
        reply: dict[str, Any] = {"role": "assistant", "content": text}
        if calls:
            functions = [{"name": call.name, "arguments": call.arguments} for call in calls]
            reply["tool_calls"] = [{"type": "function", "function": function} for function in functions]
        state_of(request).responses.add(Stored(response, [*messages, reply]))
    return response


def _instructions_of(wanted: ResponseRequest) -> dict[str, Any] | None:
    """Return the message of the instructions, which the next response does not inherit."""
    return wanted.conversation.messages[0] if wanted.given["instructions"] else None


class _Items:
    """The output items of a stream: opened when their first text comes, closed when another kind follows."""

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


async def _events(request: Request, wanted: ResponseRequest) -> AsyncGenerator[bytes, None]:
    """Yield the events of a streamed response, numbered."""
    number = 0
    async for data in _response_events(request, wanted):
        yield event({**data, "sequence_number": number}, data["type"])
        number += 1


async def _response_events(request: Request, wanted: ResponseRequest) -> AsyncIterator[dict[str, Any]]:
    items = _Items()
    is_begun = False
    try:
        async for delta in deltas(request, wanted.conversation):
            if delta is None:
                is_begun = True
                yield {"type": "response.created", "response": wanted.to_response("in_progress", [])}
                yield {"type": "response.in_progress", "response": wanted.to_response("in_progress", [])}
                continue
            for each in (*items.text("reasoning", delta.reasoning), *items.text("message", delta.content)):
                yield each
            for call in delta.tool_calls:
                for each in items.call(call):
                    yield each
            if delta.result is not None:
                for each in (*items.close(), *items.ensure_one()):
                    yield each
                response = _finish(request, wanted, delta.result, items.finished)
                yield {"type": f"response.{response['status']}", "response": response}
    except Exception as err:
        if not is_begun:
            raise
        error = to_api_error(err)
        details = {"code": error.code or "server_error", "message": error.message}
        yield {"type": "response.failed", "response": wanted.to_response("failed", items.finished, error=details)}
