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

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen3fast.server.errors import ApiError
from qwen3fast.server.options import ServerOptions
from qwen3fast.server.state import ServerState

logger = logging.getLogger("qwen3fast.server")
REQUEST_ID = "X-Request-Id"
OPEN_PATHS = ("/health", "/ready", "/")
DISCARDED_BYTES = 2**26  # read at most from a client whose request is refused
DISCARD_PAUSE_S = 0.5  # of silence, after which such a client is assumed to wait for the response
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
        body = _Body(receive, self._state.options)

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (REQUEST_ID.lower().encode(), request_id.encode())]
            elif status >= 400 and not message.get("more_body", False) and not body.is_whole:
                # The server closes the connection with the last message: a client that still sends would see that
                # instead of the response.
                await send({**message, "more_body": True})
                await body.discard()
                message = {"type": "http.response.body", "body": b"", "more_body": False}
            await send(message)

        self._state.in_flight += 1
        try:
            self._check(request)
            await self._app(scope, body.receive, send_with_id)
        except ApiError as err:
            if status == 499:  # nothing was sent yet
                await err.response(request.url.path)(scope, receive, send_with_id)
        except ClientDisconnect:  # before its body was whole: nobody reads a response
            pass
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
            raise _too_large(self._state.options)

    def _is_allowed(self, request: Request) -> bool:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")
        # All keys are compared, in constant time: the time does not reveal how much of a guess was right.
        matches = [hmac.compare_digest(given.encode("utf-8", "replace"), key) for key in self._keys]
        return any(matches)


class _Body:
    """The body of a request, with a limit on its size, which need not be declared, and on the time.

    is_whole: all of it has come, or the client has gone.
    """

    def __init__(self, receive: Receive, options: ServerOptions) -> None:
        self._receive, self._options = receive, options
        self._size = 0
        self.is_whole = False

    async def receive(self) -> Message:
        """Return the next message. Source: ASGI. Raises: ApiError (413, 408)."""
        if self.is_whole:  # only a disconnection can come
            return await self._receive()
        timeout_s = self._options.receive_timeout_s
        try:
            message = await asyncio.wait_for(self._receive(), timeout_s)
        except asyncio.TimeoutError as err:
            reason = f"no part of the request body arrived for {timeout_s} s"
            raise ApiError(408, reason, code="request_timeout") from err
        self._note(message)
        if self._size > self._options.max_body_bytes:
            raise _too_large(self._options)
        return message

    async def discard(self) -> None:
        """Read and drop the rest, until the client has sent all of it, pauses, or sends too much."""
        most = self._size + DISCARDED_BYTES
        while not self.is_whole and self._size <= most:
            try:
                self._note(await asyncio.wait_for(self._receive(), DISCARD_PAUSE_S))
            except asyncio.TimeoutError:
                return

    def _note(self, message: Message) -> None:
        self._size += len(message.get("body", b""))
        self.is_whole = not message.get("more_body", False)


def _too_large(options: ServerOptions) -> ApiError:
    most = options.max_body_bytes
    return ApiError(413, f"the body is larger than {most} bytes (--max-body-bytes)", code="request_too_large")
