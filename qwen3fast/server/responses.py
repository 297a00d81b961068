"""`/v1/responses`, OpenAI's newer form of a conversation. Source: OpenAI API reference, "Responses"."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from qwen3fast.results import GenerationResult
from qwen3fast.server.conversation import deltas
from qwen3fast.server.errors import to_api_error
from qwen3fast.server.replies import answer
from qwen3fast.server.response_items import ItemEvents, to_output
from qwen3fast.server.response_request import ResponseRequest, read_response_request
from qwen3fast.server.state import state_of
from qwen3fast.server.store import ResponseStore, Stored
from qwen3fast.server.stream import event
from qwen3fast.server.usage import reasoning_tokens


async def create_response(request: Request) -> Response:
    """Answer a conversation, at once or as a stream."""
    store = state_of(request).responses
    return await answer(request, partial(read_response_request, store), partial(_finish, store), _events)


async def get_response(request: Request) -> Response:
    """Return a stored response."""
    return JSONResponse(state_of(request).responses.get(request.path_params["id"]).response)


async def delete_response(request: Request) -> Response:
    """Delete a stored response."""
    state_of(request).responses.delete(request.path_params["id"])
    return JSONResponse({"id": request.path_params["id"], "object": "response", "deleted": True})


def _finish(
    store: ResponseStore,
    wanted: ResponseRequest,
    finished: list[GenerationResult],
    output: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Return the response object of the one finished reply, and store it. output: items that were streamed."""
    [result] = finished
    metrics, is_cut = result.metrics, result.finish_reason == "length"
    text, calls = wanted.content_and_calls(result)
    output = to_output(result, text, calls) if output is None else output
    usage = {
        "input_tokens": metrics.prompt_tokens,
        "input_tokens_details": {"cached_tokens": metrics.reused_tokens, "cache_write_tokens": 0},
        "output_tokens": metrics.new_tokens,
        "output_tokens_details": {"reasoning_tokens": reasoning_tokens(result, wanted.tokenizer)},
        "total_tokens": metrics.prompt_tokens + metrics.new_tokens,
    }
    details = {"reason": "max_output_tokens"} if is_cut else None
    status = "incomplete" if is_cut else "completed"
    response = wanted.to_response(status, output, usage=usage, incomplete_details=details)
    if wanted.is_stored:
        messages = wanted.prompts[1:] if wanted.given["instructions"] else wanted.prompts  # which are not inherited
        reply: dict[str, Any] = {"role": "assistant", "content": text}
        if calls:
            reply["tool_calls"] = [call.to_message() for call in calls]
        store.add(Stored(response, [*messages, reply]))
    return response


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
        async for delta in deltas(request, wanted):
            if delta is None:
                is_begun = True
                yield {"type": "response.created", "response": wanted.to_response("in_progress", [])}
                yield {"type": "response.in_progress", "response": wanted.to_response("in_progress", [])}
                continue
            news = [*items.text("reasoning", delta.reasoning), *items.text("message", delta.content)]
            news += [each for call in delta.tool_calls for each in items.call(call)]
            if delta.result is not None:
                news += [*items.close(), *items.ensure_one()]
                response = _finish(state_of(request).responses, wanted, [delta.result], items.finished)
                news.append({"type": f"response.{response['status']}", "response": response})
            for each in news:
                yield each
    except Exception as err:
        if not is_begun:
            raise
        error = to_api_error(err)
        details = {"code": error.code or "server_error", "message": error.message}
        yield {"type": "response.failed", "response": wanted.to_response("failed", items.finished, error=details)}
