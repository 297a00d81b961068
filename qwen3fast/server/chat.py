"""`POST /v1/chat/completions`. Source: OpenAI API reference, "Chat", and vLLM's extras of it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from qwen3fast._version import __version__
from qwen3fast.results import GenerationResult, TokenLogprobs
from qwen3fast.server.answer_stream import AnswerPiece, AnswerStream
from qwen3fast.server.errors import ApiError, to_api_error
from qwen3fast.server.fields import Fields, describe, read_fields, refuse_or_name
from qwen3fast.server.models import ServedModel, generator_of, tokenizer_of
from qwen3fast.server.replies import new_id, now, pieces, results, started, usage
from qwen3fast.server.sampling import Sampling, read_sampling, schema_of_calls
from qwen3fast.server.state import state_of
from qwen3fast.server.stream import DONE, EventStream, event, unless_disconnected
from qwen3fast.text.tokenizer import Tokenizer
from qwen3fast.text.tool_calls import ToolCall

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True)
class ChatRequest:
    """A chat completion that was asked for. must_call: the reply is a tool call and nothing else."""

    served: ServedModel
    messages: list[dict[str, Any]]
    sampling: Sampling
    tools: list[dict[str, Any]] | None = None
    must_call: bool = False
    stream: bool = False
    include_usage: bool = False
    id: str = field(default_factory=lambda: new_id("chatcmpl"))
    created: int = field(default_factory=now)

    def prompt(self) -> list[int]:
        """Return the token ids of the rendered conversation. Raises: ValueError for what the template refuses."""
        thinking = self.sampling.enable_thinking
        return generator_of(self.served).render(
            self.messages, self.sampling.params, True if thinking is None else thinking, self.tools
        )

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
    state = state_of(request)
    fields = await read_fields(request)
    chat = read_chat(fields, state.models.choose(fields, "generate"))
    headers = refuse_or_name([fields], state.options.strict)
    state.note(request, chat.served, chat.messages)
    if chat.stream:
        events = _events(request, chat)
        first = await anext(events)  # errors before the first token still get a status code of their own
        return state.event_stream(request, first, events, headers)
    finished = await unless_disconnected(request, state.in_time(_complete(request, chat)))
    return JSONResponse(to_completion(chat, finished), headers=headers)


def read_chat(fields: Fields, served: ServedModel) -> ChatRequest:
    """Read the fields of a chat completion. Raises: ApiError (400) naming the field."""
    tokenizer_of(served)
    tools, choice = read_tools(fields)
    wants_logprobs = fields.flag("logprobs")
    top = fields.integer("top_logprobs", 0, MAX_TOP_LOGPROBS)
    if top is not None and not wants_logprobs:
        raise ApiError(400, "needs logprobs to be true", fields.name("top_logprobs"), "invalid_value")
    sampling = read_sampling(fields, ("max_completion_tokens", "max_tokens"), (top or 0) if wants_logprobs else None)
    if choice is not None:
        if sampling.params.json_schema is not None or sampling.params.regex is not None:
            raise ApiError(400, "a forced tool call and a response format exclude each other", "tool_choice")
        forced = schema_of_calls(tools or [], choice or None)
        sampling = replace(sampling, params=replace(sampling.params, json_schema=forced))
    stream = fields.flag("stream")
    stream_options = fields.object("stream_options")
    include_usage = stream_options is not None and stream_options.flag("include_usage")
    for name in ("user", "metadata", "store", "parallel_tool_calls", "service_tier", "safety_identifier"):
        fields.raw(name)  # they do not concern how a reply is made
    return ChatRequest(
        served, read_messages(fields), sampling, tools, choice is not None, stream, bool(include_usage)
    )


def read_messages(fields: Fields) -> list[dict[str, Any]]:
    """Return the conversation as the chat template reads it. Raises: ApiError (400) naming the message and field."""
    given = fields.required("messages", fields.items("messages"))
    if not given:
        raise ApiError(400, "needs at least one message", fields.name("messages"), "invalid_value")
    return [_message(Fields(value, f"{fields.name('messages')}[{i}]")) for i, value in enumerate(given)]


def _message(fields: Fields) -> dict[str, Any]:
    role = fields.required("role", fields.text("role", choices=ROLES))
    content = fields.raw("content")
    calls = fields.items("tool_calls")
    if content is None and not (role == "assistant" and calls):
        raise ApiError(400, "this field is required", fields.name("content"), "missing_required_parameter")
    message: dict[str, Any] = {
        "role": "system" if role == "developer" else role,
        "content": _text_of(content, fields.name("content")),
    }
    reasoning = fields.text("reasoning_content") or fields.text("reasoning")
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        where = fields.name("tool_calls")
        message["tool_calls"] = [_call(Fields(value, f"{where}[{i}]")) for i, value in enumerate(calls)]
    return message


def _text_of(content: Any, path: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ApiError(400, f"must be a string or a list of text parts, got {describe(content)}", path)
    texts = []
    for i, value in enumerate(content):
        part = Fields(value, f"{path}[{i}]")
        kind = part.required("type", part.text("type"))
        if kind not in ("text", "input_text", "output_text"):
            raise ApiError(400, f"{kind!r} parts are not supported: this server's models read text", part.name("type"))
        texts.append(part.required("text", part.text("text")))
    return "".join(texts)


def _call(fields: Fields) -> dict[str, Any]:
    function = fields.required("function", fields.object("function"))
    name = function.required("name", function.text("name"))
    arguments = function.raw("arguments", "{}")
    try:
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError) as err:
        raise ApiError(400, f"must be the JSON text of an object: {err}", function.name("arguments")) from err
    if not isinstance(arguments, dict):
        raise ApiError(400, f"must be an object, got {describe(arguments)}", function.name("arguments"))
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def read_tools(fields: Fields) -> tuple[list[dict[str, Any]] | None, str | None]:
    """Return the functions that the model may call, and which it must: None, a name, or "" for any of them.

    Raises: ApiError (400) naming the field.
    """
    given = fields.items("tools")
    tools = None
    if given:
        tools = [_tool(Fields(value, f"{fields.name('tools')}[{i}]"), value) for i, value in enumerate(given)]
    choice = fields.raw("tool_choice", "auto" if tools else "none")
    if choice == "none":
        return None, None
    path = fields.name("tool_choice")
    if choice in ("auto", "required"):
        if not tools:
            raise ApiError(400, f"{choice!r} needs tools", path, "invalid_value")
        return tools, "" if choice == "required" else None
    named = Fields(choice, path) if isinstance(choice, dict) else None
    function = named.object("function") if named is not None else None
    name = function.text("name") if function is not None else None
    if name is None:
        expected = "'none', 'auto', 'required' or {'type': 'function', 'function': {'name': ...}}"
        raise ApiError(400, f"must be {expected}, got {describe(choice)}", path)
    if name not in [tool["function"]["name"] for tool in tools or []]:
        raise ApiError(400, f"names {name!r}, which is not among the tools", path, "invalid_value")
    return tools, name


def _tool(fields: Fields, value: dict[str, Any]) -> dict[str, Any]:
    if fields.text("type", "function") != "function":
        raise ApiError(400, "only tools of type 'function' are supported", fields.name("type"), "unsupported")
    function = fields.required("function", fields.object("function"))
    function.required("name", function.text("name"))
    function.text("description")
    function.object("parameters")
    return {"type": "function", "function": value["function"]}


async def _complete(request: Request, chat: ChatRequest) -> list[GenerationResult]:
    async with started(generator_of(chat.served), _jobs(chat), state_of(request).options.compile_timeout_s) as handles:
        finished = await results(handles)
    state_of(request).count(request, chat.served, finished)
    return finished


def _jobs(chat: ChatRequest) -> list[Any]:
    prompt = chat.prompt()
    return [(prompt, params) for params in chat.sampling.each()]


def to_completion(chat: ChatRequest, finished: list[GenerationResult]) -> dict[str, Any]:
    """Return the `chat.completion` object of finished replies."""
    tokenizer = tokenizer_of(chat.served)
    return {
        **chat.envelope("chat.completion"),
        "choices": [_choice(chat, i, result, tokenizer) for i, result in enumerate(finished)],
        "usage": usage(finished, 1, tokenizer),
    }


def _choice(chat: ChatRequest, index: int, result: GenerationResult, tokenizer: Tokenizer) -> dict[str, Any]:
    content, calls = content_and_calls(chat.must_call, result)
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


def content_and_calls(must_call: bool, result: GenerationResult) -> tuple[str, list[ToolCall]]:
    """Return a reply's text for the user and its tool calls; with must_call the whole answer is one call."""
    if not must_call:
        return result.answer, result.tool_calls
    try:
        call = json.loads(result.answer)
        return "", [ToolCall(call["name"], call["arguments"])]
    except (ValueError, KeyError, TypeError, RecursionError):  # cut off by max_tokens
        return result.answer, []


