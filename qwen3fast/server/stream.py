"""Server-sent events, with heartbeats while there is no news. Clients that leave or do not read are disconnected.

Source: WHATWG HTML standard, "Server-sent events".
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from qwen3fast.server.errors import ApiError
from qwen3fast.server.options import ServerOptions

HEARTBEAT = b": heartbeat\n\n"
DONE = b"data: [DONE]\n\n"
T = TypeVar("T")
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def event(data: dict[str, Any], name: str | None = None) -> bytes:
    """Return one event as bytes; name: the `event:` line that Anthropic's and the Responses API have."""
    line = f"data: {_encode(data)}\n\n"
    return (f"event: {name}\n{line}" if name else line).encode("utf-8", "replace")


class EventStream(Response):
    """A streamed response of events.

    The server buffers little of it (uvicorn 64 KiB), then `send` waits, and nothing more is taken from the events; the
    engine holds at most the reply's own text. Events are sent in one task and watched from another: a token costs no
    task and no timer.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        options: ServerOptions,
        error_event: Callable[[Exception], bytes],
        headers: dict[str, str] | None = None,
    ) -> None:
        """error_event: makes the last event of a stream that ends in an exception or takes longer than the limit."""
        self.status_code, self.background, self.body = 200, None, b""
        self._events, self._options, self._error_event = events, options, error_event
        self._sending_since: float | None = None
        self._last = 0.0  # when the latest event was sent
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **(headers or {})})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all events, or stop early when the client leaves or does not read. Close the generator of events."""
        self._last = asyncio.get_running_loop().time()
        sending = asyncio.create_task(self._send_all(send))
        gone = asyncio.create_task(_disconnection(receive))
        try:
            await self._watch(sending, gone, send)
        except OSError:  # the client is gone
            pass
        finally:
            for task in (sending, gone):
                task.cancel()
            await asyncio.gather(sending, gone, return_exceptions=True)
            await self._events.aclose()  # cancels the request now, not when it is collected

    async def _send_all(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await self._send(send, start)
        try:
            async for data in self._events:
                await self._send(send, {"type": "http.response.body", "body": data, "more_body": True})
        except OSError:
            raise
        except Exception as err:
            await self._send_last(send, self._error_event(err))
        else:
            await self._send_last(send, b"")

    async def _watch(self, sending: asyncio.Task[None], gone: asyncio.Task[None], send: Send) -> None:
        """Return once the events are sent, the client has left, or it has read nothing for too long."""
        now, options = asyncio.get_running_loop().time, self._options
        deadline = now() + options.request_timeout_s
        tick_s = min(options.heartbeat_s, options.send_timeout_s) / 4
        while True:
            wait_s = max(0.0, min(tick_s, deadline - now()))
            await asyncio.wait((sending, gone), timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                return sending.result()
            if gone.done():
                return
            if self._sending_since is not None:
                if now() - self._sending_since >= options.send_timeout_s:
                    return
            elif now() >= deadline:
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)
                end = self._send_last(send, self._error_event(TimeoutError()))
                return await asyncio.wait_for(end, options.send_timeout_s)
            elif now() - self._last >= options.heartbeat_s:
                beat = {"type": "http.response.body", "body": HEARTBEAT, "more_body": True}
                await asyncio.wait_for(self._send(send, beat), options.send_timeout_s)

    async def _send_last(self, send: Send, data: bytes) -> None:
        await self._send(send, {"type": "http.response.body", "body": data, "more_body": False})

    async def _send(self, send: Send, message: Message) -> None:
        now = asyncio.get_running_loop().time
        self._sending_since = now()
        await send(message)
        self._sending_since, self._last = None, now()


async def unless_disconnected(request: Request, work: Awaitable[T]) -> T:
    """Wait for work while the client is connected; cancel it when the client disconnects.

    Raises: ApiError (499, which nobody receives) after a disconnection; what the work raises.
    """
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(_disconnection(request.receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(499, "the client closed the connection")
    finally:
        for future in (task, watch):
            if not future.done():
                future.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await future


async def _disconnection(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
