"""`/v1/responses`, OpenAI's newer form of a conversation. Source: OpenAI API reference, "Responses"."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from qwen3fast.results import GenerationResult
from qwen3fast.server.conversation import complete, content_and_calls, deltas
from qwen3fast.server.errors import to_api_error
from qwen3fast.server.fields import read_fields, refuse_or_name
from qwen3fast.server.models import tokenizer_of
from qwen3fast.server.replies import reasoning_tokens
from qwen3fast.server.response_items import ItemEvents, to_output
from qwen3fast.server.response_request import ResponseRequest, read_response_request
from qwen3fast.server.state import state_of
from qwen3fast.server.store import Stored
from qwen3fast.server.stream import event, unless_disconnected


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
    output = to_output(finished[0], wanted.conversation.must_call)
    return JSONResponse(_finish(request, wanted, finished[0], output), headers=headers)


async def get_response(request: Request) -> Response:
    """Return a stored response."""
    return JSONResponse(state_of(request).responses.get(request.path_params["id"]).response)


async def delete_response(request: Request) -> Response:
    """Delete a stored response."""
    state_of(request).responses.delete(request.path_params["id"])
    return JSONResponse({"id": request.path_params["id"], "object": "response", "deleted": True})


def _finish(
    request: Request, wanted: ResponseRequest, result: GenerationResult, output: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return the response object of a finished reply, and store it."""
    metrics, is_cut = result.metrics, result.finish_reason == "length"
    usage = {
        "input_tokens": metrics.prompt_tokens,
        "input_tokens_details": {"cached_tokens": metrics.reused_tokens, "cache_write_tokens": 0},
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


async def _events(request: Request, wanted: ResponseRequest) -> AsyncGenerator[bytes, None]:
    """Yield the events of a streamed response, numbered."""
    number = 0
    async for data in _response_events(request, wanted):
        yield event({**data, "sequence_number": number}, data["type"])
        number += 1


async def _response_events(request: Request, wanted: ResponseRequest) -> AsyncIterator[dict[str, Any]]:
    items = ItemEvents()
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
