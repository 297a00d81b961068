"""Server-sent events: heartbeats while nothing comes, an end when the client goes away or takes nothing.

Source: WHATWG HTML standard, "Server-sent events".
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from qwen3fast.server.errors import ApiError

HEARTBEAT = b": heartbeat\n\n"
DONE = b"data: [DONE]\n\n"
T = TypeVar("T")


def event(data: dict[str, Any], name: str | None = None) -> bytes:
    """Return one event as bytes; name: the `event:` line that Anthropic's and the Responses API have."""
    line = f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"
    return (f"event: {name}\n{line}" if name else line).encode("utf-8", "replace")


class EventStream(StreamingResponse):
    """A streamed response of events.

    A client that takes nothing for send_timeout_s is disconnected: uvicorn buffers little (64 KiB), then `send` waits,
    and nothing more is taken from the engine, which holds at most the reply's own text.
    """

    def __init__(
        self,
        events: AsyncIterator[bytes],
        heartbeat_s: float,
        send_timeout_s: float,
        headers: dict[str, str] | None = None,
    ) -> None:
        own = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **(headers or {})}
        super().__init__(with_heartbeats(events, heartbeat_s), media_type="text/event-stream", headers=own)
        self._send_timeout_s = send_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Any) -> None:
            try:
                await asyncio.wait_for(send(message), self._send_timeout_s)
            except asyncio.TimeoutError as err:
                raise OSError(f"the client took nothing for {self._send_timeout_s} s") from err

        with suppress(OSError):  # the client is gone; `with_heartbeats` has closed what fed it
            await super().__call__(scope, receive, send_in_time)


async def with_heartbeats(events: AsyncIterator[bytes], heartbeat_s: float) -> AsyncIterator[bytes]:
    """Yield events, and a comment whenever none has come for heartbeat_s. Closes the source when it is closed."""
    # aclosing: the source cancels its request in `finally`, which must run now and not when it is collected.
    async with aclosing(events) as source:  # type: ignore[type-var]
        waiting: asyncio.Future[bytes] | None = None
        try:
            while True:
                waiting = waiting or asyncio.ensure_future(anext(source))
                done, _ = await asyncio.wait((waiting,), timeout=heartbeat_s)
                if not done:
                    yield HEARTBEAT
                    continue
                finished, waiting = waiting, None
                try:
                    yield finished.result()
                except StopAsyncIteration:
                    return
        finally:
            if waiting is not None:
                waiting.cancel()
                with suppress(asyncio.CancelledError, StopAsyncIteration, Exception):
                    await waiting


async def unless_disconnected(request: Request, work: Awaitable[T]) -> T:
    """Wait for work while the client is there; cancel it when the client goes away.

    Raises: ApiError (499, which nobody receives) after a disconnection; what the work raises.
    """
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(_disconnection(request))
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


async def _disconnection(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
