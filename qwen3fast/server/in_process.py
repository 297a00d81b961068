"""Requests to the application without a socket, for `batch`. Source: ASGI specification 3.0."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.applications import Starlette
from starlette.types import Message


async def exchange(app: Starlette, path: str, body: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
    """Post a JSON object to a path; canceling it simulates a client that leaves.

    Returns: status, headers with names in lower case, and body, for a stream with all events.
    """
    scope = {
        "type": "http", "http_version": "1.1", "method": "POST", "scheme": "http", "path": path, "query_string": b"",
        "headers": [(b"content-type", b"application/json")], "client": ("batch", 0),
    }  # fmt: skip
    incoming: list[Message] = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
    outgoing: list[Message] = []

    async def receive() -> Message:
        return incoming.pop() if incoming else await asyncio.Future()  # this client never goes away

    async def send(message: Message) -> None:
        outgoing.append(message)

    await app(scope, receive, send)
    headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in outgoing[0]["headers"]}
    return outgoing[0]["status"], headers, b"".join(message.get("body", b"") for message in outgoing)
