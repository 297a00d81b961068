"""Errors in the form of OpenAI's API: a status code, and an object that names the field at fault.

Source: OpenAI API reference, "Error codes"; Anthropic API reference, "Errors" (the form of `/v1/messages`).
"""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from qwen3fast.sampling.grammar import GrammarError
from qwen3fast.scheduling.admission import QueueFullError
from qwen3fast.scheduling.prompt import ContextLengthError
from qwen3fast.scheduling.worker import ClosedError

ANTHROPIC_PATH = "/v1/messages"
RETRY_AFTER_S = 1
OF_PROMPT = ("prompt ", "the prompt ", "token id ")  # how its messages on a prompt begin
PROMPT_FIELDS = {
    "/v1/chat/completions": "messages",
    ANTHROPIC_PATH: "messages",
    "/v1/completions": "prompt",
    "/v1/responses": "input",
}
# The types of errors by status: OpenAI's and Anthropic's; other statuses are as 400.
_TYPES = {
    400: ("invalid_request_error", "invalid_request_error"),
    401: ("authentication_error", "authentication_error"),
    404: ("not_found_error", "not_found_error"),
    413: ("invalid_request_error", "request_too_large"),
    429: ("rate_limit_error", "rate_limit_error"),
    500: ("server_error", "api_error"),
    503: ("service_unavailable_error", "overloaded_error"),
    504: ("timeout_error", "timeout_error"),
}


class ApiError(Exception):
    """An error response.

    Attributes:
        status: HTTP status code, from 400 to 599. message: the error, the expected value, the remedy.
        param: the field at fault, as a path such as "messages[2].role"; None if it is not one field.
        code: a word for programs, such as "model_not_found"; may be None.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def headers(self) -> dict[str, str]:
        """HTTP headers that belong to the status."""
        if self.status in (429, 503):
            return {"Retry-After": str(RETRY_AFTER_S)}
        return {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}

    def body(self, path: str) -> dict[str, Any]:
        """Return the error in the form of the API that a path belongs to, Anthropic's or OpenAI's."""
        openai_type, anthropic_type = _TYPES.get(self.status, _TYPES[400])
        if path.startswith(ANTHROPIC_PATH):
            message = f"{self.param}: {self.message}" if self.param else self.message
            return {"type": "error", "error": {"type": anthropic_type, "message": message}}
        return {"error": {"message": self.message, "type": openai_type, "param": self.param, "code": self.code}}

    def response(self, path: str) -> JSONResponse:
        """Return the response to a request of a path."""
        return JSONResponse(self.body(path), self.status, self.headers)


def to_api_error(error: BaseException) -> ApiError:
    """Return the error response for an exception; its status is 500 unless the request caused the exception."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), code="queue_full")
    if isinstance(error, ClosedError):
        return ApiError(503, "the server is shutting down", code="shutting_down")
    if isinstance(error, TimeoutError | asyncio.TimeoutError):  # two classes before Python 3.11
        return ApiError(504, "the reply took longer than the server's request timeout", code="timeout")
    if isinstance(error, ContextLengthError):
        lengths = str(error).partition(";")[0]
        message = f"{lengths}; shorten one, or start the server with a larger --max-seq-len"
        return ApiError(400, message, code="context_length_exceeded")
    if isinstance(error, ValueError | GrammarError):
        return ApiError(400, str(error), code="invalid_value")
    if isinstance(error, ImportError):
        return ApiError(400, f"not available on this server: {error}", code="unsupported")
    return ApiError(500, f"internal error: {type(error).__name__}: {error}", code="internal_error")


async def answer_error(request: Request, error: Exception) -> JSONResponse:
    """Return the response to an exception, in the form of the API that the path belongs to."""
    api_error = to_api_error(error)
    if api_error.param is None and not isinstance(error, ApiError) and api_error.message.startswith(OF_PROMPT):
        api_error.param = PROMPT_FIELDS.get(request.url.path.removesuffix("/count_tokens"))
    return api_error.response(request.url.path)
