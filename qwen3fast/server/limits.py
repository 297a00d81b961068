"""Middleware in front of all endpoints: request ids, API keys, body size, draining, the log. Plain ASGI.

Source: ASGI specification 3.0.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import secrets
import time
from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen3fast.server.errors import ApiError
from qwen3fast.server.state import ServerState

logger = logging.getLogger("qwen3fast.server")
REQUEST_ID = "X-Request-Id"
OPEN_PATHS = ("/health", "/ready", "/")
_SAFE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Limits:
    """Middleware that refuses requests beyond the limits, and logs one line per request."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app, self._state = app, state
        self._keys = [key.encode() for key in state.options.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection. Source: ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        request_id = request.headers.get(REQUEST_ID, "")
        if not _SAFE_ID.fullmatch(request_id):  # it goes into headers and the log
            request_id = f"req-{secrets.token_hex(12)}"
        request.state.id, request.state.model = request_id, "-"
        started, status = time.perf_counter(), 499

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (REQUEST_ID.lower().encode(), request_id.encode())]
            await send(message)

        self._state.in_flight += 1
        try:
            self._check(request)
            await self._app(scope, self._limited(request, receive), send_with_id)
        except ApiError as err:
            if status == 499:  # nothing was sent yet
                body = err.to_anthropic() if request.url.path == "/v1/messages" else err.to_openai()
                await JSONResponse(body, err.status, err.headers)(scope, receive, send_with_id)
        finally:
            self._state.in_flight -= 1
            route = scope.get("route")
            path = getattr(route, "path", "other")
            self._state.metrics.count_response(path, status)
            seconds = time.perf_counter() - started
            logger.info("%s %s %s %s %d %.3fs", request_id, request.method, path, request.state.model, status, seconds)

    def _check(self, request: Request) -> None:
        if request.url.path in OPEN_PATHS:
            return
        if self._keys and not self._is_allowed(request):
            raise ApiError(401, "missing or wrong API key; send 'Authorization: Bearer KEY'", code="invalid_api_key")
        if self._state.is_draining and request.method == "POST":
            raise ApiError(503, "the server is shutting down", code="shutting_down")
        length = request.headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._state.options.max_body_bytes:
            raise self._too_large()

    def _is_allowed(self, request: Request) -> bool:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")
        # All keys are compared, in constant time: the time does not reveal how much of a guess was right.
        matches = [hmac.compare_digest(given.encode("utf-8", "replace"), key) for key in self._keys]
        return any(matches)

    def _limited(self, request: Request, receive: Receive) -> Callable[[], Any]:
        """Return `receive` with a limit on the body's size, which need not be declared, and on the time."""
        size, is_whole, timeout_s = 0, False, self._state.options.receive_timeout_s

        async def limited() -> Message:
            nonlocal size, is_whole
            if is_whole:  # only a disconnection can come
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), timeout_s)
            except asyncio.TimeoutError as err:
                raise ApiError(408, f"nothing of the body came for {timeout_s} s", code="request_timeout") from err
            if message["type"] == "http.request":
                size += len(message.get("body", b""))
                is_whole = not message.get("more_body", False)
                if size > self._state.options.max_body_bytes:
                    raise self._too_large()
            return message

        return limited

    def _too_large(self) -> ApiError:
        most = self._state.options.max_body_bytes
        return ApiError(413, f"the body is larger than {most} bytes (--max-body-bytes)", code="request_too_large")