def to_tool_call(call: ToolCall) -> dict[str, Any]:
    """Return OpenAI's object of a tool call, with an id of its own."""
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return {"id": new_id("call"), "type": "function", "function": {"name": call.name, "arguments": arguments}}


def to_logprob(at: TokenLogprobs, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return OpenAI's object of a token's log-probability."""

    def one(token_id: int, logprob: float) -> dict[str, Any]:
        raw = tokenizer.token_bytes(token_id)
        return {"token": raw.decode("utf-8", "replace"), "logprob": max(logprob, -9999.0), "bytes": list(raw)}

    return {**one(at.token_id, at.logprob), "top_logprobs": [one(*entry) for entry in at.top]}


def finish_reason(result: GenerationResult, has_calls: bool) -> str:
    """Return OpenAI's word for why a reply ended."""
    return "tool_calls" if has_calls and result.finish_reason == "stop" else result.finish_reason


async def _events(request: Request, chat: ChatRequest) -> AsyncIterator[bytes]:
    """Yield the events of a streamed completion."""
    state, tokenizer = state_of(request), tokenizer_of(chat.served)
    envelope = chat.envelope("chat.completion.chunk")
    streams = [AnswerStream() for _ in range(chat.sampling.n)]
    calls = [0] * chat.sampling.n
    finished: dict[int, GenerationResult] = {}

    def chunk(index: int, delta: dict[str, Any], **more: Any) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **more}
        extra = {"usage": None} if chat.include_usage else {}
        return event({**envelope, "choices": [choice], **extra})

    async with started(generator_of(chat.served), _jobs(chat), state.options.compile_timeout_s) as handles:
        for i in range(chat.sampling.n):
            yield chunk(i, {"role": "assistant", "content": ""})
        async for piece in pieces(handles):
            i, news, result = piece.index, piece.chunk, piece.chunk.result
            if chat.must_call:
                answer = AnswerPiece("", [])
            else:
                answer = streams[i].push(news.answer)
            if result is not None:
                finished[i] = result
                final = streams[i].finish(*content_and_calls(chat.must_call, result))
                answer = AnswerPiece(answer.content + final.content, answer.tool_calls + final.tool_calls)
            delta: dict[str, Any] = {}
            if news.reasoning:
                delta |= {"reasoning_content": news.reasoning, "reasoning": news.reasoning}
            if answer.content:
                delta["content"] = answer.content
            if answer.tool_calls:
                start = calls[i]
                calls[i] += len(answer.tool_calls)
                delta["tool_calls"] = [{"index": start + k, **to_tool_call(c)} for k, c in enumerate(answer.tool_calls)]
            more: dict[str, Any] = {}
            if news.logprobs:
                more["logprobs"] = {"content": [to_logprob(at, tokenizer) for at in news.logprobs], "refusal": None}
            if delta or more:
                yield chunk(i, delta, **more)
            if result is not None:
                yield chunk(i, {}, finish_reason=finish_reason(result, calls[i] > 0))
    every = [finished[i] for i in range(chat.sampling.n)]
    state.count(request, chat.served, every)
    if chat.include_usage:
        yield event({**envelope, "choices": [], "usage": usage(every, 1, tokenizer)})
    yield DONE
