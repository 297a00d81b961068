"""Requests to the application without a socket, for `batch` and for tests. Source: ASGI specification 3.0."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.applications import Starlette
from starlette.types import Message


async def call(app: Starlette, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Post a JSON object to a path. Returns: status and JSON body. Canceling it simulates a client that leaves."""
    status, content = await post(app, path, body)
    return status, json.loads(content)


async def post(app: Starlette, path: str, body: dict[str, Any]) -> tuple[int, bytes]:
    """Post a JSON object to a path. Returns: status and body, for a stream with all events."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "client": ("batch", 0),
        "server": ("batch", 0),
    }
    incoming = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
    status, parts = 0, []

    async def receive() -> Message:
        if incoming:
            return incoming.pop()
        await asyncio.Event().wait()  # this client never goes away
        raise AssertionError("unreachable")

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            parts.append(message.get("body", b""))

    await app(scope, receive, send)
    return status, b"".join(parts)
