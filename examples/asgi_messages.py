"""Requests to an ASGI application without a socket. Source: ASGI specification 3.0."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from starlette.applications import Starlette
from starlette.types import Message

MAX_MESSAGES = 8  # that wait for their reader; then the application waits


async def messages(
    app: Starlette, method: str, path: str, body: bytes = b"", headers: Sequence[tuple[bytes, bytes]] = ()
) -> AsyncGenerator[Message, None]:
    """Yield the ASGI messages of a response as they come. Closing it cancels the request.

    Raises: exceptions of the application.
    """
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": list(headers),
        "client": ("replica", 0),
        "server": ("replica", 0),
    }
    incoming = [{"type": "http.request", "body": body, "more_body": False}]
    outgoing: asyncio.Queue[Message | None] = asyncio.Queue(MAX_MESSAGES)

    async def receive() -> Message:
        if incoming:
            return incoming.pop()
        await asyncio.Event().wait()  # this client never goes away
        raise AssertionError("unreachable")

    async def run() -> None:
        try:
            await app(scope, receive, outgoing.put)
        finally:
            if not is_closed:
                await outgoing.put(None)

    task, is_closed = asyncio.create_task(run()), False
    try:
        while (message := await outgoing.get()) is not None:
            yield message
        await task
    finally:
        is_closed = True
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
